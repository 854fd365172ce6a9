"""Hugging Face Trainer: `MTPForCausalLM` is the model; the trainer accumulates, clips, and checkpoints the trunk."""

import tempfile

import transformers
from common import HEADS, compare, rows, tiny_llama
from torch import nn

from mtp_mem import MTPForCausalLM


def train(strategy: str) -> nn.Module:
    """Four optimizer steps over two batches each."""
    model = MTPForCausalLM(tiny_llama(), n=HEADS, strategy=strategy)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            logging_steps=1,
            disable_tqdm=True,
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=rows(24)).train()
    return model


if __name__ == "__main__":
    compare(train)
