"""`plan --vary`: every setup's bytes are those of its own prediction, and the cheapest that fits is named."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import pytest
from command_line import mtp_mem
from small import tiny

from mtp_mem import Training, Workload, load_strategy
from mtp_mem._util import GiB
from mtp_mem.config.gpus import load_gpu
from mtp_mem.config.schema import Profile, Sweep
from mtp_mem.errors import BadInput
from mtp_mem.prediction.peaks import predicted
from mtp_mem.prediction.setups import Tried, cheapest, setup_advice, try_setups, variations
from mtp_mem.prediction.simulated_step import simulate

GPU = load_gpu("l4")
PROFILE = Profile(
    name="tiny",
    model=tiny(vocab_size=4099, n_layers=6),
    workload=Workload(batch=4, sequence=64, dtype="bf16"),
    sweep=Sweep(n=(2,)),
)
STRATEGIES = {spec: load_strategy(spec) for spec in ("naive", "sequential", "checkpointed")}


@pytest.fixture(scope="module")
def rows() -> list[Tried]:
    vary = ("trunk_checkpointing", "micro_batches")
    rows, left_out = try_setups(PROFILE, GPU, 2, STRATEGIES, vary, lambda _: None)
    assert not left_out.reasons
    return list(rows)


def test_the_step_keeps_its_sequences(rows: list[Tried]) -> None:
    assert {row.training.micro_batches * row.workload.batch for row in rows} == {4}
    assert {row.training.micro_batches for row in rows} == {1, 2, 4}
    assert len(rows) == 3 * 3 * 3


def test_bytes_are_those_of_the_prediction(rows: list[Tried]) -> None:
    for row in rows[::4]:
        trace = simulate(PROFILE.model.with_n(2), row.workload, load_strategy(row.strategy), row.training, gpu=GPU)
        assert row.figures.allocated == predicted(trace, GPU)["peak_allocated_bytes"]


def test_recomputation_is_the_cost(rows: list[Tried]) -> None:
    costs = {(row.strategy, row.training.trunk_checkpointing): row.flops for row in rows}
    assert costs["naive", "none"] == costs["sequential", "none"] == 1
    assert Fraction(1) < costs["naive", 2] < costs["naive", "full"] < Fraction(4, 3)  # type: ignore[operator]
    assert costs["checkpointed", "none"] > 1  # type: ignore[operator]
    assert [row.flops for row in rows] == sorted(row.flops for row in rows)  # type: ignore[type-var]


def test_the_cheapest_that_fits(rows: list[Tried]) -> None:
    for limit in sorted({row.figures.allocated for row in rows}):
        best = cheapest(rows, limit)
        assert best is not None
        assert best.figures.allocated <= limit
        assert not [r for r in rows if r.flops < best.flops and r.figures.allocated <= limit]  # type: ignore[operator]
        assert f"Use {best.strategy} with {best.words}" in setup_advice(rows, limit)
    least = min(row.figures.allocated for row in rows)
    assert cheapest(rows, least - 1) is None
    assert "Nothing fits" in setup_advice(rows, least - 1)
    assert "no more FLOPs" in setup_advice(rows, 100 * GiB)


def test_only_what_divides_the_batch_is_tried() -> None:
    odd = dataclasses.replace(
        PROFILE, workload=dataclasses.replace(PROFILE.workload, batch=3), training=Training(micro_batches=2)
    )
    assert [(t.micro_batches, w.batch) for t, w in variations(odd, ["micro_batches"])] == [(1, 6), (2, 3)]
    with pytest.raises(BadInput, match="--vary: unknown option 'colour'"):
        variations(odd, ["colour"])


class Raises:
    def backward(self, cut, heads, targets, weights):  # type: ignore[no-untyped-def]
        raise ValueError("not today")


def test_a_strategy_that_raises_is_left_out_and_named() -> None:
    strategies = {"x:Raises": Raises(), **STRATEGIES}
    rows, left_out = try_setups(PROFILE, GPU, 2, strategies, ["optimizer"], lambda _: None)
    assert left_out.failed == ["x:Raises"]
    assert left_out.reasons["x:Raises"].startswith("ValueError: not today (")
    assert {row.strategy for row in rows} == set(STRATEGIES)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_command(tmp_path: Path, columns: int) -> None:
    (tmp_path / "shape.toml").write_text(
        "[model]\nvocab_size = 4096\ndim = 64\nn_layers = 4\nn_attention_heads = 2\n"
        '[workload]\nbatch = 2\nsequence = 64\ndtype = "bf16"\ntokenizer = "uniform"\n[sweep]\nn = [2]\n'
    )
    shared = (
        "plan",
        "--profile",
        "shape.toml",
        "--gpu",
        "l4",
        "--strategies",
        "naive,sequential",
        "--vary",
        "trunk_checkpointing",
    )
    ended = mtp_mem(tmp_path, *shared, columns=columns)
    assert ended.returncode == 0, ended.stderr
    assert max(map(len, ended.stdout.splitlines())) <= columns
    assert "checkpointed trunk, 1 x 2, adamw" in " ".join(ended.stdout.split())
    document = json.loads(mtp_mem(tmp_path, *shared, "--json").stdout)
    assert len(document["setups"]) == 6
    assert document["recommended"]["flops"] == 1.0
    assert document["recommended"]["training"]["trunk_checkpointing"] == "none"
    assert mtp_mem(tmp_path, *shared[:-1], "colour").returncode == 2
