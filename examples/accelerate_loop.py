"""Accelerate: the model is prepared and the loss goes to `accelerator.backward`, as ever."""

import torch
from accelerate import Accelerator
from common import HEADS, compare, rows, tiny_llama
from torch import nn

from mtp_mem import MTPForCausalLM


def train(strategy: str) -> nn.Module:
    """Six batches, gradients accumulated over two."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = MTPForCausalLM(tiny_llama(), n=HEADS, strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(rows(24), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"{strategy}: loss {loss.item():.3f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    compare(train)
