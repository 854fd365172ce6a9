"""What a training step does for the process group before and after a strategy runs: nothing on one rank."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Phase, no_phase
from mtp_mem.model.own import Model


@contextmanager
def around_the_heads(model: Model, *, sync: bool, frozen_trunk: bool) -> Iterator[Phase]:
    """A block in which a strategy runs; yields a `Phase` that its heads must call too.

    Args:
        model: sharded by FSDP2, or not.
        sync: whether gradients are reduced: True in the last micro-batch.
        frozen_trunk: whether no backward pass of the trunk follows.
    """
    if not is_sharded(model):
        yield no_phase
        return
    from mtp_mem.distributed.fsdp2 import sharded_heads, units_above_the_cut

    root: Any = model
    shared, heads = units_above_the_cut(model)
    with sharded_heads(root, shared, heads, sync=sync, frozen_trunk=frozen_trunk) as phase:
        yield phase


def is_sharded(model: object) -> bool:
    """Whether FSDP2 shards the model."""
    if "torch.distributed.fsdp" not in sys.modules:  # importing it takes a second, and without it nothing is sharded
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def shards(gradients: list[Tensor]) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """This rank's shards of the gradients, and a function from the norm of these to the norm over all ranks' shards."""
    mesh: DeviceMesh | None = getattr(gradients[0], "device_mesh", None)  # a DTensor's
    if mesh is None:
        return gradients, lambda norm: norm
    group = mesh.get_group(mesh.ndim - 1)  # HSDP: the last dimension is the sharded one

    def over_ranks(norm: Tensor) -> Tensor:
        squared = norm.square()
        dist.all_reduce(squared, group=group)
        return squared.sqrt()

    return [local(gradient) for gradient in gradients], over_ranks


def local(tensor: Tensor) -> Tensor:
    """A DTensor's shard on this rank; any other tensor itself."""
    shard: Tensor | None = getattr(tensor, "_local_tensor", None)
    return tensor if shard is None else shard


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's full tensor, gathered from its ranks, which must all call this; any other tensor itself."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def refuse_other_parallelism(model: Model) -> None:
    """Check that a strategy's partial passes over the model can be right.

    Raises:
        BadInput: it is inside DDP, whose hooks they would trip ("ready twice"), or tensor parallelism shards a
            parameter.
    """
    if isinstance(model, DistributedDataParallel):
        raise BadInput(
            "forward_backward: the model is wrapped in DDP, which expects one backward pass; run it inside"
            " `with averaged_gradients(ddp) as model`, or call head_loss in the wrapped module's forward"
        )
    parallel = next((name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None)  # a DTensor
    if parallel is not None and not is_sharded(model):
        raise BadInput(
            f"{parallel} is sharded by tensor parallelism (parallelize_module), which no strategy supports: each"
            " expects whole logits; FSDP2 by mtp_mem.distributed.fsdp2.shard shards the parameters alone"
        )
