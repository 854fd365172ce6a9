"""The timeline shows the trace: bands that add up to the live bytes at every event, and the peak's largest tensors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import mtp_mem
from small import tiny

from mtp_mem import Workload, load_strategy
from mtp_mem.cli import main
from mtp_mem.config.gpus import load_gpu
from mtp_mem.prediction.simulated_step import simulate
from mtp_mem.report.charts.timeline import live_by_category, phases


@pytest.mark.parametrize("spec", ["naive", "sequential"])
def test_bands_add_up_to_the_live_bytes(spec: str) -> None:
    config = tiny(n_future=3)
    trace = simulate(config, Workload(batch=2, sequence=32, dtype="bf16"), load_strategy(spec), gpu=load_gpu("h200"))
    total = np.sum(list(live_by_category(trace).values()), axis=0)
    assert total[0] == trace.baseline
    assert total[1:].tolist() == trace.totals()[trace.start :]
    peak = trace.peak()
    assert total.max() == peak.nbytes == total[peak.event - trace.start + 1]
    assert sum(storage.nbytes for storage in peak.live) == peak.nbytes
    assert total[-1] >= trace.baseline  # gradients are left, and the model is not freed in the picture
    names = [name for name, _ in phases(trace)]
    assert names[0] == "trunk forward"
    assert "trunk backward" in names


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "p.toml"
    profile.write_text(
        "[model]\nvocab_size = 4096\ndim = 64\nn_layers = 4\nn_attention_heads = 2\n"
        '[workload]\nbatch = 1\nsequence = 256\ndtype = "bf16"\ntokenizer = "uniform"\n[sweep]\nn = [1, 3]\n'
    )
    for gpu in ([], ["--gpu", "h200"]):
        out = tmp_path / "-".join(["out", *gpu])
        assert main(["timeline", "--profile", str(profile), "--out", str(out), "--json", *gpu]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["n"] == 3
        assert len(document["largest"]) == 10
        assert document["largest"][0]["nbytes"] == 256 * 4096 * 4  # one fp32 tensor (N, V)
        assert sorted(p.name for p in out.iterdir()) == [
            "timeline.csv",
            "timeline.json",
            "timeline.png",
            "timeline.svg",
        ]
        rows = list(csv.DictReader((out / "timeline.csv").open()))
        assert max(int(row["total"]) for row in rows) == document["peak_requested_bytes"]
    assert main(["timeline", "--profile", str(profile), "--gpu", "h200", "--dtype", "fp64"]) == 2
    assert "'fp64' cannot be predicted" in capsys.readouterr().err


def test_a_strategy_that_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "class Raises:\n    def backward(self, *args):\n"
        "        print('a word')\n        raise ValueError('not today')\n"
    )
    for gpu in ([], ["--gpu", "h200", "--profile", "mtp-0.3b"]):
        ended = mtp_mem(tmp_path, "timeline", "--n", "1", "--strategy", "theirs:Raises", *gpu)
        assert ended.returncode == 1
        assert "mtp-mem: strategy 'theirs:Raises': ValueError: not today (theirs.py:4)" in ended.stderr
        assert ended.stdout == ""
