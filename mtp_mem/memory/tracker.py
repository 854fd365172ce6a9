"""Live tensor bytes of a real or fake step, to the byte: one dispatch mode and a finalizer per storage.

It counts storages, not tensors (a view is free), holds no strong reference to any, and undoes the one thing a dispatch
mode changes: with any mode active, autograd sums gradients out of place where it would otherwise add into a buffer that
only the engine holds (torch/csrc/autograd/input_buffer.cpp). Such a sum is recognised, and the new storage takes over
the block of the old one.

The recognition compares reference counts with those of a known engine-only buffer. They are internals of torch, so they
are calibrated with a toy backward before use, and a torch on which that fails is refused.
"""

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._library import custom_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtp_mem.errors import Missing
from mtp_mem.memory.trace import Buffers, Category, Event, Storage, Trace
from mtp_mem.memory.unseen import refuse_compiled
from mtp_mem.model.optimizers import optimizer_state
from mtp_mem.step import TrainingStep

_ADD = torch.ops.aten.add.Tensor
# Reading a fake tensor's `.device` calls this operator (another tensor's does not): half of all calls.
_DEVICE = torch.ops.prim.device.default
# Frames that stand between an operator and whoever issued it, on the way through a dispatch mode.
_PLUMBING = {"__torch_dispatch__", "_fn", "inner", "wrapper", "handle_torch_function"}

EMPTY = ("empty", "new_empty", "zeros", "new_zeros")
"""Operators that make a tensor without any input tensor's values: buffers, for sums say."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
"""Operators that cuBLAS runs on CUDA."""
LOOKED_AT = 64
"""Storages of each of the heads' phases whose callers are searched for compiled code, which makes some of the first."""

Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, bool]]
"""(operator, args, kwargs) -> its result, and whether new memory may be among it."""
Holders = tuple[int, int, int]
"""See `_holders`."""
Named = Iterable[tuple[str, Tensor]]
"""Tensors with their names, as `named_parameters()` gives them."""


class Tracker(TorchDispatchMode):
    """Records every storage that operators make while it is active.

    Args:
        vocab_size: V, to tell logits from hidden states.
        dim: D, likewise.
        parameters: by name; their `.grad` is to be recognised as gradients.
        kernels: adds the buffers that CUDA kernels take inside an operator, by operator.
        run: runs an operator, and says whether the result may lie in new memory; by default the operator itself.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        parameters: Named,
        kernels: Mapping[Any, Buffers] | None = None,
        run: Run | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._engine_only = calibrate()
        self._vocab_size, self._dim = vocab_size, dim
        self._kernels = kernels or {}
        self._run: Run = run or (lambda func, args, kwargs: (func(*args, **kwargs), True))
        self._parameters: list[tuple[str, weakref.ref[Tensor]]] = []
        self._parameter_shapes: set[tuple[int, ...]] = set()
        self.watch(parameters)
        self._phase = "before the step"
        self._in_loss = False  # whether the phase is a head's loss
        self._logits_may_be = False  # whether it is that, or the joint backward of all heads
        self._square = vocab_size == dim  # logits (N, V) are as wide as hidden states
        self._given_logits = False  # where V = D: whether the running operator's inputs are logits
        self._keys: dict[int, int] = {}  # address of a live storage -> its key; only addresses are reused
        self._live: set[int] = set()
        self._endings: dict[int, weakref.ref[Any]] = {}  # by key; their callbacks run when a storage ends
        # By the operator's `id` (its own hash is slow, for it is Python code): its name, the buffers of its kernel,
        # whether it is written in Python, whether it is a matrix product.
        self._operators: dict[int, tuple[str, Buffers | None, bool, bool]] = {}
        self._looked_at = 0  # storages of this phase whose makers were looked at

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would put two Python frames around every operator, to keep dynamo out of what it never compiles.
        return False

    def resident(self, category: Category, tensors: Named) -> None:
        """Count tensors that live before the step."""
        for name, tensor in tensors:
            key = self._new(tensor, category, "")
            if key is not None:
                self.trace.resident.append(key)
                self.trace.storages[key].name = name

    def watch(self, parameters: Named) -> None:
        """Recognise the `.grad` of these parameters as gradients."""
        for name, parameter in parameters:
            self._parameters.append((name, weakref.ref(parameter)))
            self._parameter_shapes.add(tuple(parameter.shape))

    def step_since(self, begun: int, warmed_up: int) -> Trace:
        """The last step of several; what the steps before it left behind counts as live before it.

        Args:
            begun: index of the event with which the step begins.
            warmed_up: index of the event with which the steps before it began.
        """
        trace = self.trace
        warm_up = trace.events[warmed_up:begun]
        new = {event.key for event in warm_up if event.kind != "free"}
        before = [event for event in warm_up if event.key in new]
        events = before + trace.events[begun:]
        products = [(at - begun + len(before), backward) for at, backward in trace.products if at >= begun]
        return Trace(trace.storages, trace.resident, events, len(before), trace.made_by_first_step, products)

    def step_alone(self, begun: int) -> Trace:
        """One step of several: whatever was live as it began, at event `begun`, counts as live before it.

        What is freed later, the model for one, is no part of it.
        """
        return dataclasses.replace(self.trace, start=begun).step()

    def phase(self, name: str) -> None:
        """A phase of the step begins."""
        self._name_gradients()
        self._phase, self._looked_at = name, 0
        self._in_loss = name.endswith("loss")
        self._logits_may_be = self._in_loss or name == "heads backward"

    def __exit__(self, *exc: Any) -> None:
        """Stop recording."""
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._name_gradients()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        operator = self._operators.get(id(func))
        if operator is None:
            name = str(func).removeprefix("aten.")
            product = name.partition(".")[0] in PRODUCTS
            operator = (name, self._kernels.get(func), func.namespace == "torch_nn", product)
            self._operators[id(func)] = operator
        name, buffers, in_python, product = operator
        if in_python:
            with self:
                return _python_body(func)(*args, **(kwargs or {}))
        out, makes = self._run(func, args, kwargs or {})
        if makes:
            self._count(func, name, args, out)
        if product:
            self.trace.products.append((len(self.trace.events), torch._C._current_graph_task_id() != -1))
        if buffers is not None:
            self._kernel_buffers(name, buffers(args))
        return out

    def _count(self, func: Any, name: str, args: tuple[Any, ...], out: Any) -> None:
        self._given_logits = self._square and any(map(self._is_logits, args))
        old = self._moved_from(args[0], out) if func is _ADD and _issued_by_engine() else None
        for tensor in (out,) if isinstance(out, Tensor) else () if out is None else tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = self._new(tensor, None, name)
                if key is not None:
                    if old is None:
                        self.trace.events.append(Event("alloc", key))
                    else:
                        self._live.discard(old)
                        self.trace.events.append(Event("move", key, old))

    def _kernel_buffers(self, name: str, sizes: list[int]) -> None:
        keys = []
        for nbytes in sizes:
            keys.append(len(self.trace.storages))
            self.trace.storages[keys[-1]] = Storage(nbytes, "workspace", self._phase, name, (nbytes,), "uint8")
            self.trace.events.append(Event("alloc", keys[-1]))
        self.trace.events.extend(Event("free", key) for key in keys)

    def _new(self, tensor: Tensor, category: Category | None, op: str) -> int | None:
        """Start counting the tensor's storage; its key, or None if it is counted already or empty."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._keys or (nbytes := storage.nbytes()) == 0:
            return None
        if self._looked_at < LOOKED_AT and self._phase.startswith("head"):
            self._looked_at += 1
            refuse_compiled()
        storages, shape = self.trace.storages, tuple(tensor.shape)
        key = len(storages)
        self._keys[address] = key
        self._live.add(key)
        category = category or self._category(tensor, shape, op)
        storages[key] = Storage(nbytes, category, self._phase, op, shape, _dtype_name(tensor.dtype))
        self._endings[key] = weakref.ref(storage, partial(self._freed, key, address))
        return key

    def _freed(self, key: int, address: int, _ending: Any = None) -> None:
        del self._endings[key]
        if self._keys.get(address) == key:
            del self._keys[address]
        if key in self._live:
            self._live.remove(key)
            self.trace.events.append(Event("free", key))

    def _moved_from(self, old: Tensor, new: Tensor) -> int | None:
        """The key of the buffer that plain autograd would have added into, or None where it would make a new one."""
        if (
            old._is_view()
            or old.untyped_storage().nbytes() != new.untyped_storage().nbytes()
            or any(have > limit for have, limit in zip(_holders(old), self._engine_only, strict=True))
        ):
            return None
        key = self._keys.get(old.untyped_storage()._cdata)
        return key if key in self._live else None

    def _category(self, tensor: Tensor, shape: tuple[int, ...], op: str) -> Category:
        in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        if in_backward and shape in self._parameter_shapes:
            return "gradients"
        if self._in_loss and shape == (self._vocab_size, self._dim) and op.startswith(EMPTY):
            return "gradients"  # what a strategy sums the unembedding's gradient in
        phase = self._phase
        if self._logits_may_be:
            # A slab of the vocabulary has neither width, the full logits have V, hidden states and their norms D.
            # Slabs are made by a loss's own code; what autograd's formulas make here is a recomputed layer's gradients.
            if shape[-1:] == (self._vocab_size,) and (not self._square or self._makes_logits(shape, op, in_backward)):
                return "logits"
            slab = self._in_loss and len(shape) >= 2 and shape[-1] not in (1, self._dim) and tensor.is_floating_point()
            if slab and not _issued_by_engine(4):
                return "logits"
        if phase in ("clip", "optimizer"):
            return "other"
        if in_backward:
            return "hidden-state gradients"
        return "trunk activations" if phase == "trunk forward" else "head activations"

    def _makes_logits(self, shape: tuple[int, ...], op: str, in_backward: bool) -> bool:
        """Where V = D, what the operator does tells logits from hidden states.

        Logits are made by a product of the forward pass, or written into a buffer (N, C). The results of all other
        operators are logits if their inputs are.
        """
        name = op.partition(".")[0]
        if name in PRODUCTS:
            return not in_backward
        if name in EMPTY[:2]:
            return len(shape) == 2
        return self._given_logits

    def _is_logits(self, argument: Any) -> bool:
        key = self._keys.get(argument.untyped_storage()._cdata) if isinstance(argument, Tensor) else None
        return key is not None and self.trace.storages[key].category == "logits"

    def _name_gradients(self) -> None:
        for name, reference in self._parameters:
            parameter = reference()
            gradient = None if parameter is None else self._gradient(parameter)
            if gradient is not None:
                key = self._keys.get(gradient.untyped_storage()._cdata)
                if key is not None:
                    storage = self.trace.storages[key]
                    storage.category, storage.name = "gradients", f"{name}.grad"

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        return parameter.grad


def between_steps(step: TrainingStep) -> Iterator[tuple[Category, str, Tensor]]:
    """Category, name and tensor of all that lives between steps: gradients too, where the last step left them."""
    parameters = list(step.model.named_parameters())
    yield from (("parameters", name, parameter) for name, parameter in parameters)
    yield from (("gradients", f"{name}.grad", p.grad) for name, p in parameters if p.grad is not None)
    yield from (("optimizer", name, tensor) for name, tensor in optimizer_state(step.model, step.optimizer))
    yield from (("other", "tokens", step.batch.tokens), ("other", "targets", step.batch.targets))
    yield from (("other", name, buffer) for name, buffer in step.model.named_buffers())


def _python_body(func: Any) -> Callable[..., Any]:
    """What runs inside one of torch's operators that are written in Python (namespace torch_nn): its tensors count too.

    Only `linear_cross_entropy` has one. Without this its chunk of logits would be in no trace: to a dispatch mode such
    an operator is a single call.
    """
    return custom_ops.OPDEFS[func._schema.name]._init_fn  # type: ignore[no-any-return]


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _issued_by_engine(depth: int = 2) -> bool:
    """Whether C++ autograd itself issued the operator: the nearest Python frame is the engine's entry.

    Args:
        depth: number of this package's frames above the frame that issued the operator, without torch's in between.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(depth)
    while frame is not None and frame.f_code.co_name in _PLUMBING:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _holders(tensor: Tensor) -> Holders:
    """Reference counts: of the tensor in C++, of its storage in C++, and of its Python object."""
    storage = tensor.untyped_storage()
    return (
        tensor._use_count(),  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(tensor),
    )


def calibrate() -> Holders:
    """What `_holders` says of a gradient buffer that only the engine holds, on this torch.

    Raises:
        Missing: this torch does not sum gradients the way the tracker can recognise.
    """
    seen: list[Holders] = []

    class Probe(TorchDispatchMode):
        _should_skip_dynamo = Tracker._should_skip_dynamo  # the frames between count as holders

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is _ADD and _issued_by_engine():
                self.look(args[0])
            return func(*args, **(kwargs or {}))

        def look(self, old: Tensor) -> None:  # as deep as Tracker._moved_from
            if not old._is_view():
                seen.append(_holders(old))

    weight = torch.ones(2, 2, requires_grad=True)
    with Probe():  # type: ignore[no-untyped-call]
        ((weight * 2).sum() + (weight * 3).sum()).backward()
    if len(seen) != 1:
        raise Missing(
            f"the memory tracker does not know how torch {torch.__version__} sums gradients ({seen});"
            " it was written for torch 2.11 to 2.14"
        )
    return seen[0]
