"""Operators on tensors without data, worked out once for each kind of input.

On device meta an operator only says which shape, strides and dtype its result has. torch works that out in Python, half
a millisecond each time; a model repeats the same layer dozens of times, and every strategy repeats the model.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Result = tuple[Any, ...] | int | str | None
"""(size, stride, dtype) of a new tensor; the place of an input, or its keyword, where that is returned; None."""


class Recipe(NamedTuple):
    """How to make an operator's results again.

    Attributes:
        results: each; None where only the operator itself can make them.
        alone: one tensor, not a tuple.
        makes: whether a tensor in memory of its own may be among them.
    """

    results: list[Result] | None
    alone: bool = True
    makes: bool = True


_AGAIN = Recipe(None)


class MetaResults(TorchDispatchMode):
    """Runs operators on meta tensors, and keeps what came out for inputs of the same shapes, strides and dtypes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recipes: dict[Any, Recipe] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in Tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})[0]

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """What the operator returns, and whether a tensor in memory of its own may be among it."""
        try:
            # By identity: an operator's own hash is Python, and it lives as long as the process.
            key = (id(func), _described(args), _described(tuple(kwargs.items())) if kwargs else ())
            recipe = self._recipes.get(key)
        except (_NotMeta, TypeError):  # it has data, or an argument that is no key
            return func(*args, **kwargs), True
        if recipe is None:
            out = func(*args, **kwargs)
            # An operator that changed the shape of what it was given has another key now.
            unchanged = key[1] == _described(args)
            self._recipes[key] = _recipe(func, out, args, kwargs) if unchanged else _AGAIN
            return out, True
        if recipe.results is None:
            return func(*args, **kwargs), recipe.makes
        if recipe.alone:
            return _result(recipe.results[0], args, kwargs), recipe.makes
        return tuple([_result(result, args, kwargs) for result in recipe.results]), recipe.makes


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


def _recipe(func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recipe:
    if func.is_view:
        return Recipe(None, makes=False)
    alone = isinstance(out, Tensor)
    outputs = [out] if alone else list(out) if isinstance(out, tuple) else None
    if outputs is None:
        return _AGAIN
    given: dict[int, int | str] = {id(value): i for i, value in enumerate(args)}
    given |= {id(value): name for name, value in kwargs.items()}
    inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, tuple(kwargs.values())))}
    results: list[Result] = []
    for output in outputs:
        if output is None or id(output) in given:
            results.append(None if output is None else given[id(output)])
            continue
        if not isinstance(output, Tensor) or not output.is_meta:
            return _AGAIN
        size, stride = tuple(output.shape), output.stride()
        storage = output.untyped_storage()
        whole = torch.empty_strided(size, stride, dtype=output.dtype, device="meta").untyped_storage().nbytes()
        if storage._cdata in inputs or storage.nbytes() != whole or output.storage_offset():
            return _AGAIN
        inputs.add(storage._cdata)
        results.append((size, stride, output.dtype))
    return Recipe(results, alone=alone, makes=any(isinstance(result, tuple) for result in results))


def _result(recipe: Result, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
