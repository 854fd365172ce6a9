"""State of the whole process that a strategy must leave as it is: torch's modes and numerics, and random states."""

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._device
from torch import Tensor

from mtp_mem.errors import contained
from mtp_mem.model import losses
from mtp_mem.model.head_tree import Heads


def shared() -> tuple[Any, ...]:
    """Owners of functions that every strategy calls: a strategy that replaces one changes what all others compute."""
    # Imported late: a clone that is not installed has no mtp_mem.strategies, and the command line says so.
    from mtp_mem.strategies.sequential import Sequential

    return F, Tensor, losses, Heads, Sequential


@dataclass(frozen=True)
class Setting:
    """One thing that a strategy must leave as it was: its name in messages, how to read it, how to put it back."""

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], object]
    drawn_from: bool = False  # the state of a generator of random numbers


def _attribute(owner: Any, name: str, words: str) -> Setting:
    return Setting(words, lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _fp32_precision(owner: Any, words: str) -> Setting:
    set_before = owner.fp32_precision

    def get() -> Any:  # "none" was never set and means ieee, which the older switch sets
        return "ieee" if owner.fp32_precision == "none" else owner.fp32_precision

    return Setting(
        f"the precision of fp32 products in {words}", get, lambda _: setattr(owner, "fp32_precision", set_before)
    )


def _deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _cuda_random_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _numpy_state() -> tuple[Any, ...]:
    kind, words, *rest = sys.modules["numpy"].random.get_state()
    return kind, words.tobytes(), *rest


def _set_numpy_state(state: tuple[Any, ...]) -> None:
    numpy = sys.modules["numpy"]
    numpy.random.set_state((state[0], numpy.frombuffer(state[1], numpy.uint32), *state[2:]))


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # `fp32_precision` of a backend was set as well: there is no one answer
        return "by backend"


def _set_precision(value: str) -> None:
    if value != "by backend":
        torch.set_float32_matmul_precision(value)


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _set_autocast_depth(depth: int) -> None:
    while _autocast_depth() > depth:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _pop_function_modes(depth: int) -> None:
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()


def _pop_operator_modes(depth: int) -> None:
    while torch._C._len_torch_dispatch_stack() > depth:
        torch._C._pop_torch_dispatch_stack(None)


def _saved_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _pop_saved_hooks(top: Any) -> None:
    while (current := _saved_hooks()) is not None and current != top:
        torch._C._autograd._pop_saved_tensors_default_hooks()


def _flushes_denormals() -> bool:
    return sys.float_info.min * float("0.5") == 0


class _Functions:
    """The attributes of `shared()` at one moment; equal to an earlier moment's where none of those has changed."""

    def __init__(self) -> None:
        self.owners = [(owner, dict(vars(owner))) for owner in shared()]

    def __eq__(self, before: object) -> bool:  # names may be added: torch.compile does
        return isinstance(before, _Functions) and all(
            then.items() <= now.items() for (_, now), (_, then) in zip(self.owners, before.owners, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def put_back(self) -> None:
        for owner, functions in self.owners:
            for name, value in functions.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)


def _settings() -> list[Setting]:
    backends: Any = torch.backends
    settings = [
        Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Setting("the default device", lambda: torch.utils._device.CURRENT_DEVICE, torch.set_default_device),
        Setting("functions that all strategies call", _Functions, _Functions.put_back),
        Setting("the precision of fp32 products", _precision, _set_precision),
        *(
            _fp32_precision(owner, words)
            for owner, words in (
                (backends, "general"),
                (backends.cuda.matmul, "cuBLAS"),
                (backends.cudnn, "cuDNN"),
                (backends.mkldnn, "oneDNN"),
                (backends.mkldnn.matmul, "oneDNN's matmul"),
            )
        ),
        Setting("the rounding of denormals to zero", _flushes_denormals, torch.set_flush_denormal),
        Setting(
            "deterministic algorithms",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            _deterministic,
        ),
        Setting("the number of threads", torch.get_num_threads, torch.set_num_threads),
        Setting("anomaly mode", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        Setting("the garbage collector", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        Setting("the working directory", os.getcwd, os.chdir),
        Setting("autocast's cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        Setting("torch's random state", torch.get_rng_state, torch.set_rng_state, drawn_from=True),
        Setting("CUDA's random state", _cuda_random_states, torch.cuda.set_rng_state_all, drawn_from=True),
        Setting("Python's random state", random.getstate, random.setstate, drawn_from=True),
        _attribute(backends.cudnn, "enabled", "cuDNN"),
        _attribute(backends.cudnn, "allow_tf32", "TF32 in cuDNN"),
        _attribute(backends.cudnn, "benchmark", "cuDNN's benchmark mode"),
        _attribute(backends.cudnn, "deterministic", "cuDNN's deterministic mode"),
        _attribute(backends.mkldnn, "enabled", "oneDNN"),
        _attribute(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", "reductions of bf16 products"),
        _attribute(backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", "reductions of fp16 products"),
        _attribute(backends.cuda.matmul, "allow_fp16_accumulation", "sums of fp16 products"),
        *(
            Setting(f"{kind} attention", getattr(backends.cuda, f"{name}_sdp_enabled"), enable)
            for kind, name, enable in (
                ("flash", "flash", backends.cuda.enable_flash_sdp),
                ("memory-efficient", "mem_efficient", backends.cuda.enable_mem_efficient_sdp),
                ("plain", "math", backends.cuda.enable_math_sdp),
                ("cuDNN's", "cudnn", backends.cuda.enable_cudnn_sdp),
            )
        ),
    ]
    for device in ("cpu", "cuda"):
        settings += [
            Setting(
                f"autocast on {device}",
                partial(torch.is_autocast_enabled, device),
                partial(torch.set_autocast_enabled, device),
            ),
            Setting(
                f"autocast's dtype on {device}",
                partial(torch.get_autocast_dtype, device),
                partial(torch.set_autocast_dtype, device),
            ),
        ]
    settings += [
        Setting("how deep autocast is nested", _autocast_depth, _set_autocast_depth),
        Setting("modes that see every function", torch._C._len_torch_function_stack, _pop_function_modes),
        Setting("modes that see every operator", torch._C._len_torch_dispatch_stack, _pop_operator_modes),
        Setting("hooks on what autograd saves", _saved_hooks, _pop_saved_hooks),
    ]
    if "numpy" in sys.modules:
        settings.append(Setting("NumPy's random state", _numpy_state, _set_numpy_state, drawn_from=True))
    return settings


@contextmanager
def restored(*, may_draw: bool = False) -> Iterator[list[str]]:
    """A block that runs a strategy. Afterwards these settings are as they were; the list then names what had changed.

    Args:
        may_draw: the model itself may draw random numbers: that is put back too, but not named.

    Raises:
        BrokenContract: the strategy tried to end the process.
    """
    before = [(setting, setting.get()) for setting in _settings()]
    changed: list[str] = []
    try:
        with contained():
            yield changed
    finally:
        for setting, value in before:
            if not _equal(setting.get(), value):
                if not (may_draw and setting.drawn_from):
                    changed.append(setting.name)
                setting.set(value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
