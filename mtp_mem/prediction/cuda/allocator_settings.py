"""Settings of CUDA's caching allocator, as PYTORCH_ALLOC_CONF gives them: those that the model of it follows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtp_mem._util import MiB
from mtp_mem.errors import BadInput

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The first that is set counts (c10/core/AllocatorConfig.h)."""
SIZES = {"large_segment_size_mb": "large_segment", "max_split_size_mb": "max_split"}
ELSEWHERE = re.compile(
    r"pinned_.*|release_lock_on_.*|graph_capture_.*|throw_on_.*|per_process_memory_fraction|backend:native"
)
"""Settings of host memory, locks, graphs and limits: they move no block of a step that fits."""


@dataclass(frozen=True)
class AllocatorSettings:
    """What the allocator's model is told.

    Attributes:
        expandable: `expandable_segments`; None where nothing is said.
        large_segment: `large_segment_size_mb` in bytes.
        max_split: `max_split_size_mb` in bytes; None: no limit.
        not_modelled: settings that can move blocks, and that the model does not know.
    """

    expandable: bool | None = None
    large_segment: int = 20 * MiB
    max_split: int | None = None
    not_modelled: tuple[str, ...] = ()


def allocator_settings(text: str, where: str = "allocator") -> AllocatorSettings:
    """The settings in a text `name:value,name:value`.

    Raises:
        BadInput: a setting that cannot have its value; `where` names the text in the message.
    """
    settings: dict[str, Any] = {}
    unknown = []
    for setting in re.findall(r"[^,\[\]]+(?:\[[^\]]*\])?", "".join(text.split())):
        name, _, value = setting.partition(":")
        if name == "expandable_segments" and value in ("True", "False"):
            settings["expandable"] = value == "True"
        elif name in SIZES and re.fullmatch(r"[1-9]\d{0,6}", value):
            settings[SIZES[name]] = int(value) * MiB
        elif name in ("expandable_segments", *SIZES):
            expected = "a whole number of MiB" if name in SIZES else "True or False"
            raise BadInput(f"{where} = {text!r}: {name}:{value}: expected {expected}")
        elif not ELSEWHERE.fullmatch(name) and not ELSEWHERE.fullmatch(setting):
            unknown.append(setting)
    return AllocatorSettings(**settings, not_modelled=tuple(unknown))


def from_environment(environ: Mapping[str, str]) -> str:
    """The text of the settings that the environment gives, "" for none.

    Raises:
        BadInput: see `allocator_settings`.
    """
    for variable in VARIABLES:
        if text := environ.get(variable, "").strip():
            allocator_settings(text, variable)
            return text
    return ""
