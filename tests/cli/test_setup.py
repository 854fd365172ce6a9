"""Options for the training setup, the step and the GPU: in the record, and errors that name them."""

import json
from pathlib import Path

import pytest
from command_line import mtp_mem

from mtp_mem.cli import main

PROFILE = """
[model]
vocab_size = 256
dim = 32
n_layers = 3
n_attention_heads = 2
[workload]
batch = 2
sequence = 16
dtype = "bf16"
tokenizer = "uniform"
[sweep]
n = [2]
strategies = ["naive", "sequential"]
rounds = 1
"""
GPUS = '[mine]\nname = "Mine"\ntotal_bytes = 1000000000\nworkspace_bytes = 0\nmultiprocessors = 4\nsource = "a test"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(PROFILE)
    (tmp_path / "gpus.toml").write_text(GPUS)
    return tmp_path


OPTIONS = {
    "--trunk-checkpointing=full": ("trunk_checkpointing", "full"),
    "--trunk-checkpointing=2": ("trunk_checkpointing", 2),
    "--optimizer=adamw-foreach": ("optimizer", "adamw-foreach"),
    "--micro-batches=3": ("micro_batches", 3),
    "--frozen=trunk": ("frozen", ["trunk"]),
    "--frozen=embedding, norm": ("frozen", ["embedding", "norm"]),
    "--set-to-none=false": ("set_to_none", False),
    "--precision=bf16 + fp32 master": ("precision", "bf16 + fp32 master"),
    "--dtype=bf16-mixed": ("precision", "bf16-mixed"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("command", ["compare", "predict"])
def test_a_setup_is_run_and_recorded(folder: Path, command: str, option: str) -> None:
    ended = mtp_mem(folder, command, "--profile", "small.toml", "--json", "--out", "out", option)
    assert ended.returncode == 0, ended.stderr
    name, value = OPTIONS[option]
    for record in json.loads(ended.stdout)["records"]:
        assert record["training"][name] == value
        assert record["status"] == "ok"
        if command == "compare":
            assert record["gradient"] == "bit-identical"


def test_another_setup_is_another_case(folder: Path) -> None:
    shared = ("compare", "--profile", "small.toml", "--out", "out")
    assert mtp_mem(folder, *shared).returncode == 0
    ended = mtp_mem(folder, *shared, "--micro-batches", "2")
    assert "are in out" not in ended.stderr
    assert "2 micro-batches" in mtp_mem(folder, "report", "out", "--json").stdout + (folder / "report.html").read_text()


def test_the_step_s_own_options(folder: Path) -> None:
    options = ("--batch", "3", "--sequence", "8", "--layers", "5", "--vocab", "300")
    ended = mtp_mem(folder, "predict", "--profile", "small.toml", "--json", *options)
    (record, _) = json.loads(ended.stdout)["records"]
    assert (record["workload"]["batch"], record["workload"]["sequence"]) == (3, 8)
    assert (record["model"]["n_layers"], record["model"]["vocab_size"]) == (5, 300)


@pytest.mark.parametrize(
    ("options", "name", "nbytes"),
    [
        (("--gpu", "gpus.toml:mine"), "Mine", 1_000_000_000),
        (("--gpu", "l4", "--gpu-memory", "24GiB"), "NVIDIA L4 with 24.0 GiB", 24 * 2**30),
        (("--gpu-memory", "8GB"), "NVIDIA H200 with 7.45 GiB", 8 * 10**9),
    ],
)
def test_a_gpu_that_is_not_in_the_catalogue(folder: Path, options: tuple[str, ...], name: str, nbytes: int) -> None:
    ended = mtp_mem(folder, "predict", "--profile", "small.toml", "--json", *options)
    assert ended.returncode == 0, ended.stderr
    environment = json.loads(ended.stdout)["records"][0]["environment"]
    assert (environment["target"], environment["target_bytes"]) == (name, nbytes)
    if name == "Mine":  # one way of naming a GPU will do for the other commands
        assert mtp_mem(folder, "plan", "--profile", "small.toml", *options).returncode == 0
        assert mtp_mem(folder, "timeline", "--profile", "small.toml", "--out", "t", *options).returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--strategies", ","), "expected at least one name"),
        (("--n", "0"), "sweep.n = [0]"),
        (("--dtype", ""), "precision: unknown value ''"),
        (("--precision", "fp8"), "Valid: fp64, fp32, bf16, bf16-mixed, fp16, bf16 + fp32 master"),
        (("--batch", "0"), "expected a whole number of at least 1"),
        (("--trunk-checkpointing", "half"), "training.trunk_checkpointing"),
        (("--optimizer", "adam"), "did you mean 'adamw'?"),
        (("--frozen", "tronk"), "did you mean 'trunk'?"),
        (("--frozen", "head 7"), "unknown part 'head 7'"),
        (("--frozen", ","), "training.frozen = ',': names no part"),
        (("--micro-batches", "0"), "training.micro_batches = 0: must be from 1 to"),
        (("--micro-batches", "two"), "training.micro_batches = 'two': expected a whole number"),
        (("--set-to-none", "maybe"), "expected true or false"),
        (("--gpu-memory", "much"), "expected a size like 24GiB"),
        (("--gpu", "gpus.toml:yours"), "unknown GPU 'yours'"),
        (("--gpu", "gpus:h200"), "unknown GPU 'gpus:h200'"),
        (("--gpu", "l4,L4"), "two of these would share a folder"),
        (("--gpu", "none.toml:mine"), "none.toml: cannot be read"),
    ],
)
def test_bad_input_is_named(folder: Path, options: tuple[str, ...], words: str) -> None:
    ended = mtp_mem(folder, "predict", "--profile", "small.toml", *options)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('[training]\nprecision = "fp8"', "training.precision: unknown value 'fp8'"),
        ('[training]\nprecision = "fp32"', "one of them is enough"),
        ("[training]\nmicro_batches = true", "expected a whole number"),
        ('[training]\ntrunk_checkpointing = "some"', "expected one of none, full, or a whole number"),
        ("[training]\nfrozen = 3", "expected a string, or a list"),
    ],
)
def test_a_profile_s_training_table(folder: Path, lines: str, words: str) -> None:
    (folder / "bad.toml").write_text(f"{PROFILE}\n{lines}\n")
    ended = mtp_mem(folder, "predict", "--profile", "bad.toml")
    assert ended.returncode == 2
    assert words in ended.stderr


def test_precision_may_stand_in_the_training_table(folder: Path) -> None:
    table = '\n[training]\nprecision = "bf16 + fp32 master"\ntrunk_checkpointing = 2\nfrozen = "all but heads"\n'
    (folder / "own.toml").write_text(PROFILE + table)
    ended = mtp_mem(folder, "predict", "--profile", "own.toml", "--json")
    training = json.loads(ended.stdout)["records"][0]["training"]
    assert (training["precision"], training["trunk_checkpointing"]) == ("bf16 + fp32 master", 2)
    assert training["frozen"] == ["all but heads"]


def test_one_setup_has_one_name_however_it_is_written(folder: Path) -> None:
    setups = ((), ("--frozen", "norm,embedding"), ("--frozen", " embedding, norm,embedding"))
    full = ("--trunk-checkpointing", "full"), ("--trunk-checkpointing", "1")
    cases = []
    for options in (*setups, *full):
        ended = mtp_mem(folder, "predict", "--profile", "small.toml", "--json", *options)
        cases.append(json.loads(ended.stdout)["records"][0]["case"])
    assert cases[1] == cases[2] != cases[0] != cases[3] == cases[4]


@pytest.mark.parametrize(
    "option", [["--z-loss", "1"], ["--kind", "medusa"], ["--set-to-none", "false"], ["--world", "2"], ["--n", "2"]]
)
def test_verify_ignores_no_option(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--strategies", "naive", *option]) == 2
    assert f"{option[0]} needs --profile, --hf or --model" in capsys.readouterr().err
