"""Profiles as TOML files: the shipped ones, and reading one."""

import dataclasses
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from mtp_mem.config.foreign import read_toml
from mtp_mem.config.gpus import load_gpus
from mtp_mem.config.other_models import huggingface_profile
from mtp_mem.config.schema import MASTER, PRECISIONS, Dtype, HeadKind, Profile
from mtp_mem.config.toml import convert, from_table, short
from mtp_mem.errors import BadInput, unknown


def builtin_folder() -> Path:
    """Where the shipped profiles lie."""
    return Path(str(resources.files("mtp_mem.profiles")))


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
        if "hf" in table:
            table = _with_huggingface(table, path)
        profile = from_table(Profile, _named_precision({"name": path.stem, **table}))
        for gpu in profile.gpus:
            if gpu not in load_gpus():
                raise unknown("GPU", gpu, load_gpus(), "gpus")
        return profile
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from None


def _with_huggingface(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The table of a file with `hf = "config.json"`, relative to the file's folder, with the config's model in it."""
    hf, model = table["hf"], table.get("model", {})
    if not isinstance(hf, str):
        raise BadInput(f"hf = {short(hf)}: expected the path of a config.json")
    if not isinstance(model, dict) or set(model) - {"head"}:
        raise BadInput("[model] beside hf: the config describes the model; valid in [model]: head, the kind of heads")
    kind = convert(HeadKind | None, model.get("head"), "model.head")
    profile = huggingface_profile(path.parent / hf, kind)
    usual = {"model": profile.model, "workload": profile.workload, "sweep": profile.sweep}
    rest = {key: value for key, value in table.items() if key not in ("hf", "model")}
    workload = rest.get("workload")
    if isinstance(workload, dict):
        rest["workload"] = dataclasses.asdict(profile.workload) | workload
    return usual | rest


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
    """The table with its precision, in either place, as the fields `workload.dtype` and `training.master_weights`."""
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
