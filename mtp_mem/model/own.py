"""What mtp_mem asks of a model, whoever built it, and heads made from a user's own modules.

A model is an `nn.Module` with a trunk, whose output keeps its graph, and heads that hang on it as a tree. `MTPModel` is
one, `mtp_mem.from_hf` makes one of a Hugging Face model, and a class with the members of `Model` is one too:

    class Mine(nn.Module):
        n_future, vocab_size, dim = 4, 32000, 512

        def trunk(self, tokens):
            return self.decoder(tokens)                               # (B, S, D)

        def heads(self, z, phase=mtp_mem.no_phase):
            return mtp_mem.heads(layers=self.head_layers, norm=self.norm, unembedding=self.lm_head, phase=phase)
"""

import copy
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mtp_mem.config.schema import Dtype, HeadKind, Training
from mtp_mem.errors import BadInput, unknown
from mtp_mem.model.head_tree import Heads, Phase, no_phase, tree
from mtp_mem.model.layers import PARAMETER_DTYPES
from mtp_mem.model.losses import LossOptions

M = TypeVar("M", bound="Model")


@runtime_checkable
class Model(Protocol):
    """The members of a model that steps, instruments and the verifier use, beside those of `nn.Module`.

    Attributes:
        n_future: n, the number of heads.
        vocab_size: V, the rows of an unembedding.
        dim: D, its columns, the width of hidden states.
    """

    n_future: int
    vocab_size: int
    dim: int

    def trunk(self, tokens: Tensor, /) -> Tensor:
        """Tokens (B, S) int64 -> hidden states at the cut (B, S, D), with their graph."""

    def heads(self, z: Tensor, phase: Phase = no_phase, /) -> Heads:
        """Everything above the cut for one step, as a tree; `z` is what `trunk` returned in this step."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As in `nn.Module`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As in `nn.Module`."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """As in `nn.Module`."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As in `nn.Module`."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in `nn.Module`."""


def heads(
    *,
    layers: Sequence[Callable[[Tensor], Tensor]],
    norm: Callable[[Tensor], Tensor],
    unembedding: nn.Module | Tensor | Sequence[nn.Module | Tensor],
    kind: HeadKind = "parallel",
    phase: Phase = no_phase,
    autocast: Callable[[], AbstractContextManager[object]] | None = None,
    draws: bool | None = None,
    softcap: float | None = None,
) -> Heads:
    """The heads of one step from a user's modules.

    Args:
        layers: one for each head, hidden states (B, S, D) -> (B, S, D); `nn.Identity()` for a head that is the model's
            own output. What else a layer needs (a mask, rotary tables) is bound to it, say by `functools.partial`.
        norm: the final norm, (B, S, D) -> (B, S, D).
        unembedding: the module of the logits, whose weight is (V, D), or that weight; or one for each head. A bias is
            refused: no strategy adds one.
        kind: "parallel", "linear" and "medusa" heads read the trunk's output, "causal" and "deepseek" heads the head
            before them, "anticausal" heads the one after.
        phase: called with the name of each phase as it begins.
        autocast: context manager in which forward passes run; by default the autocast that is active around the step,
            without its cache of cast weights: with that cache the order of heads would change how gradients are summed.
        draws: whether a layer draws random numbers, so that a strategy that runs it twice must draw them again; by
            default whether one of the modules says so by a rate of dropout above 0, or is a function.
        softcap: c where the model's logits are c tanh(logits / c).

    Raises:
        BadInput: no layers, an unembedding with a bias, several that are not one for each head; an unknown kind.
    """
    if kind not in typing.get_args(HeadKind):
        raise unknown("kind", kind, typing.get_args(HeadKind))
    if not layers:
        raise BadInput("heads: no layers: expected one for each head")
    several = isinstance(unembedding, Sequence | nn.ModuleList)
    each: list[Any] = list(unembedding) if several else [unembedding] * len(layers)  # type: ignore[arg-type]
    if len(each) != len(layers):
        raise BadInput(f"heads: {len(each)} unembeddings for {len(layers)} layers: expected one, or one for each head")
    weights = [_weight(one) for one in each]
    return Heads(
        roots=tuple(tree(kind, layers, weights)),
        norm=norm,
        autocast=autocast or ambient_autocast(weights[0].device.type),
        phase=phase,
        n=len(layers),
        cuda=weights[0].is_cuda,
        draws=draws_random_numbers([*layers, norm]) if draws is None else draws,
        options=LossOptions(softcap=softcap),
    )


def ambient_autocast(device_type: str) -> Callable[[], AbstractContextManager[object]]:
    """The autocast that is active now, for the heads' forward passes, but without its cache of cast weights."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, cache_enabled=False)


def draws_random_numbers(modules: Iterable[object]) -> bool:
    """Whether one of the modules drops something at random, or adds noise: one of its rates by that name is above 0.

    A function in a module's place may do anything, so it counts as one that does; a partial one is what it calls.
    """
    whole = [module.func if isinstance(module, partial) else module for module in modules]
    if not all(isinstance(module, nn.Module) for module in whole):
        return True
    return any(_drops(inner) for module in whole if isinstance(module, nn.Module) for inner in module.modules())


def _drops(module: nn.Module) -> bool:
    rates = (
        rate
        for name, rate in vars(module).items()
        if "drop" in name or "jitter" in name or (name == "p" and isinstance(module, _DropoutNd))
    )
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextmanager
def without_dropout(model: Model) -> Iterator[None]:
    """A block in which modules with a rate of dropout act as in evaluation: orders of heads draw different masks."""
    dropping = [module for _, module in model.named_modules() if module.training and _drops(module)]
    for module in dropping:
        module.training = False
    try:
        yield
    finally:
        for module in dropping:
            module.training = True


def moved(model: M, dtype: Dtype, device: torch.device) -> M:
    """A copy in another dtype on another device; tied weights stay tied."""
    own = getattr(model, "moved", None)
    if own is not None:
        return own(dtype, device)  # type: ignore[no-any-return]
    copied: Any = copy.deepcopy(model)
    return copied.to(device, PARAMETER_DTYPES[dtype])  # type: ignore[no-any-return]


def plain_logits(model: Model, tokens: Tensor) -> Tensor:
    """Logits of all heads (n, B, S, V) with their graph: the model's own output, or else computed from its tree."""
    if getattr(type(model), "forward", nn.Module.forward) is not nn.Module.forward:
        out = typing.cast(Any, model)(tokens)
        if isinstance(out, Tensor) and out.shape == (model.n_future, *tokens.shape, model.vocab_size):
            return out
    z = model.trunk(tokens)
    every = model.heads(z)
    logits: dict[int, Tensor] = {}
    pending = [(root, z) for root in every.roots]
    with every.autocast():
        while pending:
            head, parent = pending.pop()
            hidden = head.layer(parent)
            logits[head.index] = every.options.capped(F.linear(every.norm(hidden), head.unembedding))
            pending += [(child, hidden) for child in head.children]
    return torch.stack([logits[i] for i in range(every.n)])


def groups(model: Model) -> dict[str, list[nn.Parameter]]:
    """Parameters by the part that owns them, each once: the model's own `groups()`, or its child modules."""
    own = getattr(model, "groups", None)
    if own is not None:
        return own()  # type: ignore[no-any-return]
    by_part: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        by_part.setdefault(name.partition(".")[0], []).append(parameter)
    return by_part


def each_once(parts: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """The parts with each parameter in the first that has it, without parts that are left with none."""
    seen: set[nn.Parameter] = set()
    owned: dict[str, list[nn.Parameter]] = {}
    for name, parameters in parts.items():
        if new := [parameter for parameter in parameters if parameter not in seen]:
            owned[name] = new
            seen.update(new)
    return owned


def set_up(model: Model, training: Training) -> None:
    """Apply a training setup to the model in place: freeze its parts, and checkpoint its trunk.

    Raises:
        BadInput: a part that this model does not have, nothing left to train, or a trunk that cannot be checkpointed.
    """
    if training.checkpoint_every:
        checkpoint_trunk = getattr(model, "checkpoint_trunk", None)
        if checkpoint_trunk is None:
            raise BadInput(
                f"training.trunk_checkpointing = {training.trunk_checkpointing!r}: {type(model).__name__} has no method"
                " checkpoint_trunk(every)"
            )
        checkpoint_trunk(training.checkpoint_every)
    owned = groups(model)
    names = [name for name in owned if name.startswith("head ")]
    parts = {name: [name] for name in owned}
    if names:
        parts |= {
            "trunk": ["embedding", "trunk"],
            "trunk layers": ["trunk"],
            "heads": names,
            "all but heads": [name for name in owned if name not in names],
            "unembedding": [name for name in owned if name.startswith("unembedding")],
        }
    for part in training.frozen_parts:
        if part not in parts:
            raise unknown("part", part, parts, "training.frozen")
        for name in parts[part]:
            for parameter in owned.get(name, []):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput(f"training.frozen = {', '.join(training.frozen_parts)}: nothing is left to train")


def _weight(unembedding: Any) -> Tensor:
    if isinstance(unembedding, Tensor):
        return unembedding
    weight = getattr(unembedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise BadInput(f"unembedding: {type(unembedding).__name__} has no weight (V, D)")
    if getattr(unembedding, "bias", None) is not None:
        raise BadInput(f"unembedding: {type(unembedding).__name__} adds a bias to the logits, and no strategy does")
    return weight
