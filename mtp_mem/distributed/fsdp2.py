"""FSDP2 and the cut: what must hold while a strategy runs several partial backward passes above it.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers the parameters of a unit (a module that it shards) before
the unit's forward and backward pass, and reduces its gradients after it. A strategy that runs heads one after the other
uses the unembedding and the final norm once for each head, and ends a backward pass with each head. Left alone, FSDP2
would gather and reduce them as often. So while a strategy runs:

- shared units (what several heads use) are gathered once, stay whole, and are reduced once, by the trunk's backward;
- a head's unit stays whole from its forward to its backward pass, which follows at once, and is reduced there;
- no unit is prefetched for a pass that does not come, and a partial pass is not taken for the end of the step, at which
  FSDP2 forgets the trunk's prefetch order.

Measured on two gloo ranks, 4 trunk layers and 3 heads: 11 all-gathers and 8 reduce-scatters with every strategy, where
one joint backward takes 19 and 8.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from mtp_mem.errors import BadInput
from mtp_mem.model.head_tree import Phase
from mtp_mem.model.own import Model

_GATHERED: weakref.WeakSet[FSDPModule] = weakref.WeakSet()
"""Heads' units that have been gathered once: torch 2.13 raises if one that never was is told not to reduce."""


def shard(
    model: Model,
    *,
    mesh: DeviceMesh | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    reshard_after_forward: bool = True,
) -> Model:
    """Shard a model in place: a unit for each trunk layer, head, the norm and the unembedding, and one for the rest.

    Args:
        model: `MTPModel`, what `from_hf` made, or your own with `head_layers`, `norm` and `trunk_layers`.
        mesh: one dimension for FSDP2; two, the outer one replicated, for HSDP. By default all ranks.
        mp_policy: dtypes of gathered parameters and of the reduction.
        offload_policy: CPU offload is refused: a strategy's partial passes need their parameters on the device.
        reshard_after_forward: whether a trunk layer's parameters are freed between its forward and backward pass.

    Returns:
        The model; calling its `trunk` gathers parameters as calling `forward` does.

    Raises:
        BadInput: CPU offload, or a model without the parts named above.
    """
    if isinstance(offload_policy, CPUOffloadPolicy):
        raise BadInput("shard: parameters that are offloaded to the host are not supported; expected no offload_policy")
    policy: dict[str, Any] = {"mesh": mesh, "mp_policy": mp_policy or MixedPrecisionPolicy()}
    root: Any = model
    shared, heads = above_the_cut(model)
    if not hasattr(root, "trunk_layers"):
        raise BadInput(f"{type(model).__name__} has no trunk_layers to shard")
    for unit in root.trunk_layers:
        fully_shard(unit, reshard_after_forward=reshard_after_forward, **policy)
    for unit in [*heads, *shared]:
        if any(True for _ in unit.parameters()):
            fully_shard(unit, **policy)
    fully_shard(root, **policy)
    register_fsdp_forward_method(root, "trunk")
    return model


def above_the_cut(model: Model) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that several heads use and nothing below the cut uses; and the heads' own.

    Raises:
        BadInput: a model without `head_layers` and `norm`, or without `unembedding` and `embedding` where it has no
            Hugging Face model `lm` either.
    """
    module: Any = model
    parts = ("head_layers", "norm") if hasattr(model, "lm") else ("head_layers", "norm", "unembedding", "embedding")
    if missing := [part for part in parts if not hasattr(model, part)]:
        raise BadInput(
            f"{type(model).__name__} has no {' and no '.join(missing)}: name its units to sharded_heads yourself"
        )
    unembedding = module.unembedding if hasattr(module, "unembedding") else module.lm.get_output_embeddings()
    embedding = module.embedding if hasattr(module, "embedding") else module.lm.get_input_embeddings()
    modules = list(unembedding) if isinstance(unembedding, nn.ModuleList) else [unembedding]
    below = {id(p) for p in embedding.parameters()}
    own = [one for one in modules if not any(id(p) in below for p in one.parameters())]
    return [module.norm, *own], list(module.head_layers)


@contextmanager
def sharded_heads(
    root: FSDPModule,
    shared: Sequence[FSDPModule],
    heads: Sequence[FSDPModule | None],
    *,
    sync: bool = True,
    frozen_trunk: bool = False,
) -> Iterator[Phase]:
    """A block in which to make the `Heads` and run the strategy: a shared weight is whole only from its beginning on.

    `mtp_mem.forward_backward` enters it by itself for a model that `shard` has sharded.

    Args:
        root: the model.
        shared: units whose parameters more than one head uses; the root too, if it holds such parameters.
        heads: units of the heads' own layers, the first head's first; None for a head without parameters.
        sync: whether to reduce gradients: False for all but the last micro-batch.
        frozen_trunk: whether no trunk backward follows, which would reduce the shared units; the block's end does then.

    Yields:
        The `Phase` that the `Heads` must call: it tells when a head's own backward pass begins.
    """
    own: list[Any] = [unit for unit in heads if unit is not None]
    turns = {f"head {number} backward": [unit] for number, unit in enumerate(heads, 1) if unit is not None}
    turns["heads backward"] = own

    def phase(name: str) -> None:
        for unit in turns.get(name, ()):
            unit.set_requires_gradient_sync(sync)
            unit.set_reshard_after_backward(True)

    def gathered(unit: Any, _: Any) -> None:
        if unit not in _GATHERED:
            _GATHERED.add(unit)
            unit.set_requires_gradient_sync(False)

    root.set_is_last_backward(False)
    root.set_requires_gradient_sync(False)  # else each partial pass would end by reducing all units
    for unit in (*shared, *own):
        # A list that is not empty replaces the default prefetch, which gathers what has just been freed.
        unit.set_modules_to_backward_prefetch([unit] if unit is not root else [])
    for unit in shared:
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    hooks = []
    for unit in own:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)  # the backward of its loss comes first
        if unit not in _GATHERED:
            unit.set_requires_gradient_sync(True)
        hooks.append(unit.register_forward_pre_hook(gathered))
    try:
        yield phase
    finally:
        for hook in hooks:
            hook.remove()
        root.set_is_last_backward(True)
        root.set_requires_gradient_sync(sync)
        for unit in shared:
            unit.set_reshard_after_backward(True, recurse=False)
            unit.set_reshard_after_forward(unit is not root, recurse=False)
    if frozen_trunk:
        root._get_fsdp_state()._root_post_backward_final_callback()  # torch has no public name for it


def units_above_the_cut(model: Model) -> tuple[list[FSDPModule], list[FSDPModule | None]]:
    """A sharded model's units as `sharded_heads` takes them; the root is among the shared ones if heads use its own."""
    root: Any = model
    shared, heads = above_the_cut(model)
    units: list[FSDPModule] = [unit for unit in shared if isinstance(unit, FSDPModule)]
    in_root = [unit for unit in shared if not isinstance(unit, FSDPModule) and any(True for _ in unit.parameters())]
    tied = len(shared) < 2  # the unembedding is the embedding's own weight, which the root holds
    kind = getattr(model, "kind", None) or getattr(getattr(model, "config", None), "head", None)
    if in_root or tied or kind == "deepseek":  # whose heads look tokens up in the embedding
        units.append(root)
    return units, [unit if isinstance(unit, FSDPModule) else None for unit in heads]
