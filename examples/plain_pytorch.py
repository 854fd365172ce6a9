"""A training loop of one's own: `head_loss` in the place of the loss, nothing else changes."""

import torch
from common import HEADS, compare, rows, tiny_llama
from torch import nn

import mtp_mem


def train(strategy: str) -> nn.Module:
    """Six batches, gradients accumulated over two."""
    model = mtp_mem.from_hf(tiny_llama(), n=HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i, batch in enumerate(torch.utils.data.DataLoader(rows(24), batch_size=4)):
        z = model.trunk(input_ids=batch["input_ids"])
        targets = mtp_mem.future_targets(batch["labels"], HEADS)
        loss, losses = mtp_mem.head_loss(model, z, targets, strategy)
        (loss / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"{strategy}: losses of the heads {[round(value, 3) for value in losses.tolist()]}")
    return model


if __name__ == "__main__":
    compare(train)
