"""LoRA by peft on the attention of trunk and heads: only the adapters are trained."""

import peft
import torch
from common import HEADS, compare, rows, tiny_llama
from torch import nn

from mtp_mem import MTPForCausalLM


def train(strategy: str) -> nn.Module:
    """Six steps."""
    model = MTPForCausalLM(tiny_llama(), n=HEADS, strategy=strategy)
    torch.manual_seed(1)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.inject_adapter_in_model(adapters, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for batch in torch.utils.data.DataLoader(rows(24), batch_size=4):
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{strategy}: loss {loss.item():.3f}, {len(trained)} adapters")
    return model


if __name__ == "__main__":
    compare(train)
