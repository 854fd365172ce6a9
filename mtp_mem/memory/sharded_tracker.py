"""The tracker for a model that FSDP2 has sharded: gathered parameters come and go without any operator.

FSDP2 frees and refills gathered parameters by resizing their storages, which no dispatch mode sees. So the tracker
wraps `resize_` while it is active. A DTensor's own storage claims the whole tensor's size but has no memory: the
storage of its shard is counted instead.
"""

import sys
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtp_mem.distributed.seam import local
from mtp_mem.memory.trace import Category, Event, Storage
from mtp_mem.memory.tracker import Named, Tracker

FSDP_FILES = ("_fsdp_collectives.py", "_fsdp_param_group.py", "_fsdp_param.py")
"""FSDP2's files: tensors that their code makes are communication buffers."""


class ShardedTracker(Tracker):
    """Records every storage that operators make while it is active, and every one that FSDP2 resizes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._plain_resize: list[Any] = []  # a stack: for an operator that is written in Python it is entered again

    def resident(self, category: Category, tensors: Named) -> None:
        """Count tensors that live before the step; of DTensors their shards."""
        super().resident(category, ((name, local(tensor)) for name, tensor in tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # the DTensor unwraps itself, and the operators on its shard are seen
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __enter__(self) -> "ShardedTracker":
        plain, seen = torch.UntypedStorage.resize_, self._resized

        def resize_(storage: torch.UntypedStorage, nbytes: int) -> Any:
            before = storage.nbytes()
            out = plain(storage, nbytes)
            seen(storage, before, nbytes)
            return out

        self._plain_resize.append(plain)
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._plain_resize.pop()  # type: ignore[method-assign]
        super().__exit__(*exc)

    def _new(self, tensor: Tensor, category: Category | None, op: str) -> int | None:
        # Not counted: gloo copies what it reduces, and splits the copy. NCCL has buffers of another kind.
        return None if op == "split.Tensor" and _in_fsdp() else super()._new(tensor, category, op)

    def _resized(self, storage: torch.UntypedStorage, before: int, after: int) -> None:
        address = storage._cdata
        key = self._keys.get(address)
        if before and not after and key in self._live:
            del self._keys[address]
            self._live.discard(key)
            self.trace.events.append(Event("free", key))
        elif after and not before and key is None:
            key = len(self.trace.storages)
            self._keys[address] = key
            self._live.add(key)
            self.trace.storages[key] = Storage(
                after, "gathered parameters", self._phase, "resize_", (after,), "uint8", "gathered"
            )
            self.trace.events.append(Event("alloc", key))
            self._endings[key] = weakref.ref(storage, partial(self._freed, key, address))

    def _category(self, tensor: Tensor, shape: tuple[int, ...], op: str) -> Category:
        return "communication buffers" if _in_fsdp() else super()._category(tensor, shape, op)

    def _gradient(self, parameter: Tensor) -> Tensor | None:
        return None if parameter.grad is None else local(parameter.grad)


def _in_fsdp() -> bool:
    """Whether FSDP2's own code issued the operator: one of the nearest frames is in one of its files."""
    frame = sys._getframe(3)
    for _ in range(8):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(FSDP_FILES):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
