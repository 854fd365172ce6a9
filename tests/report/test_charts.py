"""The charts are what they were: compared with committed pictures, and their CSVs with the records.

After a wanted change: `MTP_MEM_BASELINES=write pytest tests/report/test_charts.py`, and look at every baseline.
Baselines are 400 pixels wide, so that another FreeType's hinting is no difference and a moved line is one.
"""

import csv
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fixed import MODEL, record, records
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from PIL import Image

from mtp_mem.config.gpus import GPU
from mtp_mem.report import charts
from mtp_mem.report.charts.style import heads_axis, styles
from mtp_mem.report.charts.time import paper_times
from mtp_mem.report.charts.tradeoff import chunk_of, family, pareto
from mtp_mem.runs.record import Record
from mtp_mem.strategy import BUILTIN

BASELINES = Path(__file__).parent / "baselines"
TOLERANCE = 2.0  # root mean square of 0..255; see test_a_changed_line_is_seen
WIDTH = 400
GPU_ = GPU(name="A GPU", total_bytes=350 * 2**20, workspace_bytes=0, multiprocessors=1, source="")


def out_of_memory() -> list[Record]:
    gone = {("naive", 4), ("naive", 8), ("sequential", 8)}
    return [dataclasses.replace(r, status="oom") if (r.strategy, r.n) in gone else r for r in records()]


def chunks() -> list[Record]:
    sizes = {128: 20, 512: 30, 4096: 90}
    more = [
        record(f"chunked_vocab:chunk={c}", 8, peak_over_baseline_bytes=m * 2**20, tokens_per_s=900.0 + 3 * m)
        for c, m in sizes.items()
    ]
    return [*records(), *more]


def paper_shape() -> list[Record]:
    return [
        dataclasses.replace(r, model={**r.model, "vocab_size": 32000, "dim": 1024, "n_layers": 18}) for r in records()
    ]


def two_shapes(out: Path) -> list[Path]:
    wide = [dataclasses.replace(r, peak_over_baseline_bytes=2 * r.peak_over_baseline_bytes) for r in records()]
    return charts.memory_small_multiples({"V = 8,192": records(), "V = 16,384": wide}, out)


BATCHES = [("naive", 1, 4), ("naive", 4, 1), ("naive", 8, 0), ("sequential", 1, 4), ("sequential", 8, 5)]
DRAWN: dict[str, Callable[[Path], list[Path]]] = {
    "memory": lambda out: charts.memory_vs_n(records(), out),
    "memory-oom": lambda out: charts.memory_vs_n(out_of_memory(), out),
    "memory-gpu": lambda out: charts.memory_vs_n(records(exactness="predicted"), out, GPU_),
    "memory-panels": two_shapes,
    "time": lambda out: charts.time_vs_n(paper_shape(), out),
    "tradeoff": lambda out: charts.throughput_vs_memory(chunks(), out),
    "composition": lambda out: charts.composition(records(), out),
    "batch": lambda out: charts.largest_batch(BATCHES, out, under="a model on a GPU", foot="predicted"),
}


def small(png: Path, to: Path) -> Path:
    with Image.open(png) as image:
        height = round(image.height * WIDTH / image.width)
        image.convert("RGB").resize((WIDTH, height), Image.Resampling.BOX).save(to)
    return to


@pytest.mark.parametrize("name", DRAWN)
def test_the_picture_is_the_baseline(name: str, tmp_path: Path) -> None:
    png, svg, table = DRAWN[name](tmp_path)
    assert [p.suffix for p in (png, svg, table)] == [".png", ".svg", ".csv"]
    baseline, picture = BASELINES / f"{name}.png", small(png, tmp_path / "small.png")
    if os.environ.get("MTP_MEM_BASELINES") == "write":
        baseline.write_bytes(picture.read_bytes())
    assert compare_images(str(baseline), str(picture), TOLERANCE) is None


def test_a_changed_line_is_seen(tmp_path: Path) -> None:
    """One point of one line a tenth higher is more than the tolerance."""
    changed = [
        dataclasses.replace(r, peak_over_baseline_bytes=r.peak_over_baseline_bytes * 11 // 10)
        if (r.strategy, r.n) == ("naive", 4)
        else r
        for r in records()
    ]
    picture = small(charts.memory_vs_n(changed, tmp_path)[0], tmp_path / "small.png")
    assert "RMS" in (compare_images(str(BASELINES / "memory.png"), str(picture), TOLERANCE) or "")


@pytest.mark.parametrize("name", ["memory-oom", "tradeoff", "composition"])
def test_files_are_deterministic(name: str, tmp_path: Path) -> None:
    first = [p.read_bytes() for p in DRAWN[name](tmp_path)]
    assert [p.read_bytes() for p in DRAWN[name](tmp_path)] == first
    assert len(list(tmp_path.iterdir())) == 3  # no partial file is left


def test_tables_hold_the_records(tmp_path: Path) -> None:
    rows = list(csv.DictReader(charts.memory_vs_n(out_of_memory(), tmp_path)[2].open()))
    assert [(r["strategy"], int(r["n"]), r["status"]) for r in rows][12] == ("naive", 8, "oom")
    rows = list(csv.DictReader(charts.time_vs_n(paper_shape(), tmp_path)[2].open()))
    assert [r["over_naive"] for r in rows if r["strategy"] == "sequential"] == ["0.9"] * 4
    assert [r["over_naive_at_first_n"] for r in rows if r["strategy"] == "naive"] == ["1.0", "2.0", "4.0", "8.0"]
    assert {r["n"]: r["paper_table_s5"] for r in rows} == {"1": "1.0", "2": "1.07", "4": "1.22", "8": ""}
    rows = list(csv.DictReader(charts.composition(records(), tmp_path)[2].open()))
    assert [int(r["total"]) for r in rows] == [r.peak_requested_bytes for r in records()]


def test_nothing_to_draw_is_no_file(tmp_path: Path) -> None:
    failed = [record(status="error", peak_over_baseline_bytes=None, step_ms=None, bytes_at_peak=None)]
    for draw in (charts.memory_vs_n, charts.time_vs_n, charts.throughput_vs_memory, charts.composition):
        assert draw(failed, tmp_path) == []
    assert charts.memory_small_multiples({"a": records(), "b": failed}, tmp_path) == []
    assert charts.largest_batch([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ns", "ticks"),
    [([1, 2, 4, 8], [1, 2, 4, 8]), ([1, 2, 4, 8, 64], [4, 8, 64]), ([*range(1, 50)], [*range(1, 50, 3)])],
)
def test_no_more_labels_than_there_is_room_for(ns: list[int], ticks: list[int]) -> None:
    axes = Figure().add_subplot()
    heads_axis(axes, ns)
    assert [*axes.get_xticks()] == ticks


def test_the_pareto_front() -> None:
    assert pareto([(3.0, 9.0), (1.0, 5.0), (2.0, 4.0), (1.0, 5.0), (4.0, 9.0)]) == [1, 0]


def test_chunk_sizes_of_a_spec() -> None:
    assert chunk_of("chunked_vocab:chunk=512") == 512
    assert chunk_of("chunked_vocab") == chunk_of("chunked_vocab:chunk=2048")
    assert chunk_of("chunked_vocab:chnk=1") is None
    assert chunk_of("antigravity:Class:chunk=3") is None  # nothing is imported for it
    assert family("my.module:Class:chunk=3") == "my.module:Class"


def test_no_two_strategies_look_alike() -> None:
    looks = styles([*BUILTIN, "one:A", "two:B", "three:C"])
    assert len({(colour, marker) for colour, marker, _ in looks.values()}) == len(looks)
    assert styles(["one:A", "naive"])["naive"] == looks["naive"]


def test_the_paper_is_shown_only_for_its_shapes() -> None:
    assert paper_times(record()) == {}
    largest = {**MODEL, "vocab_size": 32000, "dim": 5120, "n_layers": 40}
    assert paper_times(record(model=largest)) == {1: 1.0, 2: 1.04, 4: 1.09}
    assert paper_times(record(model={**largest, "head": "causal"})) == {}
