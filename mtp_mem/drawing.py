"""Charts from files of either kind: our results.jsonl, and the JSON of pytest-benchmark."""

import re
from collections.abc import Sequence
from pathlib import Path

from mtp_mem import charts
from mtp_mem.errors import BadInput
from mtp_mem.memory.reading import groups, read
from mtp_mem.memory.record import writable
from mtp_mem.regressions import benchmark_document
from mtp_mem.report.build import draw_group


def draw(paths: Sequence[Path], out: Path, notes: list[str]) -> list[Path]:
    """Every chart that the files have figures for.

    Args:
        paths: files and folders.
        out: folder for the charts; one folder inside it for each group of records that cannot share a chart.
        notes: what was skipped, and why, is added here.

    Returns:
        The files written.

    Raises:
        BadInput: a path cannot be read or holds nothing that can be drawn, or `out` cannot be written.
    """
    documents = {path: document for path in paths if (document := benchmark_document(path)) is not None}
    results = [path for path in paths if path not in documents]
    apart = groups(read(results, notes), notes) if results else []
    files: list[Path] = []
    for i, records in enumerate(apart, 1):
        folder = writable(out / f"group-{i}" if len(apart) > 1 else out)
        files += [path.with_suffix(s) for path in draw_group(records, folder) for s in (".png", ".svg", ".csv")]
    for path, document in documents.items():
        phases: dict[str, list[dict[str, object]]] = {}
        for bench in document.get("benchmarks", []):
            if "times_floor" in bench.get("extra_info", {}):
                phases.setdefault(str(bench.get("group")), []).append(bench["extra_info"])
        if not phases:
            notes.append(f"{path}: no head phase in it, nothing to draw")
        machine = document.get("machine_info", {}).get("mtp_mem", {})
        foot = f"{machine.get('cpu') if machine.get('device') == 'cpu' else machine.get('device')} · torch"
        for group, rows in phases.items():
            name = re.sub(r"[^A-Za-z0-9]+", "-", group).strip("-").lower()
            title = group.partition(", ")[2]
            foot_here = f"{foot} {machine.get('torch')} · {path.name}"
            files += charts.head_phase(rows, writable(out), title=title, foot=foot_here, name=name)
    if not files:
        raise BadInput("; ".join([*notes, "nothing to draw"]))
    return files
