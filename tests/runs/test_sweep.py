"""What a sweep leaves out: cases that cannot fit on a CUDA device, and what a budget does not reach."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixed import ENVIRONMENT
from small import tiny

from mtp_mem import Profile, Sweep, Workload, load_profile
from mtp_mem._util import GiB
from mtp_mem.cli import main
from mtp_mem.config.gpus import load_gpu
from mtp_mem.data import load_corpus
from mtp_mem.runs import sweep

SMALL = """
[model]
vocab_size = 256
dim = 32
n_layers = 4
n_attention_heads = 2
[workload]
batch = 1
sequence = 16
tokenizer = "bytes"
[sweep]
n = [1, 2, 3]
strategies = ["sequential"]
rounds = 1
"""


def test_what_cannot_fit_by_closed_form() -> None:
    profile = load_profile("llama3-8b")
    config = profile.model.with_n(4)
    reason = sweep.refusal("naive", config, profile.workload, load_gpu("l4").total_bytes)
    assert reason is not None
    assert reason.startswith("refused before the run: needs ")
    assert reason.endswith(" GiB by closed form, the device has 22.0 GiB")
    for spec in profile.sweep.strategies:
        assert sweep.refusal(spec, config, profile.workload, load_gpu("h200").total_bytes) is None
    # Without a closed form the case is tried.
    assert sweep.refusal("my_module:Class", config, profile.workload, GiB) is None
    assert sweep.refusal("naive", tiny(head="causal"), profile.workload, 1) is None
    assert sweep.refusal("naive", tiny(logit_softcap=30.0), Workload(batch=1, sequence=8), 1) is None


def test_a_refused_case_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile(
        name="small",
        model=tiny(),
        workload=Workload(batch=2, sequence=24, tokenizer="bytes"),
        sweep=Sweep(n=(1, 2), strategies=("naive",), rounds=1),
    )
    corpus = load_corpus(profile.workload, profile.model.vocab_size)
    todo = sweep.cases(profile, corpus, torch.device("cpu"))
    monkeypatch.setattr(sweep, "environment", lambda _: ENVIRONMENT)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1000))
    records = list(sweep.run(profile, corpus, torch.device("cuda"), todo, lambda _: None))
    assert [(record.n, record.status, record.backend) for record in records] == [(1, "oom", "cuda"), (2, "oom", "cuda")]
    assert all("refused before the run" in (record.error or "") for record in records)
    assert [record.case for record in records] == [case.id for case in todo]


def test_a_spent_budget_keeps_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    out = tmp_path / "out"
    command = ["compare", "--profile", str(tmp_path / "small.toml"), "--device", "cpu", "--out", str(out), "--json"]
    for finished in (1, 2):
        assert main([*command, "--budget-minutes", "1e-9"]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        last_line = printed.err.splitlines()[-1]
        assert last_line.startswith(f"the budget of 1e-09 min is spent: {finished} of 3 cases are in {out}")
        assert last_line.endswith("the same command runs the others")
    assert main([*command, "--budget-minutes", "1e-9", "--fresh"]) == 1
    assert capsys.readouterr().err.endswith("with --fresh the same command begins again\n")
    assert main([*command, "--budget-minutes", "1e-9"]) == 0
    assert [record["n"] for record in json.loads(capsys.readouterr().out)["records"]] == [1, 2, 3]
    for minutes in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit, match="2"):
            main([*command, f"--budget-minutes={minutes}"])
