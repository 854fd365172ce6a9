"""Operators on tensors without data, worked out once for each kind of input.

On device meta an operator only says which shape, strides and dtype its result has. torch works that out in Python, half
a millisecond each time; a model repeats the same layer dozens of times, and every strategy repeats the model.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class View(NamedTuple):
    """A view of the first input: size, strides, and its offset from the input's own, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    begins: int


Result = tuple[Any, ...] | View | int | str | None
"""(size, stride, dtype) of a new tensor; a view; or the index or keyword of the argument that is returned itself."""


class Recipe(NamedTuple):
    """How to make an operator's results again.

    Attributes:
        results: one entry for each result; None where only the operator itself can make them.
        alone: whether the operator returns one tensor, not a tuple.
        makes: whether a tensor with memory of its own may be among the results.
    """

    results: list[Result] | None
    alone: bool = True
    makes: bool = True


_AGAIN = Recipe(None)


class MetaResults(TorchDispatchMode):
    """Runs operators on meta tensors, and keeps what came out for inputs of the same shapes, strides and dtypes.

    Args:
        fake: the mode whose fake tensors, all on device cpu, stand for meta tensors.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recipes: dict[Any, Recipe] = {}
        self._fake = fake

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in Tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})[0]

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """What the operator returns, and whether a tensor in memory of its own may be among it."""
        if func.is_view and self._fake is None:  # made in C++; a fake tensor's view takes half a millisecond
            return func(*args, **kwargs), False
        try:
            # By `id`: an operator's own hash is slow, for it is Python code. Operators live as long as the process.
            key = (id(func), _described(args), _described(tuple(kwargs.items())) if kwargs else ())
            recipe = self._recipes.get(key)
        except (_NotMeta, TypeError):  # a tensor with data, or an argument that cannot be hashed
            return func(*args, **kwargs), True
        if recipe is None:
            out = _as_cuda(func, args, kwargs)
            # An operator that changed the shape of what it was given has another key now.
            unchanged = key[1] == _described(args)
            self._recipes[key] = self._recipe(func, out, args, kwargs) if unchanged else _AGAIN
            return out, True
        if recipe.results is None:
            return func(*args, **kwargs), recipe.makes
        if recipe.alone:
            return self._result(recipe.results[0], args, kwargs), recipe.makes
        return tuple([self._result(result, args, kwargs) for result in recipe.results]), recipe.makes

    def _recipe(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recipe:
        if func.is_view:
            if not isinstance(out, Tensor) or type(args[0]) is not FakeTensor:
                return Recipe(None, makes=False)
            begins = int(out.storage_offset() - args[0].storage_offset())
            return Recipe([View(tuple(out.shape), out.stride(), begins)], makes=False)
        alone = isinstance(out, Tensor)
        outputs = [out] if alone else list(out) if isinstance(out, tuple) else None
        if outputs is None:
            return _AGAIN
        given: dict[int, int | str] = {id(value): i for i, value in enumerate(args)}
        given |= {id(value): name for name, value in kwargs.items()}
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        inputs = {tensor.untyped_storage()._cdata for tensor in tensors}
        results: list[Result] = []
        for output in outputs:
            if output is None or id(output) in given:
                results.append(None if output is None else given[id(output)])
                continue
            if not isinstance(output, Tensor) or not _without_data(output):
                return _AGAIN
            size, stride = tuple(output.shape), output.stride()
            storage = output.untyped_storage()
            whole = self._new(size, stride, output.dtype).untyped_storage().nbytes()
            if storage._cdata in inputs or storage.nbytes() != whole or output.storage_offset():
                return _AGAIN
            inputs.add(storage._cdata)
            results.append((size, stride, output.dtype))
        return Recipe(results, alone=alone, makes=any(isinstance(result, tuple) for result in results))

    def _result(self, recipe: Result, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(recipe, View):
            return self._view(args[0], recipe)
        if isinstance(recipe, tuple):
            return self._new(*recipe)
        if recipe is None:
            return None
        return args[recipe] if isinstance(recipe, int) else kwargs[recipe]

    def _new(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._fake is None:
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        with no_dispatch():
            return FakeTensor(self._fake, torch.empty_strided(size, stride, dtype=dtype, device="meta"), _CPU)

    def _view(self, base: Tensor, view: View) -> Tensor:
        with no_dispatch():
            meta = torch.empty_strided(view.size, view.stride, dtype=base.dtype, device="meta")
            meta.set_(base.untyped_storage(), base.storage_offset() + view.begins, view.size, view.stride)
            return FakeTensor(self._fake, meta, _CPU)


_CPU = torch.device("cpu")


class _NotMeta(Exception):
    pass


def _as_cuda(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the operator returns, put right where torch's rule for meta tensors differs from its kernel on CUDA."""
    if func is torch.ops.aten.addmm.dtype_out:  # torch 2.11 and 2.12 take the dtype for `beta`
        return kwargs["out"]
    out = func(*args, **kwargs)
    if func is torch.ops.aten._scaled_dot_product_efficient_attention.default and not any(args[5:6]):
        # Without dropout seed and offset take no memory of the device: seen on an H100.
        return (*out[:2], *(number.new_empty(0) for number in out[2:]))
    return out


def _described(values: tuple[Any, ...] | list[Any]) -> tuple[Any, ...]:
    """What a result may depend on; equal values of different types are told apart."""
    described: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if not _without_data(value):
                raise _NotMeta
            described.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            described.append(_described(value))
        else:
            described.append((value.__class__, value))
    return tuple(described)


def _without_data(tensor: Tensor) -> bool:
    """Whether the tensor has no data: a plain meta tensor, or a fake one on the CPU."""
    if type(tensor) is FakeTensor:  # first: to ask one whether it is meta costs a dispatch
        return tensor.fake_device == _CPU
    return tensor.is_meta
