"""Profiles as TOML files: the shipped ones, reading one, writing one."""

import dataclasses
import json
import textwrap
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtp_mem._util import atomic_write
from mtp_mem.config.schema import MASTER, PRECISIONS, Dtype, Profile, builtin_folder
from mtp_mem.config.toml import from_table, read_toml, short
from mtp_mem.errors import BadInput, unknown


def builtin_profiles() -> dict[str, Path]:
    """The profiles that ship with the package, by name."""
    return {path.stem: path for path in sorted(builtin_folder().glob("*.toml")) if path.stem != "gpus"}


def load_profile(name: str) -> Profile:
    """Read a shipped profile by name, or a TOML file by path (anything that ends in `.toml` or holds a slash).

    Raises:
        BadInput: no such profile or file, TOML that does not parse, unknown keys, values of the wrong type or range.
    """
    shipped = builtin_profiles()
    if name in shipped:
        path = shipped[name]
    elif name.endswith(".toml") or "/" in name:
        path = Path(name)
    else:
        raise unknown("profile", name, shipped)
    table = read_toml(path)
    try:
        return from_table(Profile, _named_precision({"name": path.stem, **table}))
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None


def with_precision(profile: Profile, precision: str) -> Profile:
    """The profile in another precision.

    Raises:
        BadInput: it is none of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise unknown("value", precision, PRECISIONS, "precision")
    master = precision == MASTER
    workload = dataclasses.replace(profile.workload, dtype="bf16" if master else typing.cast(Dtype, precision))
    training = dataclasses.replace(profile.training, master_weights=master)
    return dataclasses.replace(profile, workload=workload, training=training)


def _named_precision(table: dict[str, Any]) -> dict[str, Any]:
    """A file's `training.precision`, or a `workload.dtype` with fp32 copies, as the two fields that it stands for."""
    workload, training = table.get("workload"), table.get("training")
    if not isinstance(workload, dict) or not (training is None or isinstance(training, dict)):
        return table
    training = dict(training or {})
    dtype = workload.get("dtype")
    precision = training.pop("precision", dtype)
    if precision is None:
        return table
    if precision not in PRECISIONS:
        raise unknown(
            "value",
            short(precision).strip("'"),
            PRECISIONS,
            "workload.dtype" if precision == dtype else "training.precision",
        )
    if dtype is not None and dtype != precision and not (dtype == "bf16" and precision == MASTER):
        raise BadInput(f"workload.dtype = {dtype!r}, but training.precision = {precision!r}; one of them is enough")
    if precision == MASTER:
        precision, training["master_weights"] = "bf16", True
    return {**table, "workload": {**workload, "dtype": precision}, "training": training}


def to_toml(profile: Profile, comments: Iterable[str] = ()) -> str:
    """The file's text: the comments, a paragraph each, then n and every field that is not at its default.

    The name is left out: a profile is called as its file is.
    """
    lines = []
    for comment in comments:
        lines += textwrap.wrap(comment, 118, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
    lines += _entries({"description": profile.description, "gpus": profile.gpus})
    for table in ("model", "workload", "training", "sweep"):
        if entries := _entries(_changed(getattr(profile, table))):
            lines += ["", f"[{table}]", *entries]
    return "\n".join(lines) + "\n"


def write_new(path: Path, text: str, *, force: bool = False) -> None:
    """Write a profile, whole or not at all.

    Args:
        path: must end in .toml, by which a profile's file is told from a shipped profile's name.
        text: what it holds.
        force: replace a file that is there.

    Raises:
        BadInput: the file is there, cannot be written, or is not called .toml.
    """
    if path.suffix != ".toml":
        raise BadInput(f"{path}: a profile's file must end in .toml")
    if path.exists() and not force:
        raise BadInput(f"{path}: is there already; force replaces it")
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as e:
        raise BadInput(f"{path}: cannot be written: {e.strerror}") from None


def _changed(table: Any) -> dict[str, Any]:
    values = {field.name: (getattr(table, field.name), field.default) for field in dataclasses.fields(table)}
    return {name: value for name, (value, default) in values.items() if value != default or name == "n"}


def _entries(values: dict[str, Any]) -> list[str]:
    # What JSON writes of a string, a number, a boolean or a list of them is TOML too, but for one unescaped character.
    dumped = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return [f"{key} = {text}".replace("\x7f", "\\u007f") for key, text in dumped.items()]
