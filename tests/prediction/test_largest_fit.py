"""Every answer of `plan` fits, and the next larger one does not: held against predictions of models of their own."""

import dataclasses
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import tiny

from mtp_mem import Workload, load_strategy
from mtp_mem._util import GiB, MiB
from mtp_mem.cli import main
from mtp_mem.cli import plan as cli_plan
from mtp_mem.config import schema
from mtp_mem.config.gpus import load_gpu
from mtp_mem.config.schema import Profile, Sweep
from mtp_mem.prediction import largest_fit
from mtp_mem.prediction.largest_fit import (
    AXES,
    SEQUENCE_STEP,
    Axis,
    Plan,
    Point,
    ProbedBytes,
    Prober,
    advice,
    plan,
    search,
)
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.simulated_step import simulate

SPECS = ("naive", "sequential", "chunked_tokens")
GPU = load_gpu("l4")
PROFILE = Profile(
    name="tiny",
    model=tiny(vocab_size=4099, n_layers=4),
    workload=Workload(batch=2, sequence=256, dtype="bf16"),
    sweep=Sweep(n=(3,)),
)
BASE = Point(batch=2, sequence=256, n=3)
FARTHEST = 2**20
LIMIT = 64 * MiB  # two cuBLAS workspaces, 16.2 MiB, are in it


def planned(*, limit: int = LIMIT, specs: tuple[str, ...] = SPECS) -> Plan:
    return plan(Prober(PROFILE, GPU, {s: load_strategy(s) for s in specs}, lambda _: None), BASE, limit)


def allocated(spec: str, point: Point) -> int:
    """By a prediction that shares no model, no cache and no search with the plan."""
    workload = dataclasses.replace(PROFILE.workload, batch=point.batch, sequence=point.sequence)
    trace = simulate(PROFILE.model.with_n(point.n), workload, load_strategy(spec), gpu=GPU)
    nbytes: int = predicted(trace, GPU)["peak_allocated_bytes"]
    return nbytes


@pytest.fixture(scope="module")
def plans() -> Plan:
    return planned()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("spec", SPECS)
def test_the_answer_fits_and_the_next_one_does_not(plans: Plan, spec: str, axis: Axis) -> None:
    (answer,) = [a for a in plans.of(axis) if a.strategy == spec]
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


def test_the_answers_are_not_all_alike(plans: Plan) -> None:
    # or the test above would say little: naive runs out of memory where the others do not
    n = {a.strategy: a.value for a in plans.of("n")}
    assert n["naive"] < n["sequential"] == 4
    batch = {a.strategy: a.value for a in plans.of("batch")}
    assert batch["naive"] < batch["sequential"] < batch["chunked_tokens"]
    assert plans.recommended() in plans.of("batch")
    assert f"where naive stops at {batch['naive']}" in advice(plans)


def test_nothing_fits() -> None:
    plan = planned(limit=20 * MiB, specs=("naive",))
    assert [(a.axis, a.fits, a.next_point) for a in plan.answers] == [(x, False, None) for x in AXES]
    for answer in plan.answers[:2]:
        assert answer.value == (1 if answer.axis == "batch" else SEQUENCE_STEP)
        assert plan.left(answer) == 20 * MiB - allocated("naive", answer.point) < 0
    assert plan.recommended() is None


class ReadsBack:
    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        return load_strategy("naive").backward(cut, heads, targets, weights) * weights[0].item()


class Raises:
    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        raise ValueError("not today")


class Mine:
    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        return load_strategy("naive").backward(cut, heads, targets, weights)


def test_strategies_from_elsewhere(plans: Plan) -> None:
    strategies = {"x:ReadsBack": ReadsBack(), "x:Mine": Mine(), "x:Raises": Raises()}
    asked: list[str] = []
    own = plan(Prober(PROFILE, GPU, strategies, asked.append), BASE, LIMIT)
    assert list(own.left_out.reasons) == ["x:ReadsBack", "x:Raises"]
    assert own.left_out.reasons["x:Raises"].startswith("ValueError: not today (")
    assert own.left_out.failed == ["x:Raises"]  # what cannot be predicted is no failure
    assert "it needs real data or a GPU kernel" in own.left_out.reasons["x:ReadsBack"]
    assert [a.figures for a in own.answers] == [a.figures for a in plans.answers if a.strategy == "naive"]
    assert len(asked) == len(set(asked))  # each step is simulated once


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**4)), min_size=1, max_size=4),
    off=st.none() | st.integers(-(10**5), 10**5),
    limit=st.integers(1, 3 * 10**6),
    start=st.integers(1, 64),
    top=st.none() | st.integers(64, 100),
)
def test_the_search_finds_the_largest(
    lines: list[tuple[int, int]], off: int | None, limit: int, start: int, top: int | None
) -> None:
    # A peak is the largest of several moments, each of which grows in a line; the closed form is off, or there is none.
    def needs(k: int) -> int:
        return max(fixed + slope * k for fixed, slope in lines)

    known = search(
        lambda k: ProbedBytes(allocated=needs(k), reserved=needs(k)),
        lambda k: None if off is None else needs(k) + off,
        limit,
        top,
        start,
        end=FARTHEST,
    )
    assert len(known) <= (4 if off is not None else 45)
    fitting = [k for k in known if needs(k) <= limit]
    assert all(1 <= k <= (top or k) for k in known)
    if fitting:
        assert max(fitting) in (top, FARTHEST) or max(fitting) + 1 in known
    else:
        assert needs(1) > limit
        assert 1 in known


def test_a_closed_form_that_is_off_everywhere_costs_probes_but_no_answer() -> None:
    def needs(k: int) -> ProbedBytes:
        return ProbedBytes(allocated=k * k, reserved=k * k)

    known = search(needs, lambda k: 40 * k, 10_000, top=None, start=1, end=FARTHEST)
    assert {100, 101} <= set(known)
    assert len(known) < 25


@pytest.mark.parametrize(("fixed", "slope"), [(0, 1), (10**6, 7), (10**5, 3 * 10**4), (10**5, 9 * 10**5)])
def test_without_a_closed_form_a_search_follows_the_line_through_what_it_knows(fixed: int, slope: int) -> None:
    def needs(k: int) -> ProbedBytes:
        return ProbedBytes(allocated=fixed + slope * k, reserved=0)

    known = search(needs, lambda _: None, 1_040_000, top=None, start=3, end=FARTHEST)
    largest = (1_040_000 - fixed) // slope
    assert {largest, largest + 1} <= set(known)
    assert len(known) <= 9


def test_a_search_begins_where_the_closed_forms_end() -> None:
    asked: list[str] = []
    plan(Prober(PROFILE, GPU, {"sequential": load_strategy("sequential")}, asked.append), BASE, LIMIT)
    assert len(asked) <= 4 * len(AXES)


def test_more_heads_may_need_less() -> None:
    # With a trunk that gives its layers to the heads, the largest n can fit where smaller ones do not.
    def needs(n: int) -> ProbedBytes:
        return ProbedBytes(allocated=1000 - 10 * n, reserved=0)

    known = search(needs, lambda _: None, 700, top=32, start=8, end=FARTHEST)
    assert list(known) == [32]


def test_n_ends_where_more_heads_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (schema, largest_fit, cli_plan):
        monkeypatch.setattr(module, "MOST_MODULES", 6, raising=False)
    profile = dataclasses.replace(PROFILE, model=tiny(vocab_size=301, n_layers=4, head="linear"))
    result = plan(Prober(profile, GPU, {"sequential": load_strategy("sequential")}, lambda _: None), BASE, LIMIT, ["n"])
    (answer,) = result.answers
    assert (answer.fits, answer.value, answer.next_point) == (True, 6, None)
    cli_plan.show(result, profile, GPU, 5.0)
    assert "n = 6: more heads are not tried." in capsys.readouterr().out


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


def run(folder: Path, *args: str, columns: int = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `mtp-mem plan` with these arguments, run in the folder."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("COLUMNS", str(columns))
        return main(["plan", *args]), out.getvalue(), err.getvalue()


def test_json(folder: Path) -> None:
    asked = ("--profile", "shape.toml", "--gpu", "L4", "--strategies", "naive,sequential,liger")
    code, out, err = run(folder, *asked, "--out", "kept", "--json")
    assert code == 0, err
    assert err == ""
    document = json.loads(out)
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
    code, out, err = run(
        folder, "--profile", "shape.toml", "--gpu", "l4", "--strategies", "naive,liger", columns=columns
    )
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    said = " ".join(out.split())
    assert ("next misses" in said) == (columns == 120)
    for words in ("not measured on one", "liger is left out: strategy 'liger'", "Use naive: batch"):
        assert words in said


def test_says_by_how_much_nothing_fits(folder: Path) -> None:
    asked = ("--profile", "large.toml", "--gpu", "l4", "--n", "2", "--strategies", "sequential")
    code, out, err = run(folder, *asked, "--json")
    assert code == 0, err
    alone = json.loads(out)["before_a_step_bytes"]
    assert alone > 22 * GiB
    assert json.loads(out)["largest_batch"] == []
    code, out, err = run(folder, *asked, "--out", "nothing")
    assert code == 0, err
    assert "Nothing fits: weights and optimizer state alone take" in out
    assert out.endswith("plan nothing/plan.json\n")  # and no chart: there is nothing to draw
    code, out, err = run(folder, *asked, "--gpu-memory", f"{alone * 11 // 10}B")
    assert code == 0, err
    said = " ".join(out.split())
    assert "none" in said
    assert "No batch fits: sequential is" in said
    assert "GiB over at 1" in said
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
        (["--headroom", "1e999999999"], "--headroom 1e999999999: expected a percentage"),
        (["--headroom", "4GiB"], "--headroom 4GiB: expected a percentage"),
        (["--dtype", "fp64"], "cannot be predicted: no fused attention"),
        (["--n", "1,4"], "--n 1,4: expected one number of heads"),
        (["--n", "33"], "valid: n from 1 to 32"),
        (["--n", "0"], "model.n_future = 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(folder: Path, args: list[str], words: str) -> None:
    code, out, err = run(folder, *args)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert out == ""


def test_no_strategy_that_can_be_loaded(folder: Path) -> None:
    code, _, err = run(folder, "--strategies", "liger,cce")
    assert code == 3
    assert "no strategy can be predicted here: strategy 'liger'" in err
    assert err.count("\n") == 1
