"""The GPUs to predict for: the shipped catalogue, and files like it."""

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from mtp_mem.config.foreign import read_toml
from mtp_mem.config.toml import convert
from mtp_mem.errors import BadInput, unknown


@dataclass(frozen=True, kw_only=True)
class GPU:
    """A target to predict for; where each figure comes from is its `source`."""

    name: str
    total_bytes: int  # what CUDA reports to a process
    multiprocessors: int
    source: str
    capability: str = ""  # compute capability, "9.0" say
    threads_per_multiprocessor: int = 2048  # that can be resident at once
    workspace_bytes: int | None = None  # of one cuBLAS workspace; None: by capability and torch's version
    workspaces_kept: bool | None = None  # workspaces stay from product to product; None: by torch's version
    expandable_segments: bool = False  # torch's default
    allocator: str = ""  # settings as in PYTORCH_ALLOC_CONF

    def __post_init__(self) -> None:
        least_of = {"total_bytes": 1, "workspace_bytes": 0, "multiprocessors": 0, "threads_per_multiprocessor": 512}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**63:
                raise BadInput(f"{name} = {value}: must be at least {least}")
        if not re.fullmatch(r"(\d+\.\d+)?", self.capability):
            raise BadInput(f"capability = {self.capability!r}: expected a compute capability, 9.0 say")
        if not self.capability and self.workspace_bytes is None:
            raise BadInput(
                "capability is missing: the size of cuBLAS workspaces follows from it; give it, or workspace_bytes"
            )


@cache
def load_gpus() -> dict[str, GPU]:
    """The target GPUs of profiles/gpus.toml, by name."""
    return _gpus_of(Path(str(resources.files("mtp_mem.profiles") / "gpus.toml")))


def load_gpu(name: str) -> GPU:
    """A target GPU by its name in the catalogue, or FILE.toml:NAME, a file like profiles/gpus.toml.

    Raises:
        BadInput: no such file or GPU; names the valid ones.
    """
    file, _, wanted = name.rpartition(":") if ".toml:" in name else ("", "", name)
    gpus = _gpus_of(Path(file)) if file else load_gpus()
    if wanted.lower() not in gpus:
        raise unknown("GPU", wanted, gpus, file)
    return gpus[wanted.lower()]


def _gpus_of(path: Path) -> dict[str, GPU]:
    return {name.lower(): convert(GPU, row, f"{path}: {name}") for name, row in read_toml(path).items()}
