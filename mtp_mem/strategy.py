"""Strategies: the protocol, the table of built-in ones, and how a spec string becomes a strategy.

A spec is `name`, `name:option=value:option=value` or, for a class that is not registered,
`package.module:Class[:option=value...]`. Options are the fields of the strategy's dataclass.
"""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mtp_mem._util import importing_from_here
from mtp_mem.config.schema import Dtype, ModelConfig, Training, Workload
from mtp_mem.config.toml import parse, type_hints
from mtp_mem.errors import BadInput, Missing, contained, one_line, unknown
from mtp_mem.model.head_tree import Heads
from mtp_mem.model.layers import PRODUCT_DTYPES
from mtp_mem.model.losses import LossOptions

BUILTIN = {
    "naive": "mtp_mem.strategies.naive:Naive",
    "sequential": "mtp_mem.strategies.sequential:Sequential",
    "chunked_vocab": "mtp_mem.strategies.chunked_vocab:ChunkedVocab",
    "chunked_tokens": "mtp_mem.strategies.chunked_tokens:ChunkedTokens",
    "checkpointed": "mtp_mem.strategies.checkpointed:Checkpointed",
    "auto": "mtp_mem.strategies.auto:Auto",
    "native": "mtp_mem.strategies.native:Native",
    "liger": "mtp_mem.strategies.liger:Liger",
    "cce": "mtp_mem.strategies.cce:CCE",
    "quack": "mtp_mem.strategies.quack:Quack",
}
"""The strategies that ship with the package; their order is the order of every table and chart."""

GROUP = "mtp_mem.strategies"
"""Entry-point group under which other packages register their strategies."""


@runtime_checkable
class Strategy(Protocol):
    """Runs the heads forward and backward above the cut; see `backward`.

    A class may also have `limits`, a `KernelLimits`; `loss_options`, the names of the `LossOptions` that its loss takes
    (without it: none); and its cost: `flops_factor`, the heads' FLOPs relative to naive's, and `peak_bytes(shape)`, its
    bytes above the cut at the worst moment.
    """

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """Fill `cut.grad` and the `.grad` of every trainable parameter above the cut.

        The gradient is that of sum_i weights[i] * L_i, where L_i is head i's loss with `heads.options`, the mean over
        its valid targets. It is added to whatever `.grad` holds. Parameters that require no gradient keep their `.grad`
        as it was, and so does a cut that requires none. A strategy must not make the host wait for the device and must
        keep no state between steps.

        Args:
            cut: the trunk's output (B, S, D), a leaf, in the model's dtype.
            heads: the heads, their norm and unembedding.
            targets: (n, B, S) int64, IGNORE where there is no target.
            weights: (n,) in the loss dtype, already multiplied by the upstream scale.

        Returns:
            The n losses L_i, detached, (n,) in the loss dtype.
        """
        ...


def available() -> dict[str, str]:
    """Names of the built-in and registered strategies, each with the `module:Class` it stands for, in table order."""
    return BUILTIN | {e.name: e.value for e in entry_points(group=GROUP) if e.name not in BUILTIN}


def load_present(specs: Iterable[str]) -> tuple[dict[str, Strategy], dict[str, str]]:
    """The strategies that can be loaded here, by spec: installed, and with the device they need; why others cannot.

    Raises:
        BadInput: an unknown strategy or option.
    """
    strategies, missing = {}, {}
    for spec in specs:
        try:
            strategies[spec] = load_strategy(spec)
        except Missing as e:
            missing[spec] = str(e)
    return strategies, missing


def loadable() -> list[str]:
    """Names of the strategies that can be loaded here."""
    return list(load_present(available())[0])


def load_strategy(spec: str) -> Strategy:
    """The strategy a spec string describes.

    Raises:
        BadInput: an unknown strategy or option (names the valid ones), a value of the wrong type, or a class that
            cannot be made or has no `backward`.
        Missing: the strategy is known but what it needs is not installed.
    """
    name, rest = _split(spec)
    path = name if ":" in name else BUILTIN.get(name) or available().get(name)
    if path is None:
        raise unknown("strategy", name, [*available(), "package.module:Class"])
    cls = _load_class(path, name)
    try:
        with contained():
            strategy = cls(**_options(cls, name, rest))
    except (BadInput, Missing):
        raise
    except Exception as e:
        raise BadInput(f"strategy {spec!r} cannot be made: {one_line(e)}") from None
    if not isinstance(strategy, Strategy):
        raise BadInput(f"strategy {name!r}: {cls.__name__} has no method backward(cut, heads, targets, weights)")
    return strategy


def strategy_class(name: str) -> type[Any]:
    """The class of a built-in strategy, whether or not what it needs to run is installed."""
    return _load_class(BUILTIN[name], name)


def summary(name: str) -> str:
    """The first line of a strategy's documentation."""
    doc = type(load_strategy(name)).__doc__ or ""
    return doc.strip().split("\n")[0]


def _split(spec: str) -> tuple[str, list[str]]:
    parts = spec.strip().split(":")
    if len(parts) > 1 and "=" not in parts[1]:
        return ":".join(parts[:2]), parts[2:]
    return parts[0], parts[1:]


def _load_class(path: str, name: str) -> type[Any]:
    module, _, attribute = path.partition(":")
    from_here = importing_from_here() if ":" in name else nullcontext()
    try:
        with from_here, contained():
            cls: Any = importlib.import_module(module)
            for part in attribute.split("."):
                cls = getattr(cls, part, None)
    except ModuleNotFoundError as e:
        if name in BUILTIN and (e.name or "").startswith("mtp_mem.strategies"):
            raise Missing(
                "mtp_mem.strategies is not importable: mtp_mem runs from a clone without being installed;"
                " `pip install -e .` in the clone installs it"
            ) from None
        if e.name and not f"{module}.".startswith(f"{e.name}."):
            raise Missing(f"strategy {name!r} needs the package {e.name!r}, which is not installed") from None
        raise BadInput(f"strategy {name!r}: no module {module!r} (looked in the installed packages and here)") from None
    except ImportError as e:
        raise Missing(f"strategy {name!r}: {e}") from None
    except Exception as e:
        raise BadInput(f"strategy {name!r}: importing {module!r}: {one_line(e)}") from None
    if cls is None:
        raise BadInput(f"strategy {name!r}: module {module!r} has no {attribute!r}")
    if not isinstance(cls, type):
        raise BadInput(f"strategy {name!r}: {attribute!r} is no class")
    return cls


def _options(cls: type[Any], name: str, items: list[str]) -> dict[str, Any]:
    valid = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    hints: dict[str, Any] = type_hints(cls) if items else {}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if key not in valid:
            raise unknown("option", key, valid, f"strategy {name!r}")
        if not equals:
            raise BadInput(f"strategy {name!r}: option {key!r} needs a value: {name}:{key}=...")
        options[key] = parse(hints[key], text, f"strategy {name!r}: {key}")
    return options


LIBRARY_CHUNK = 256
"""The least number of tokens that a library's kernel is assumed to have in a chunk where no size is asked for."""


@dataclass(frozen=True, kw_only=True)
class KernelLimits:
    """What a strategy's kernel cannot do, and what of the protocol it does not keep; plain torch has no such limits.

    A strategy's class states them as `limits = KernelLimits(...)`.

    Attributes:
        dtypes: dtypes of the rows (N, D) in which the kernel runs and is exact enough; empty: all.
        multiple_of: what the tokens N, the width D and the vocabulary V must be multiples of.
        waits: a clause that says why the host waits for the device; empty: it does not.
        rounds_loss: whether the kernel returns the loss's value in the model's dtype; `verify` allows for that in
            losses, never in a gradient.
        error_factor: in low precision its gradients may have this many times the error allowed to other strategies.
        not_predicted: why its bytes on CUDA cannot be predicted without a GPU; empty: they can.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    multiple_of: int = 1
    waits: str = ""
    rounds_loss: bool = False
    error_factor: float = 1.0
    not_predicted: str = ""

    @property
    def computes(self) -> str:
        """A clause that names the dtypes of `dtypes`."""
        return f"computes in {', '.join(map(_name, self.dtypes))}"

    def takes(self, dtype: Dtype) -> bool:
        """Whether the kernel runs in a model of this dtype."""
        return not self.dtypes or PRODUCT_DTYPES[dtype] in self.dtypes

    def loss_rounding(self, dtype: Dtype, tokens: int, chunk: int | None = None) -> float:
        """The relative error that a loss may have beyond the usual bound: a unit in the last place for each chunk.

        `chunk`: tokens in one; None for the library's choice.
        """
        chunks = -(-tokens // (chunk or LIBRARY_CHUNK))
        return chunks * torch.finfo(PRODUCT_DTYPES[dtype]).eps if self.rounds_loss else 0.0

    def refusal(self, dtype: torch.dtype, *, N: int, D: int, V: int) -> str:
        """A clause: why the kernel cannot run rows (N, D) of this dtype with a (V, D) unembedding; empty if it can."""
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.computes}, not in {_name(dtype)}"
        odd = [f"{name} = {size}" for name, size in (("N", N), ("D", D), ("V", V)) if size % self.multiple_of]
        return f"needs multiples of {self.multiple_of}, not {', '.join(odd)}" if odd else ""


def kernel_limits(strategy: object) -> KernelLimits:
    """The limits that the strategy's class states; those of plain torch where it states none."""
    limits = getattr(strategy, "limits", KernelLimits())
    return limits if isinstance(limits, KernelLimits) else KernelLimits()


COMPUTES_LOSS = ("backward", "loss_backward", "loss", "kernel_loss")
"""A class that defines one of these methods has a loss of its own, and does not inherit `loss_options`."""


def loss_options(strategy: object) -> tuple[str, ...]:
    """Names of the loss options that the strategy takes, as its class states, or the base class whose loss it uses."""
    for cls in type(strategy).__mro__:
        if "loss_options" in vars(cls):
            return tuple(strategy.loss_options)  # type: ignore[attr-defined]
        if any(method in vars(cls) for method in COMPUTES_LOSS):
            return ()
    return ()


def loss_refusal(strategy: object, options: LossOptions) -> str:
    """A clause: why the strategy cannot run with these options of the loss; empty where it can."""
    known = loss_options(strategy)
    missing = [option for option in options.used if option not in known]
    if not missing:
        return ""
    able = [name for name in BUILTIN if set(missing) <= set(strategy_class(name).loss_options)]
    return f"has no {' and no '.join(missing)} in its loss; those that have: {', '.join(able)}"


def require_loss(strategy: object, options: LossOptions) -> None:
    """Check that the strategy can run with these options of the loss.

    Raises:
        BadInput: it cannot; names the strategy and the option that it does not take.
    """
    if options.used and (why := loss_refusal(strategy, options)):
        named = {path.partition(":")[2]: name for name, path in BUILTIN.items()}
        cls = type(strategy).__name__
        raise BadInput(f"strategy {named.get(cls, cls)!r} {why}")


def refusal(strategy: object, config: ModelConfig, workload: Workload, training: Training) -> str:
    """A clause: why the strategy cannot run this model, workload and training setup; empty where it can."""
    dtype, tokens = PRODUCT_DTYPES[workload.dtype], workload.tokens
    options = LossOptions(
        softcap=config.logit_softcap, label_smoothing=training.label_smoothing, z_loss=training.z_loss
    )
    shape = kernel_limits(strategy).refusal(dtype, N=tokens, D=config.dim, V=config.vocab_size)
    return shape or loss_refusal(strategy, options)


def require(strategies: Mapping[str, object], config: ModelConfig, workload: Workload, training: Training) -> None:
    """Check that every strategy, keyed by its spec, can run this model, workload and training setup.

    Raises:
        BadInput: names the first one that cannot, and why.
    """
    for spec, strategy in strategies.items():
        if why := refusal(strategy, config, workload, training):
            raise BadInput(f"strategy {spec!r} {why}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
