"""DDP and the cut: `head_loss` in the wrapped module needs nothing of this; `forward_backward` reduces once, here."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtp_mem.data import IGNORE


@contextmanager
def averaged_gradients(model: nn.Module, *, sync: bool = True) -> Iterator[nn.Module]:
    """A block for any number of backward passes on the yielded module; its end averages the gradients over ranks.

    One all-reduce for each dtype takes the place of DDP's buckets, whose hooks expect every gradient once.

        with averaged_gradients(ddp) as model:
            losses = mtp_mem.forward_backward(model, batch, strategy)

    Args:
        model: a `DistributedDataParallel`, or any module that is the same on all ranks.
        sync: whether to average: False for all but the last micro-batch.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    group = model.process_group if isinstance(model, DistributedDataParallel) else None
    yield inner
    if not sync:
        return
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for parameter in inner.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.setdefault(parameter.dtype, []).append(parameter.grad)
    for own in gradients.values():
        flat = torch.cat([gradient.flatten() for gradient in own])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for gradient, part in zip(own, flat.split([gradient.numel() for gradient in own]), strict=True):
            gradient.copy_(part.view_as(gradient))


def mean_items(targets: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Number of each head's targets, averaged over ranks, (n,) fp32: `head_loss(..., num_items=mean_items(targets))`.

    Once gradients are averaged, a head's loss is then the mean over the targets of all ranks, also of ranks that have
    more targets than others.

    Args:
        targets: (n, B, S), IGNORE where there is none.
        group: whose ranks; by default all.
    """
    counts = (targets != IGNORE).flatten(1).sum(1).to(torch.float32)  # (n,)
    dist.all_reduce(counts, group=group)
    return counts.clamp(min=1) / dist.get_world_size(group)
