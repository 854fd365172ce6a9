"""What the protocol forbids besides a wrong gradient; `verify` runs every strategy under this watch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_mem.errors import BrokenContract
from mtp_mem.model.head_tree import Heads
from mtp_mem.model.losses import loss_dtype
from mtp_mem.strategy import Strategy, loss_options
from mtp_mem.verification.global_state import restored
from mtp_mem.verification.gradient_error import relative_error

NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32)
HOOKED = 0.02
"""The largest relative difference allowed between the gradients that hooks returned and `.grad`; bf16 rounds sums."""
LARGER = 64
"""The storage of the returned losses may be this many times as large as the losses, at most."""


@dataclass(frozen=True)
class Watched:
    """A strategy whose every call is checked against the protocol; without `may_sync` also for waiting for the device.

    Raises:
        BrokenContract: from `backward`; names the clause that is broken.
    """

    inner: Strategy
    parameters: Mapping[str, Tensor]
    may_sync: bool = True

    @property
    def loss_options(self) -> tuple[str, ...]:
        """The loss options of the strategy inside."""
        return loss_options(self.inner)

    def backward(self, cut: Tensor, heads: Heads, targets: Tensor, weights: Tensor) -> Tensor:
        """As the strategy inside."""
        given = {"the cut's values": cut, "the targets it was given": targets, "the weights it was given": weights}
        before = {name: (p.grad, _address(p.grad)) for name, p in self.parameters.items()}
        with restored() as changed, unchanged(given), nullcontext() if self.may_sync else on_a_device():
            losses: Any = self.inner.backward(cut, heads, targets, weights)
        if changed:
            raise BrokenContract(f"leaves {changed[0]} changed")
        if not isinstance(losses, Tensor) or losses.shape != weights.shape:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise BrokenContract(f"returns {shape}, not the n losses {tuple(weights.shape)}")
        if losses.requires_grad:
            raise BrokenContract("returns losses that are not detached")
        if losses.dtype != loss_dtype(cut.dtype):
            raise BrokenContract(f"returns losses in {losses.dtype}, not in {loss_dtype(cut.dtype)}")
        if losses.untyped_storage().nbytes() > LARGER * losses.numel() * losses.itemsize:
            nbytes = losses.untyped_storage().nbytes()
            raise BrokenContract(f"returns losses as a part of {nbytes:,} bytes, which live as long as the losses")
        if cut.requires_grad and cut.grad is None:
            raise BrokenContract("leaves cut.grad empty")
        if not cut.requires_grad and cut.grad is not None:
            raise BrokenContract("fills cut.grad of a cut that requires none")
        owners = {"the cut": cut, "the losses": losses, "the targets": targets, "the weights": weights}
        new: dict[str, Tensor | None] = {}
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is not None and gradient.dtype != parameter.dtype:
                raise BrokenContract(f"leaves {name}.grad in {gradient.dtype}, not in {parameter.dtype}")
            existing, address = before[name]
            if existing is not None and (gradient is not existing or _address(gradient) != address):
                raise BrokenContract(f"leaves another tensor in {name}.grad, instead of adding to what is there")
            if existing is None:
                new[f"{name}.grad"] = gradient
        stand_alone({"cut.grad": cut.grad, **new}, {**owners, **self.parameters})
        return losses


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.untyped_storage().data_ptr()


def stand_alone(gradients: Mapping[str, Tensor | None], owners: Mapping[str, Tensor]) -> None:
    """Check that every gradient has memory of its own and carries no graph.

    Args:
        gradients: by name; those that were made since the step began.
        owners: by name; other tensors, in whose memory no gradient may lie.

    Raises:
        BrokenContract: names the first that does not.
    """
    seen = {tensor.untyped_storage().data_ptr(): name for name, tensor in owners.items() if tensor.numel()}
    for name, gradient in gradients.items():
        if gradient is None or not gradient.numel():
            continue
        if gradient.requires_grad:
            raise BrokenContract(f"leaves a graph on {name} (create_graph)")
        storage = gradient.untyped_storage()
        if storage.data_ptr() in seen:
            raise BrokenContract(f"leaves {name} sharing memory with {seen[storage.data_ptr()]}")
        seen[storage.data_ptr()] = name
        if storage.nbytes() != gradient.numel() * gradient.itemsize:
            raise BrokenContract(f"leaves {name} as a part of a larger buffer")


@contextmanager
def counted_hooks(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which hooks on parameters must see every gradient and decide what is added, as in plain autograd.

    The hooks are registered here and halve each gradient.

    Args:
        parameters: by name, with empty `.grad`.

    Raises:
        BrokenContract: names the first parameter whose hooks never ran, or saw another gradient than it got.
    """
    given: dict[str, Tensor] = {}  # by parameter: half of all that its hook saw, in fp64
    accumulated = dict.fromkeys(parameters, 0)

    def hook(name: str, gradient: Tensor) -> Tensor:
        half = gradient * 0.5
        given[name] = given[name] + half.double() if name in given else half.double()
        return half

    def after(name: str, _parameter: Tensor) -> None:
        accumulated[name] += 1

    handles = []
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(partial(hook, name)))
            handles.append(parameter.register_post_accumulate_grad_hook(partial(after, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        if name not in given or not accumulated[name]:
            kind = "post-accumulate hook" if name in given else "hook"
            raise BrokenContract(f"the {kind} of {name} never ran: its gradient went past autograd")
        if relative_error([parameter.grad], [given[name]]) > HOOKED:
            raise BrokenContract(f"the hook of {name} saw another gradient than {name} got, or its result was lost")


@contextmanager
def unchanged(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which these tensors may change in `.grad` only; other changes are undone before the next strategy.

    Raises:
        BrokenContract: names the first one that changed, unless the block itself raises.
    """
    before = [(name, tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()]
    changed = []
    try:
        yield
    finally:
        for name, tensor, values, trainable in before:
            if tensor.requires_grad != trainable:
                changed.append(f"leaves {name} {'frozen' if trainable else 'trainable'}, which it was not before")
                tensor.requires_grad_(trainable)
            if not put_back(tensor, values):
                changed.append(f"changes {name}")
    if changed:
        raise BrokenContract(changed[0])


def put_back(tensor: Tensor, values: Tensor) -> bool:
    """Restore the tensor's earlier dtype, shape and values; returns whether it still had them.

    Args:
        tensor: a leaf.
        values: what it held before, on any device.
    """
    with torch.no_grad():
        if (tensor.dtype, tensor.shape) != (values.dtype, values.shape):
            tensor.data = values.to(tensor.device, copy=True)
            return False
        extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        needed = (int(tensor.storage_offset()) + extent) * tensor.itemsize * bool(tensor.numel())
        same = tensor.untyped_storage().nbytes() >= needed
        if not same:
            tensor.untyped_storage().resize_(needed)
        values = values.to(tensor.device)
        if same and torch.equal(tensor, values):
            return True
        same = same and bool(values.isnan().any()) and torch.allclose(tensor, values, 0, 0, equal_nan=True)
        tensor.copy_(values)
    return same


@contextmanager
def on_a_device() -> Iterator[None]:
    """A block that raises for what would go wrong on a device at full size, on a CPU and at small size as well.

    That is: operators and methods that make the host wait for the device, and offsets in 32 bits.

    Raises:
        BrokenContract: names the operator or the method.
    """
    with _Operators(), _NoSyncMethods():  # type: ignore[no-untyped-call]
        yield


class _Operators(TorchDispatchMode):
    """Refuses operators whose result, or its size, the host has to know, and products of integers up to 32 bits."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        waits = {
            *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default),
            *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
            *(aten.bincount.default, aten.repeat_interleave.Tensor),
        }
        by_mask = func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default) and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if func in waits or by_mask:
            raise BrokenContract(f"synchronises with the device ({func})")
        out = func(*args, **(kwargs or {}))
        if func in (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar) and out.dtype in NARROW:
            raise BrokenContract(f"multiplies integers in {out.dtype}: an offset of row times V wraps at 2**31 logits")
        return out


class _NoSyncMethods(TorchFunctionMode):
    """Refuses methods that copy to the host: on a CPU they run no operator that `_Operators` could see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        methods: tuple[Callable[..., Any], ...] = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
        to_host = func is Tensor.to and any(
            isinstance(value, str) and value == "cpu" for value in (*args[1:], *(kwargs or {}).values())
        )
        if func in methods or to_host:
            raise BrokenContract(f"synchronises with the device (Tensor.{func.__name__})")
        return func(*args, **(kwargs or {}))
