"""Operators on tensors without data, worked out once for each kind of input.

On device meta an operator only says which shape, strides and dtype its result has. torch works that out in Python, half
a millisecond each time; a model repeats the same layer dozens of times, and every strategy repeats the model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Recipe = tuple[Any, ...] | int | str | None
"""(size, stride, dtype) of a new tensor; the place of an input, or its keyword, where that is returned; None."""


class MetaResults(TorchDispatchMode):
    """Runs operators on meta tensors, and keeps what came out for inputs of the same shapes, strides and dtypes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recipes: dict[Any, tuple[bool, list[Recipe]] | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in Tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the operator returns."""
        try:
            # By identity: an operator's own hash is Python, and it lives as long as the process.
            key = (id(func), _described(args), _described(tuple(kwargs.items())) if kwargs else ())
            known = self._recipes.get(key, ...)
        except (_NotMeta, TypeError):  # it has data, or an argument that is no key
            return func(*args, **kwargs)
        if known is ...:
            if func.is_view:
                self._recipes[key] = None
                return func(*args, **kwargs)
            out = func(*args, **kwargs)
            # An operator that changed the shape of what it was given has another key now.
            unchanged = key[1] == _described(args)
            self._recipes[key] = _recipes(out, args, kwargs) if unchanged else None
            return out
        if known is None:
            return func(*args, **kwargs)
        alone, recipes = known
        if alone:
            return _result(recipes[0], args, kwargs)
        return tuple([_result(recipe, args, kwargs) for recipe in recipes])


class _NotMeta(Exception):
    pass


def _described(values: tuple[Any, ...] | list[Any]) -> tuple[Any, ...]:
    """What a result may depend on; equal values of different types are told apart."""
    described: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                raise _NotMeta
            described.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            described.append(_described(value))
        else:
            described.append((value.__class__, value))
    return tuple(described)


def _recipes(out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, list[Recipe]] | None:
    """How to make the results again; None where they cannot be made without the operator."""
    alone = isinstance(out, Tensor)
    results = [out] if alone else list(out) if isinstance(out, tuple) else None
    if results is None:
        return None
    given: dict[int, int | str] = {id(value): i for i, value in enumerate(args)}
    given |= {id(value): name for name, value in kwargs.items()}
    inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, tuple(kwargs.values())))}
    recipes: list[Recipe] = []
    for result in results:
        if result is None or id(result) in given:
            recipes.append(None if result is None else given[id(result)])
            continue
        if not isinstance(result, Tensor) or not result.is_meta:
            return None
        size, stride = tuple(result.shape), result.stride()
        storage = result.untyped_storage()
        whole = torch.empty_strided(size, stride, dtype=result.dtype, device="meta").untyped_storage().nbytes()
        if storage._cdata in inputs or storage.nbytes() != whole or result.storage_offset():
            return None
        inputs.add(storage._cdata)
        recipes.append((size, stride, result.dtype))
    return alone, recipes


def _result(recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(recipe, tuple):
        size, stride, dtype = recipe
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    if recipe is None:
        return None
    return args[recipe] if isinstance(recipe, int) else kwargs[recipe]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
