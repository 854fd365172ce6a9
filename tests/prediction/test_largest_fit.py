"""Every answer of `plan` fits, and the next larger one does not: held against predictions of models of their own."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import tiny

from mtp_mem import Workload, load_strategy
from mtp_mem._util import MiB
from mtp_mem.cli import main
from mtp_mem.config.schema import Profile, Sweep, load_gpu
from mtp_mem.prediction.largest_fit import AXES, SEQUENCE_STEP, Answer, Axis, Plan, advice, hint, plan, search
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.probes import Point, ProbeCache, ProbedBytes, Prober
from mtp_mem.prediction.simulated_step import simulate

SPECS = ("naive", "sequential", "chunked_vocab:chunk=1000", "chunked_tokens", "checkpointed")
GPU = load_gpu("l4")
PROFILE = Profile(
    name="tiny",
    model=tiny(vocab_size=4099, n_layers=4),
    workload=Workload(batch=2, sequence=256, dtype="bf16"),
    sweep=Sweep(n=(3,)),
)
BASE = Point(batch=2, sequence=256, n=3)
LIMIT = 64 * MiB  # two cuBLAS workspaces, 16.2 MiB, are in it


def planned(
    cache: Path,
    *,
    fresh: bool = False,
    limit: int = LIMIT,
    specs: tuple[str, ...] = SPECS,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    prober = Prober(PROFILE, GPU, {s: load_strategy(s) for s in specs}, ProbeCache(cache, fresh=fresh), progress)
    return plan(prober, PROFILE, BASE, limit, specs)


def allocated(spec: str, point: Point) -> int:
    """By a prediction that shares no model, no cache and no search with the plan."""
    workload = dataclasses.replace(PROFILE.workload, batch=point.batch, sequence=point.sequence)
    trace = simulate(PROFILE.model.with_n(point.n), workload, load_strategy(spec), gpu=GPU)
    found: int = predicted(trace, GPU)["peak_allocated_bytes"]
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "deep" / "probes.jsonl"


@pytest.fixture(scope="module")
def found(cache: Path) -> Plan:
    return planned(cache)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("spec", SPECS)
def test_the_answer_fits_and_the_next_one_does_not(found: Plan, spec: str, axis: Axis) -> None:
    (answer,) = [a for a in found.of(axis) if a.strategy == spec]
    assert answer.fits
    assert allocated(spec, answer.point) == answer.figures.allocated <= LIMIT
    others = {"batch": 2, "sequence": 256, "n": 3} | {axis: answer.value}
    assert dataclasses.asdict(answer.point) == others
    if axis == "n" and answer.value == 4:  # all layers are heads
        assert answer.next_point is None
        return
    step = SEQUENCE_STEP if axis == "sequence" else 1
    beyond = dataclasses.replace(answer.point, **{axis: answer.value + step})
    assert answer.next_point == beyond
    assert answer.next_figures
    assert allocated(spec, beyond) == answer.next_figures.allocated > LIMIT


def test_the_answers_are_not_all_alike(found: Plan) -> None:
    # or the test above would say little: naive runs out of memory where the others do not
    n = {a.strategy: a.value for a in found.of("n")}
    assert n["naive"] < n["sequential"] == 4
    batch = {a.strategy: a.value for a in found.of("batch")}
    assert batch["naive"] < batch["sequential"] < batch["chunked_tokens"]
    assert found.recommended() in found.of("batch")
    assert f"where naive stops at {batch['naive']}" in advice(found)


def test_nothing_fits(cache: Path) -> None:
    plan = planned(cache, limit=20 * MiB, specs=("naive", "sequential"))
    assert [(a.axis, a.fits, a.next_point) for a in plan.answers] == [(x, False, None) for x in AXES] * 2
    for answer in plan.answers[:2]:
        assert answer.value == (1 if answer.axis == "batch" else SEQUENCE_STEP)
        assert plan.left(answer) == 20 * MiB - allocated("naive", answer.point) < 0
    assert plan.recommended() is None


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """One strategy's plan, and the cache that it alone has filled."""
    path = tmp_path_factory.mktemp("naive") / "probes.jsonl"
    return planned(path, specs=("naive",)), path


def test_the_cache_changes_no_answer_and_spares_every_probe(found: Plan, cache: Path, naive: tuple[Plan, Path]) -> None:
    asked: list[str] = []
    assert planned(cache, progress=asked.append) == found
    assert asked == []
    again = planned(cache, fresh=True, specs=("naive",), progress=asked.append)
    assert again == naive[0]
    assert again.answers == found.answers[: len(AXES)]
    assert len(asked) == len(set(asked)) == len(naive[1].read_text().split("{")) - 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole.replace(b"{", b"\xff{"),
        lambda whole: b"[1]\n{}\nnull\n" + whole.replace(b'"allocated": ', b'"allocated": null, "was": '),
        lambda whole: whole.replace(b'"reserved": ', b'"reserved": 0.'),
    ],
    ids=["cut off", "not UTF-8", "other keys", "other types"],
)
def test_a_damaged_cache_is_rebuilt(naive: tuple[Plan, Path], tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    damaged = tmp_path / "probes.jsonl"
    damaged.write_bytes(damage(naive[1].read_bytes()))
    asked: list[str] = []
    assert planned(damaged, specs=("naive",), progress=asked.append) == naive[0]
    assert asked
    asked.clear()
    assert planned(damaged, specs=("naive",), progress=asked.append) == naive[0]
    assert asked == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "probes.jsonl", tmp_path / "folder"):
        cache, figures = ProbeCache(path), ProbedBytes(allocated=1, reserved=2, fixed=3)
        assert cache.get("key") is None
        cache.put("key", figures)
        assert cache.get("key") == figures


def test_an_interrupted_run_keeps_its_probes(naive: tuple[Plan, Path], tmp_path: Path) -> None:
    first: list[str] = []

    def interrupt(what: str) -> None:
        if len(first) == 4:
            raise KeyboardInterrupt
        first.append(what)

    with pytest.raises(KeyboardInterrupt):
        planned(tmp_path / "probes.jsonl", specs=("naive",), progress=interrupt)
    second: list[str] = []
    assert planned(tmp_path / "probes.jsonl", specs=("naive",), progress=second.append) == naive[0]
    assert len(first) == 4
    assert second
    assert not set(first) & set(second)


class ReadsBack:
    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        return load_strategy("naive").backward(cut, heads, targets, weights) * weights[0].item()


class Mine:
    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        return load_strategy("naive").backward(cut, heads, targets, weights)


def test_strategies_from_elsewhere(found: Plan, cache: Path) -> None:
    strategies = {"x:ReadsBack": ReadsBack(), "x:Mine": Mine()}
    asked: list[str] = []
    for _ in range(2):
        prober = Prober(PROFILE, GPU, strategies, ProbeCache(cache), asked.append)
        plan_ = plan(prober, PROFILE, BASE, LIMIT, list(strategies))
        assert list(plan_.left_out) == ["x:ReadsBack"]
        assert "it needs real data or a GPU kernel" in plan_.left_out["x:ReadsBack"]
        assert [a.figures for a in plan_.answers] == [a.figures for a in found.answers if a.strategy == "naive"]
    half = len(asked) // 2
    assert asked[:half] == asked[half:]  # their code may have changed: nothing of them is kept


def answered(needs: Callable[[int], int], limit: int, start: int, top: int | None) -> tuple[Answer, int]:
    axis: Axis = "n" if top else "batch"
    base = Point(batch=1, sequence=128, n=1)
    running = search("s", axis, dataclasses.replace(base, **{axis: start}), limit, top)
    point, probes = next(running), 0
    while True:
        probes += 1
        k = getattr(point, axis)
        assert 1 <= k <= (top or k)
        try:
            point = running.send(ProbedBytes(allocated=needs(k), reserved=needs(k), fixed=needs(0)))
        except StopIteration as stop:
            return stop.value, probes


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**4)), min_size=1, max_size=4),
    limit=st.integers(1, 3 * 10**6),
    start=st.integers(1, 64),
    top=st.none() | st.integers(64, 100),
)
def test_the_search_finds_the_largest(lines: list[tuple[int, int]], limit: int, start: int, top: int | None) -> None:
    # A peak is the largest of several moments, each of which grows in a line.
    def needs(k: int) -> int:
        return max(fixed + slope * k for fixed, slope in lines)

    answer, probes = answered(needs, limit, start, top)
    assert probes <= 30
    if not answer.fits:
        assert needs(1) > limit
        return
    assert needs(answer.value) <= limit
    if answer.next_point is None:
        assert answer.value == top
    else:
        assert needs(answer.value + 1) > limit


def test_a_search_begins_where_the_closed_forms_end() -> None:
    for spec, axis in (("sequential", "batch"), ("chunked_tokens", "sequence"), ("naive", "n")):
        first = hint(PROFILE, spec, axis, BASE, LIMIT)  # type: ignore[arg-type]
        assert first is not None
        unit = SEQUENCE_STEP if axis == "sequence" else 1
        near = dataclasses.replace(BASE, **{axis: first * unit})
        far = dataclasses.replace(BASE, **{axis: 2 * first * unit})
        if axis != "n":
            added = 2 * GPU.workspace_bytes  # which no closed form holds
            assert 0.7 * LIMIT < allocated(spec, near) < LIMIT + 1.1 * added < allocated(spec, far)
    assert hint(PROFILE, "naive", "batch", BASE, 1) == 1
    assert hint(PROFILE, "no_such:Strategy", "batch", BASE, LIMIT) is None


def test_more_heads_may_need_less() -> None:
    # With a trunk that gives its layers to the heads, the largest n can fit where smaller ones do not.
    answer, probes = answered(lambda n: 1000 - 10 * n, 700, 8, 32)
    assert (answer.value, answer.next_point, probes) == (32, None, 1)


SHAPE = """
[model]
vocab_size = 32000
dim = 512
n_layers = 3
n_attention_heads = 8
[workload]
batch = 1
sequence = 4096
dtype = "bf16"
tokenizer = "uniform"
[sweep]
n = [1, 3]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "shape.toml").write_text(SHAPE)
    (folder / "large.toml").write_text(SHAPE.replace("dim = 512", "dim = 8192").replace("n_layers = 3", "n_layers = 9"))
    return folder


def run(folder: Path, *args: str, columns: int = 120) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": str(columns), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "mtp_mem", "plan", *args]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_json(folder: Path) -> None:
    asked = ("--profile", "shape.toml", "--gpu", "L4", "--strategies", "naive,sequential,liger")
    answer = run(folder, *asked, "--out", "kept", "--json")
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    document = json.loads(answer.stdout)
    assert document["limit_bytes"] == 23622320128 * 95 // 100
    naive, sequential = document["largest_batch"]
    assert (naive["strategy"], naive["n"], naive["sequence"]) == ("naive", 3, 4096)
    assert 1 <= naive["batch"] < sequential["batch"]
    for axis in AXES:
        for row in document[f"largest_{axis}"]:
            assert row["fits"] in ("yes", "tight")
            assert row["left_bytes"] == document["limit_bytes"] - row["peak_allocated_bytes"] >= 0
            assert row["next"] is None or row["next"]["fits"] == "no"
    assert [row["strategy"] for row in document["left_out"]] == ["liger"]
    assert "liger" in document["left_out"][0]["reason"]
    assert document["recommended"] == {"strategy": "sequential", "axis": "batch"}
    files = [folder / path for path in document.pop("files")]
    assert [path.name for path in files] == ["plan.json", *(f"largest-batch{end}" for end in (".png", ".svg", ".csv"))]
    assert json.loads(files[0].read_text()) == document
    by_n = {(row["strategy"], row["n"]): row["batch"] for row in document["largest_batch_by_n"]}
    assert set(by_n) == {(spec, n) for spec in ("naive", "sequential") for n in (1, 3)}
    assert by_n["naive", 3] == naive["batch"] < by_n["naive", 1]
    assert main(["chart", str(files[0]), "--out", str(folder / "again")]) == 0
    assert (folder / "again/largest-batch.csv").read_bytes() == files[3].read_bytes()


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits(folder: Path, columns: int) -> None:
    answer = run(folder, "--profile", "shape.toml", "--gpu", "l4", "--strategies", "naive,liger", columns=columns)
    assert answer.returncode == 0, answer.stderr
    assert max(map(len, answer.stdout.splitlines())) <= columns
    assert "…" not in answer.stdout
    said = " ".join(answer.stdout.split())
    assert ("next misses" in said) == (columns == 120)
    for words in ("not measured on one", "liger is left out: strategy 'liger'", "Use naive: batch"):
        assert words in said


def test_says_by_how_much_nothing_fits(folder: Path) -> None:
    answer = run(folder, "--profile", "large.toml", "--gpu", "l4", "--n", "2", "--strategies", "sequential")
    assert answer.returncode == 0, answer.stderr
    said = " ".join(answer.stdout.split())
    assert "none" in said
    assert "No batch fits: sequential misses" in said
    assert "GiB at 1" in said
    assert "Nothing fits: take a larger GPU" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpu", "h300"], "unknown GPU 'h300'; did you mean 'h200'? Valid: a100-40gb"),
        (["--profile", "llama3-9b"], "unknown profile 'llama3-9b'; did you mean 'llama3-8b'?"),
        (["--strategies", "sequentia"], "unknown strategy 'sequentia'; did you mean 'sequential'?"),
        (["--headroom", "95%"], "--headroom 95%: expected a percentage from 0% to 90%"),
        (["--headroom=-1"], "--headroom -1: expected a percentage"),
        (["--headroom", "nan"], "--headroom nan: expected a percentage"),
        (["--headroom", "4GiB"], "--headroom 4GiB: expected a percentage"),
        (["--dtype", "fp32"], "cannot be predicted: only bf16"),
        (["--n", "1,4"], "--n 1,4: expected one number of heads"),
        (["--n", "33"], "valid: n from 1 to 32"),
        (["--n", "0"], "model.n_future = 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(folder: Path, args: list[str], words: str) -> None:
    answer = run(folder, *args)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


def test_no_strategy_that_can_be_loaded(folder: Path) -> None:
    answer = run(folder, "--strategies", "liger,cce")
    assert answer.returncode == 3
    assert "no strategy can be predicted here: strategy 'liger'" in answer.stderr
    assert answer.stderr.count("\n") == 1
