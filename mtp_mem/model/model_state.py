"""What of a model every strategy must leave as it is: which parameters train, hooks, training modes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mtp_mem.model.own import Model

Hooks = dict[str, dict[Any, Any]]


@contextmanager
def model_kept(model: Model) -> Iterator[list[str]]:
    """A block after which the model is put back, except for values and `.grad`; the list then names what had changed.

    Args:
        model: whose parameters and modules are watched.
    """
    watched: list[tuple[nn.Parameter | nn.Module, str, str, str]] = [
        (p, "requires_grad", f"whether {name} trains", f"hooks on {name}") for name, p in model.named_parameters()
    ]
    for name, module in model.named_modules():
        name = name or "the model"
        watched.append((module, "training", f"training mode of {name}", f"hooks of {name}"))
    before = [(getattr(owner, flag), _hooks(owner)) for owner, flag, _, _ in watched]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for (owner, flag, words, hooks_words), (value, hooks) in zip(watched, before, strict=True):
            if getattr(owner, flag) != value:
                changed.append(words)
                setattr(owner, flag, value)
            if _hooks(owner) != hooks:
                changed.append(hooks_words)
                _put_back(owner, hooks)


def _hooks(owner: nn.Parameter | nn.Module) -> Hooks:
    if isinstance(owner, nn.Parameter):
        return {key: dict(getattr(owner, key) or {}) for key in ("_backward_hooks", "_post_accumulate_grad_hooks")}
    attributes = vars(owner).items()
    return {key: dict(value) for key, value in attributes if key.endswith("_hooks") and isinstance(value, dict)}


def _put_back(owner: Any, before: Hooks) -> None:
    for key, hooks in before.items():
        current = getattr(owner, key)
        if current is not None:
            current.clear()
            current.update(hooks)
