"""What a training step does for the process group before and after a strategy runs: nothing on one rank."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor
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

    Raises:
        BadInput: tensor parallelism shards a parameter.
    """
    _refuse_parallel(model)
    if "torch.distributed.fsdp" not in sys.modules:  # importing it takes a second, and without it nothing is sharded
        yield no_phase
        return
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield no_phase
        return
    from mtp_mem.distributed.fsdp2 import sharded_heads, units_above_the_cut

    shared, heads = units_above_the_cut(model)
    with sharded_heads(model, shared, heads, sync=sync, frozen_trunk=frozen_trunk) as phase:
        yield phase


def _refuse_parallel(model: Model) -> None:
    """Raises BadInput for a DTensor parameter that FSDP2 did not make: tensor parallelism did."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        parallel = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
        if parallel is not None:
            raise BadInput(
                f"{parallel} is sharded by tensor parallelism (parallelize_module), which no strategy supports: each"
                " expects whole logits; FSDP2 by mtp_mem.distributed.fsdp2.shard shards the parameters alone"
            )


def shards(gradients: list[Tensor]) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """This rank's shards of the gradients, and a function from the norm of these to the norm over all ranks' shards."""
    if "torch.distributed.tensor" not in sys.modules:
        return gradients, lambda norm: norm
    from torch.distributed.tensor import DTensor

    first = gradients[0]
    if not isinstance(first, DTensor):
        return gradients, lambda norm: norm
    group = first.device_mesh.get_group(first.device_mesh.ndim - 1)  # HSDP: the last dimension is the sharded one

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


def refuse_wrapped(model: object) -> None:
    """Raises BadInput for a model inside DDP, whose hooks a strategy's partial passes would trip ("ready twice")."""
    if isinstance(model, DistributedDataParallel):
        raise BadInput(
            "forward_backward: the model is wrapped in DDP, which expects one backward pass; run it inside"
            " `with averaged_gradients(ddp) as model`, or call head_loss in the wrapped module's forward"
        )
