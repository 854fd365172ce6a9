"""Optimizers of a training step: what they keep for each parameter, and the temporary memory of their step.

| name | kept for each parameter | a step's temporaries |
|---|---|---|
| adamw | two moments in the parameter's dtype, a step counter (fp32) on the device | none: one fused kernel |
| adamw-foreach | the same, the counter on the host | as large as all parameters: `_foreach_sqrt` |
| adamw-loop | the same, the counter on the host | as large as the largest parameter |
| adamw-8bit | two moments of one byte, an fp32 scale for each 256 values; fp32 moments below 4,096 values | none |
| sgd | one momentum in the parameter's dtype | none: one fused kernel |

With an fp32 master copy (dtype "bf16 + fp32 master") the optimizer steps the copies, on fp32 gradients that take the
place of the bf16 ones, and the parameters are rounded from them: as Megatron-LM's mixed-precision optimizer does.
"""

import importlib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtp_mem.config.schema import OptimizerName
from mtp_mem.errors import Missing, unknown
from mtp_mem.model.own import Model

BETAS, WEIGHT_DECAY, MOMENTUM = (0.9, 0.95), 0.1, 0.9
IMPLEMENTATIONS = {"adamw": {"fused": True}, "adamw-foreach": {"foreach": True}, "adamw-loop": {"foreach": False}}
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096  # bitsandbytes: values that share a scale; fewer values are kept in fp32


class Optimizer(Protocol):
    """What a training step asks of an optimizer; every `torch.optim.Optimizer` fulfils it."""

    state: Any

    def step(self) -> Any:
        """Change the parameters by their gradients."""


def make_optimizer(
    model: Model | nn.Module, lr: float = 3e-4, *, name: OptimizerName = "adamw", master: bool = False
) -> Optimizer:
    """The optimizer of a model with data: by default AdamW as in the paper (appendix M: betas 0.9, 0.95; decay 0.1).

    Args:
        model: whose parameters it changes.
        lr: learning rate.
        name: see the table at the top of this file.
        master: keep an fp32 copy of every parameter, and step that.

    Raises:
        BadInput: an unknown name.
        Missing: adamw-8bit without bitsandbytes.
    """
    if name not in typing.get_args(OptimizerName):
        raise unknown("optimizer", name, typing.get_args(OptimizerName))

    def make(parameters: Sequence[Tensor]) -> Optimizer:
        if name == "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, fused=True)
        if name == "adamw-8bit":
            return _eight_bit(parameters, lr)
        return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, **IMPLEMENTATIONS[name])

    parameters = [parameter for _, parameter in model.named_parameters()]
    return WithMaster(parameters, make) if master else make(parameters)


def simulated_optimizer(
    model: Model | nn.Module, *, name: OptimizerName = "adamw", master: bool = False, host: Callable[[], Any]
) -> Optimizer:
    """The optimizer of a model without data, with the state that it would have after a step (`state_by_rule`).

    Args:
        model: whose parameters it would change.
        name: see the table at the top of this file.
        master: with an fp32 copy of every parameter.
        host: a context in which new tensors have data.
    """

    def make(parameters: Sequence[Tensor]) -> Optimizer:
        if name in ("adamw-foreach", "adamw-loop"):
            optimizer: Optimizer = torch.optim.AdamW(
                parameters, betas=BETAS, weight_decay=WEIGHT_DECAY, **IMPLEMENTATIONS[name]
            )
        else:
            optimizer = _Still()
        for parameter in parameters:
            if parameter.requires_grad:
                optimizer.state[parameter] = state_by_rule(parameter, name, host)
        return optimizer

    parameters = [parameter for _, parameter in model.named_parameters()]
    return WithMaster(parameters, make) if master else make(parameters)


def state_by_rule(parameter: Tensor, name: OptimizerName, host: Callable[[], Any]) -> dict[str, Tensor]:
    """The tensors that the optimizer keeps for a parameter after a step, in the order in which it makes them.

    AdamW and SGD: `_init_group` in torch/optim; adamw-8bit: `Optimizer2State.init_state` in bitsandbytes 0.45.
    """
    if name == "sgd":
        return {"momentum_buffer": torch.empty_like(parameter)}
    if name == "adamw-8bit":
        small = parameter.numel() < SMALLEST_8BIT
        moment = torch.float32 if small else torch.uint8
        state = {key: torch.empty_like(parameter, dtype=moment) for key in ("state1", "state2")}
        if not small:
            blocks = -(-parameter.numel() // BLOCK_8BIT)
            state |= {key: parameter.new_empty(blocks, dtype=torch.float32) for key in ("absmax1", "absmax2")}
        return state
    if name == "adamw":
        step = torch.empty((), dtype=torch.float32, device=parameter.device)
    else:
        with host():
            step = torch.ones((), dtype=torch.float32)
    return {"step": step, "exp_avg": torch.empty_like(parameter), "exp_avg_sq": torch.empty_like(parameter)}


def optimizer_state(model: Model | nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that the optimizer keeps, each named after its parameter."""
    inner, copies = (optimizer.inner, optimizer.copies) if isinstance(optimizer, WithMaster) else (optimizer, {})
    for name, parameter in model.named_parameters():
        stepped = copies.get(parameter, parameter)
        if stepped is not parameter:
            yield f"{name}: fp32 copy", stepped
        for key, value in inner.state.get(stepped, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}: {key}", value


class WithMaster:
    """An optimizer that steps fp32 copies of the parameters.

    Args:
        parameters: in low precision; those that are frozen get no copy.
        make: the optimizer of the copies.
    """

    def __init__(self, parameters: Sequence[Tensor], make: Callable[[Sequence[Tensor]], Optimizer]) -> None:
        self.copies = {p: p.detach().to(torch.float32, copy=True) for p in parameters if p.requires_grad}
        for copy in self.copies.values():
            copy.requires_grad_(True)
        self.inner = make(list(self.copies.values()))
        self.state = self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        """Move each gradient to its copy in fp32, step the copies, and round the parameters from them."""
        pairs = [(p, copy) for p, copy in self.copies.items() if p.grad is not None]
        for parameter, copy in pairs:
            assert parameter.grad is not None
            copy.grad = parameter.grad.to(torch.float32)
            parameter.grad = None
        self.inner.step()
        for parameter, copy in pairs:
            parameter.copy_(copy)
            copy.grad = None


class _Still:
    """Stands for an optimizer whose step takes no temporary memory: it has the state alone."""

    def __init__(self) -> None:
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self) -> None:
        pass


def _eight_bit(parameters: Sequence[Tensor], lr: float) -> Optimizer:
    try:
        AdamW8bit = importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError:
        raise Missing("optimizer adamw-8bit needs the package bitsandbytes (predict and plan do not)") from None
    optimizer: Optimizer = AdamW8bit(parameters, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    return optimizer
