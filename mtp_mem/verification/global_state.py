"""What belongs to the whole process and not to a strategy: torch's modes and numerics, and random states."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """One thing that a strategy must leave as it was: how to read it, and how to put it back."""

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], object]


def _attribute(owner: Any, name: str, words: str) -> Setting:
    return Setting(words, lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _cuda_random_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _settings() -> list[Setting]:
    settings = [
        Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Setting(
            "the precision of fp32 products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        ),
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
        Setting("autocast's cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        Setting("torch's random state", torch.get_rng_state, torch.set_rng_state),
        Setting("CUDA's random state", _cuda_random_states, torch.cuda.set_rng_state_all),
        Setting("Python's random state", random.getstate, random.setstate),
        _attribute(torch.backends.cudnn, "enabled", "cuDNN"),
        _attribute(torch.backends.cudnn, "benchmark", "cuDNN's benchmark mode"),
        _attribute(torch.backends.cudnn, "deterministic", "cuDNN's deterministic mode"),
        _attribute(torch.backends.mkldnn, "enabled", "oneDNN"),
        _attribute(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", "reductions of bf16 products"),
        _attribute(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", "reductions of fp16 products"),
    ]
    for device in ("cpu", "cuda"):
        settings += [
            Setting(
                f"autocast on {device}",
                lambda device=device: torch.is_autocast_enabled(device),  # type: ignore[misc]
                lambda on, device=device: torch.set_autocast_enabled(device, on),  # type: ignore[misc]
            ),
            Setting(
                f"autocast's dtype on {device}",
                lambda device=device: torch.get_autocast_dtype(device),  # type: ignore[misc]
                lambda dtype, device=device: torch.set_autocast_dtype(device, dtype),  # type: ignore[misc]
            ),
        ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        settings.append(Setting("NumPy's random state", numpy.random.get_state, numpy.random.set_state))
    return settings


@contextmanager
def restored() -> Iterator[list[str]]:
    """Afterwards everything global is as it was; the list then names what had changed, in words."""
    before = [(setting, setting.get()) for setting in _settings()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for setting, value in before:
            if not _equal(setting.get(), value):
                changed.append(setting.name)
                setting.set(value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    same = a == b
    return bool(same.all()) if hasattr(same, "all") else bool(same)
