"""Medusa-1 (Cai et al. 2024): the model itself is frozen, residual heads on its output learn the tokens further on."""

import torch
from common import HEADS, compare, rows, tiny_llama
from torch import nn

import mtp_mem


def train(strategy: str) -> nn.Module:
    """Six steps; head 1 is the model's own and has nothing to learn."""
    lm = tiny_llama().requires_grad_(False)
    model = mtp_mem.from_hf(lm, n=HEADS, kind="medusa")
    heads = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(heads, lr=1e-3)
    for batch in torch.utils.data.DataLoader(rows(24), batch_size=4):
        with torch.no_grad():
            z = model.trunk(input_ids=batch["input_ids"])
        targets = mtp_mem.future_targets(batch["labels"], HEADS)
        loss, losses = mtp_mem.head_loss(model, z, targets, strategy, weights=[0.0, 0.8, 0.64])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{strategy}: losses of the heads {[round(value, 3) for value in losses.tolist()]}")
    return model


if __name__ == "__main__":
    compare(train)
