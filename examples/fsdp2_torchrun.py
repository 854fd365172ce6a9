"""FSDP2 under torchrun: a Hugging Face trunk, checkpointed and sharded, and the explicit step.

torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py
"""

import gc

import torch
import torch.distributed as dist
from common import HEADS, STRATEGY, rows, tiny_llama
from torch import Tensor

import mtp_mem
from mtp_mem.distributed.fsdp2 import shard


def train(strategy: str) -> list[Tensor]:
    """Six steps, each rank on batches of its own; the whole weights at the end."""
    model = mtp_mem.from_hf(tiny_llama(), n=HEADS)
    model.checkpoint_trunk(1)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    share = rows(24)[dist.get_rank() :: dist.get_world_size()]
    for batch in torch.utils.data.DataLoader(share, batch_size=2):
        targets = mtp_mem.future_targets(batch["labels"], HEADS)
        step = mtp_mem.Batch(batch["input_ids"], targets)
        losses = mtp_mem.forward_backward(model, step, mtp_mem.load_strategy(strategy))
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"{strategy}: losses of the heads {[round(value, 3) for value in losses.tolist()]}")
    return [parameter.full_tensor() for parameter in model.parameters()]


def compare() -> None:
    """Train twice and say whether the weights are the same."""
    joint, own = train("naive"), train(STRATEGY)
    same = all(torch.equal(a, b) for a, b in zip(joint, own, strict=True))
    if dist.get_rank() == 0:
        says = "identical to the last bit" if same else "different"
        print(f"weights after training, {STRATEGY} against one joint backward: {says}")


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    compare()
    # A group's threads must have ended before the interpreter does: FSDP2's reference cycles would keep the groups.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
