"""What of a model every strategy must leave as it is: which parameters train, hooks, training modes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from mtp_mem.model.own import Model

Hooks = dict[str, dict[Any, Any]]


@contextmanager
def model_kept(model: Model) -> Iterator[list[str]]:
    """A block after which the model is put back, except for values and `.grad`; the list then names what had changed.

    Args:
        model: whose parameters and modules are watched.
    """
    parameters = [(name, p, p.requires_grad, _hooks_of_tensor(p)) for name, p in model.named_parameters()]
    named = cast(nn.Module, model).named_modules()
    modules = [(name or "the model", m, m.training, _hooks_of_module(m)) for name, m in named]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, parameter, trains, hooks in parameters:
            if parameter.requires_grad != trains:
                changed.append(f"whether {name} trains")
                parameter.requires_grad_(trains)
            if _hooks_of_tensor(parameter) != hooks:
                changed.append(f"hooks on {name}")
                _put_back(parameter, hooks)
        for name, module, training, hooks in modules:
            if module.training != training:
                changed.append(f"training mode of {name}")
                module.training = training
            if _hooks_of_module(module) != hooks:
                changed.append(f"hooks of {name}")
                _put_back(module, hooks)


def _hooks_of_tensor(tensor: Any) -> Hooks:
    return {key: dict(getattr(tensor, key) or {}) for key in ("_backward_hooks", "_post_accumulate_grad_hooks")}


def _hooks_of_module(module: nn.Module) -> Hooks:
    return {
        key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks") and isinstance(value, dict)
    }


def _put_back(owner: Any, before: Hooks) -> None:
    for key, hooks in before.items():
        current = getattr(owner, key)
        if current is not None:
            current.clear()
            current.update(hooks)
