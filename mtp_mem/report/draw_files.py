"""Charts from files: our results.jsonl and `plan`'s plan.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtp_mem._util import writable
from mtp_mem.config.schema import LARGEST_SIZE
from mtp_mem.config.toml import convert
from mtp_mem.environment import footer
from mtp_mem.errors import BadInput
from mtp_mem.report import charts
from mtp_mem.report.build import draw_group
from mtp_mem.report.content import gpu_of
from mtp_mem.report.diff import json_document
from mtp_mem.runs.identity import setting, training_words
from mtp_mem.runs.read_results import groups, read
from mtp_mem.runs.record import Record


def draw(paths: Sequence[Path], out: Path, notes: list[str]) -> list[Path]:
    """Draw every chart that the files hold data for.

    Args:
        paths: files and folders.
        out: folder for the charts; one folder inside it for each of several plans, and for each group of records that
            cannot share a chart.
        notes: what was skipped, and why, is added here.

    Returns:
        The files written.

    Raises:
        BadInput: a path cannot be read or holds nothing that can be drawn, or `out` cannot be written.
    """
    plans = {path: document for path in paths if (document := json_document(path, "largest_batch_by_n")) is not None}
    results = [path for path in paths if path not in plans]
    apart = groups(read(results, notes), notes) if results else []
    files: list[Path] = []
    for i, (path, document) in enumerate(plans.items(), 1):
        try:
            drawn = plan_chart(document, writable(out / f"plan-{i}" if len(plans) > 1 else out))
        except BadInput as e:
            raise BadInput(f"{path}: {e}") from None
        if not drawn:
            notes.append(f"{path}: holds no largest batch by n, nothing to draw")
        files += drawn
    files += setups_chart(apart, out)
    for i, records in enumerate(apart, 1):
        folder = writable(out / f"group-{i}" if len(apart) > 1 else out)
        files += [path.with_suffix(s) for path in draw_group(records, folder) for s in (".png", ".svg", ".csv")]
    if not files:
        raise BadInput("; ".join([*notes, "nothing to draw"]))
    return files


def setups_chart(apart: Sequence[Sequence[Record]], out: Path) -> list[Path]:
    """A chart of predictions that differ only in their training setup; no files with fewer than two setups."""
    predicted = [records for records in apart if records[0].exactness == "predicted"]
    setups = {training_words(records[0]): records for records in predicted}
    others = {
        frozenset(
            item for item in setting(records[0]).items() if not item[0].startswith(("training.", "workload.dtype"))
        )
        for records in predicted
    }
    gpu = gpu_of(predicted[0][0]) if predicted else None
    if len(setups) < 2 or gpu is None or len(others) > 1:
        return []
    precision = len({words.partition(", ")[0] for words in setups}) > 1
    named = {words if precision else words.partition(", ")[2] or "all kept": r for words, r in setups.items()}
    return charts.memory_of_setups(named, writable(out), gpu)


def plan_chart(document: Mapping[str, Any], out: Path) -> list[Path]:
    """The largest batch against n, from what `mtp-mem plan --out` keeps.

    Raises:
        BadInput: a field that the chart needs is missing or of another type.
    """
    try:
        model, gpu, sequence = document["model"], document["gpu"], document["workload"]["sequence"]
        rows = [
            (
                convert(str, row["strategy"], "strategy"),
                _count(row["n"], "n", 1),
                _count(row["batch"], "batch", 0) if row["fits"] != "no" else 0,
            )
            for row in document["largest_batch_by_n"]
        ]
        under = (
            f"{document['profile']}: V = {model['vocab_size']:,}, D = {model['dim']:,}, {sequence:,} tokens a sequence,"
            f" {document.get('setup', document['workload']['dtype'])}, on {gpu['name']},"
            f" headroom {document['headroom_percent']:g} %"
        )
        foot = f"predicted, not measured · {footer(document['environment'])}"
    except (KeyError, TypeError, ValueError, BadInput) as e:
        why = str(e) if isinstance(e, BadInput) else f"{type(e).__name__} {e}"
        raise BadInput(f"not a whole plan: {why}") from None
    return charts.largest_batch(rows, out, under=under, foot=foot)


def _count(value: Any, where: str, least: int) -> int:
    number: int = convert(int, value, where)
    if not least <= number <= LARGEST_SIZE:
        raise BadInput(f"{where} = {number}: expected {least} to {LARGEST_SIZE}")
    return number


def ranks_chart(document: dict[str, Any], out: Path) -> list[Path]:
    """A rank's peak against the number of GPUs; no files unless the plan varied the number of GPUs alone."""
    setups, gpu = document["setups"], document["gpu"]
    rows = [(row["strategy"], row["training"]["world"], row["peak_allocated_bytes"]) for row in setups]
    if len({(strategy, world) for strategy, world, _ in rows}) < len(rows):
        return []
    model, workload = document["model"], document["workload"]
    under = (
        f"{document['profile']}: V = {model['vocab_size']:,}, D = {model['dim']:,}, n = {model['n_future']}, batch"
        f" {setups[0]['batch']} x {workload['sequence']:,} tokens a GPU, {document.get('setup', workload['dtype'])}"
    )
    foot = f"predicted, not measured · {footer(document['environment'])}"
    return charts.peak_of_a_rank(rows, gpu["total_bytes"], out, gpu=gpu["name"], under=under, foot=foot)
