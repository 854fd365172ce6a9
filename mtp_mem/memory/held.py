"""What a strategy holds on to between steps, as far as it can be reached from the strategy itself."""

import functools
import gc
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

LEAVES = (type, ModuleType, BuiltinFunctionType, CodeType, FrameType, str, int, float, complex, bool, type(None))
MOST = 100_000
"""Objects that are looked at: a strategy that holds more is held in part."""


def held_tensors(strategy: object) -> list[Tensor]:
    """Tensors that it holds in attributes, containers or closures, with their gradients."""
    tensors = [value for value in _reachable(strategy) if isinstance(value, Tensor)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


def held_arrays(strategy: object) -> int:
    """Bytes that it holds in NumPy's arrays, Python's arrays and byte strings."""
    sizes = {}
    for value in _reachable(strategy):
        if not isinstance(value, Tensor):
            try:
                sizes[id(value)] = memoryview(value).nbytes
            except (TypeError, ValueError, BufferError):  # has no buffer
                continue
    return sum(sizes.values())


def _reachable(root: object) -> Iterator[Any]:
    """Every object, once; classes, modules and the global names of functions are not the strategy's own."""
    pending, seen = [root], {id(root)}
    while pending and len(seen) < MOST:
        value = pending.pop()
        yield value
        if isinstance(value, FunctionType):
            inside: list[Any] = [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)]
        elif isinstance(value, functools.partial):
            inside = [value.func, value.args, value.keywords]
        elif isinstance(value, Tensor):
            inside = [vars(value)]
        elif isinstance(value, dict) and "__builtins__" in value:
            continue
        else:
            inside = gc.get_referents(value)
        for one in inside:
            if id(one) not in seen and not isinstance(one, LEAVES):
                seen.add(id(one))
                pending.append(one)
