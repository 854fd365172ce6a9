"""The verifier: passes what is right, names what is wrong, and catches every shipped broken strategy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import mtp_mem

import mtp_mem as package
from mtp_mem.config.schema import ALL_DTYPES
from mtp_mem.strategy import load_strategy, loadable, loss_options
from mtp_mem.verification.broken_conduct import ALL_BROKEN
from mtp_mem.verification.problem import build, oracle, run
from mtp_mem.verification.scenarios import REAL_SIZES, SCENARIOS, Scenario
from mtp_mem.verification.verify import verify

RIGHT = [spec for spec in loadable() if spec != "auto"]  # which is one of the others


def test_right_strategies_pass_and_are_identical_wherever_the_order_allows_it() -> None:
    verified = verify(RIGHT)
    assert [check.explain() for check in (*verified.failures, *verified.unchecked)] == []
    for spec in RIGHT:
        takes = set(loss_options(load_strategy(spec)))
        taken = [s for s in (*SCENARIOS, *REAL_SIZES) if takes.issuperset(s.options.used)]
        assert len(verified.of(spec)) == 2 + sum(len(scenario.dtypes) for scenario in taken)
    assert verified.passed
    for spec in ("sequential", "checkpointed"):
        assert [c.explain() for c in verified.of(spec) if c.exact and not c.identical] == []


def test_by_default_it_verifies_everything_that_can_be_loaded() -> None:
    result = package.verify(dtypes=["fp64"], scenarios=SCENARIOS[:1])
    assert list(dict.fromkeys(check.strategy for check in result.checks)) == loadable()
    assert result.passed


def test_one_thread_sums_otherwise_and_is_right() -> None:
    # With one thread native's fp32 loss of n = 1 is 1.9e-7 off, more than the rule allows one that is not rounded.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        verification = verify(
            loadable(), dtypes=["fp32"], scenarios=[s for s in SCENARIOS if s.name in ("n = 1", "n = 8")]
        )
    finally:
        torch.set_num_threads(threads)
    assert [check.explain() for check in verification.failures] == []


def test_the_oracle_is_right_about_a_gradient_that_can_be_written_down() -> None:
    # One head, one position with a target: d loss / d logits = softmax - onehot, so dW = (softmax - onehot) h^T.
    problem = build(Scenario(name="by hand", n=1, batch=1, sequence=2, scale=3.0), "fp64", torch.device("cpu"))
    model, batch = problem.model, problem.batches[0]
    outcome = oracle(problem)
    with torch.no_grad():
        z, turn = model.trunk(batch.tokens), model.rotation(batch.tokens)
        hidden = model.norm(model.head_layers[0](z, turn))[0, 0]  # (D,)
        shares = (model.unembedding.weight @ hidden).softmax(0)  # type: ignore[union-attr, operator]
        shares[batch.targets[0, 0, 0]] -= 1
        expected = 3 * shares[:, None] * hidden
    torch.testing.assert_close(outcome.gradients["unembedding.weight"], expected, rtol=1e-12, atol=1e-15)


def test_the_same_dropout_in_every_dtype() -> None:
    dropout = next(scenario for scenario in SCENARIOS if scenario.trunk == "dropout")
    losses = {}
    for dtype in ALL_DTYPES:
        problem = build(dropout, dtype, torch.device("cpu"))
        losses[dtype] = oracle(problem).losses
        assert torch.equal(losses[dtype], oracle(problem).losses)
    torch.testing.assert_close(losses["fp32"], losses["fp64"], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["bf16"], losses["fp64"], rtol=0.05, atol=0)


def test_prefilled_gradients_are_added_to() -> None:
    existing = next(scenario for scenario in SCENARIOS if scenario.name == "existing .grad")
    problem = build(existing, "fp64", torch.device("cpu"))
    nothing_done = run(problem, lambda *_: torch.zeros(3))
    for name, before in problem.gradients.items():
        assert torch.equal(nothing_done.gradients[name], before)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    ended = mtp_mem(tmp_path, "verify", "--strategies", "sequential", "--dtype", "bf16-mixed", columns=80)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "Right: " in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "…" not in ended.stdout


def test_a_wrong_strategy_ends_with_1_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from mtp_mem.verification.broken_strategies import ScaleIgnored as Mine\n")
    done = mtp_mem(tmp_path, "verify", "--strategy", "mine:Mine", "--strategies", "naive", "--dtype", "fp64")
    assert done.returncode == 1
    assert "mine:Mine: upstream scale 0.37, fp64: gradient of " in done.stdout
    assert "2.7 times the right one" in done.stdout
    assert "WRONG: mine:Mine. No other is wrong." in done.stdout
    done = mtp_mem(tmp_path, "verify", "--strategy", "mine:Mine", "--dtype", "fp64", "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["passed"] is False
    assert any(check["scenario"] == "loss weight 0" and not check["passed"] for check in document["checks"])


def test_what_was_checked_before_a_stop_is_shown(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "from mtp_mem.strategies.sequential import Sequential\n"
        "class Stops(Sequential):\n"
        "    def backward(self, cut, *rest):\n"
        "        if cut.shape[1] == 1: os.kill(os.getpid(), signal.SIGTERM)\n"  # in the scenario S = 1
        "        return super().backward(cut, *rest)\n"
    )
    command = [sys.executable, "-m", "mtp_mem", "verify", "--strategy", "mine:Stops", "--dtype", "fp32", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130, done.stderr
    document = json.loads(done.stdout)
    ended = ["6 optimizer steps", "protocol", *(scenario.name for scenario in SCENARIOS)][: len(document["checks"])]
    assert ended[-1] == "S = 1"
    assert [check["scenario"] for check in document["checks"]] == ended
    assert document["summary"] == f"Stopped: of {len(ended)} checks none failed; the others were not run."
    assert document["passed"] is False


def test_every_broken_strategy_is_caught_by_the_check_made_for_it(tmp_path: Path) -> None:
    ended = mtp_mem(tmp_path, "verify", "--prove", columns=80)
    assert ended.returncode == 0
    text = ended.stdout
    assert f"All {len(ALL_BROKEN)} broken strategies were caught." in text
    assert not re.search(r"raised \w+(Error|Exception)", text)  # none of them by an accident of its own
    assert max(map(len, text.splitlines())) <= 80


def test_on_a_profile(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        "[model]\nvocab_size = 300\ndim = 32\nn_layers = 3\nn_attention_heads = 2\n"
        '[workload]\nbatch = 2\nsequence = 16\ntokenizer = "bytes"\n[sweep]\nn = [1, 3]\n'
    )
    asked = ("verify", "--profile", "own.toml", "--strategies", "sequential")
    done = mtp_mem(tmp_path, *asked, "--dtype", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    checks = document["checks"]
    assert document["remarks"] == []
    assert [(c["scenario"], c["dtype"], c["bit_identical"]) for c in checks] == [
        ("own, n = 1", "bf16", True),
        ("own, n = 3", "bf16", True),
    ]
    shown = mtp_mem(tmp_path, *asked, columns=120)
    assert shown.returncode == 0, shown.stderr
    assert "Right: 2 checks, none failed." in shown.stdout
    assert "fp32 (naive's)" in shown.stdout  # a column that 80 have no room for
    assert max(map(len, shown.stdout.splitlines())) <= 120
    (tmp_path / "own.toml").write_text((tmp_path / "own.toml").read_text().replace("sequence = 16", "sequence = 1"))
    nothing = mtp_mem(tmp_path, *asked)
    assert nothing.returncode == 1
    assert "NOT verified: of 2 checks 2 had nothing to check" in nothing.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--strategies", "sequental"], "did you mean 'sequential'?"),
        (["--profile", "quik"], "did you mean 'quick'?"),
        (["--prove", "--strategies", "naive"], "--prove has strategies and scenarios of its own"),
        (["--prove", "--dtype", "fp32"], "--prove has strategies and scenarios of its own"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, args: list[str], words: str) -> None:
    done = mtp_mem(tmp_path, "verify", *args)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
