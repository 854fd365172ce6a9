"""`--hf` and `--model`: the user's own model in the commands, and what is wrong with it in one line."""

import json
from pathlib import Path

import pytest
import transformers
from command_line import mtp_mem
from model.test_huggingface import TINY

from mtp_mem.report.reproduce import command
from mtp_mem.runs.record import Record

MINE = """
import mtp_mem
from torch import nn

print("mine is loaded")

class Mine(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n_future, self.vocab_size, self.dim = n, 301, 32
        self.embedding = nn.Embedding(301, 32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.mtp = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(n))
        self.norm, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 301, bias=False)

    def trunk(self, tokens):
        return self.body(self.embedding(tokens))

    def heads(self, z, phase=mtp_mem.no_phase):
        return mtp_mem.heads(layers=list(self.mtp), norm=self.norm, unembedding=self.lm_head, phase=phase)

def build(n):
    print("the model is made")
    return Mine(n)

def no_model(n):
    return nn.Linear(2, 2)

def another_n(n):
    return Mine(7)

def no_width(n):
    model = Mine(n)
    model.dim = None
    return model

def raises(n):
    raise ValueError("no such size")

class Fails(Mine):
    def trunk(self, tokens):
        raise ValueError("no such tokens")

def sparse(n):
    model = Mine(n)
    model.embedding.sparse = True
    return model
"""
STEP = ("--batch", "2", "--sequence", "16", "--strategies", "naive,sequential")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(transformers.LlamaConfig(**TINY).to_dict()))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def test_a_model_with_dropout_drops_in_its_steps_but_not_while_gradients_are_compared(folder: Path) -> None:
    settings = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=4, n_head=4, n_positions=64).to_dict()
    assert settings["resid_pdrop"] == 0.1
    (folder / "gpt2.json").write_text(json.dumps(settings | {"architectures": ["GPT2LMHeadModel"]}))
    options = ("--hf", "gpt2.json", "--n", "2", "--dtype", "fp32", *STEP)
    ran = mtp_mem(folder, "compare", *options, "--rounds", "1", "--json")
    assert ran.returncode == 0, ran.stderr
    records = json.loads(ran.stdout)["records"]
    assert [record["gradient"] for record in records] == ["bit-identical"] * 2
    # The bytes are those of training: masks are in them.
    without = settings | {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    (folder / "gpt2.json").write_text(json.dumps(without | {"architectures": ["GPT2LMHeadModel"]}))
    ran = mtp_mem(folder, "compare", *options, "--rounds", "1", "--json")
    dry = json.loads(ran.stdout)["records"]
    assert all(a["peak_requested_bytes"] > b["peak_requested_bytes"] for a, b in zip(records, dry, strict=True))
    (folder / "gpt2.json").write_text(json.dumps(settings | {"architectures": ["GPT2LMHeadModel"]}))
    verified = mtp_mem(folder, "verify", *options)
    assert verified.returncode == 0, verified.stdout
    assert "Right: 2 checks, none failed. Bit-identical" in verified.stdout


@pytest.mark.parametrize("command", ["predict", "verify", "timeline"])
def test_a_model_that_fails_in_its_step_and_a_size_that_torch_refuses_are_named(folder: Path, command: str) -> None:
    ended = mtp_mem(folder, command, "--model", "mine:Fails", "--n", "2")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("mtp-mem: --model mine:Fails: ValueError: no such tokens (mine.py:")
    settings = transformers.LlamaConfig(**TINY).to_dict() | {"head_dim": -16}
    (folder / "negative.json").write_text(json.dumps(settings))
    ended = mtp_mem(folder, command, "--hf", "negative.json", "--n", "2")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "transformers cannot make it: RuntimeError: Trying to create tensor with negative dimension" in ended.stderr


@pytest.mark.parametrize("model", [("--hf", "config.json"), ("--model", "mine:build")], ids=["hf", "model"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prediction_is_what_the_run_takes(folder: Path, model: tuple[str, ...], precision: str) -> None:
    options = (*model, *STEP, "--n", "3", "--dtype", precision, "--json")
    ran = mtp_mem(folder, "compare", *options, "--rounds", "1")
    assert ran.returncode == 0, ran.stderr
    done = json.loads(ran.stdout)["records"]
    assert [r["gradient"] for r in done] == ["bit-identical"] * 2
    predicted = mtp_mem(folder, "predict", *options, "--gpu", "h200")
    assert predicted.returncode == 0, predicted.stderr
    records = json.loads(predicted.stdout)["records"]
    assert [r["parameters"] for r in records] == [r["parameters"] for r in done]
    lines = command([Record.from_json(record) for record in records]).splitlines()
    assert lines[-1] == (
        f"mtp-mem predict {' '.join(model)} {'--kind parallel ' if model[0] == '--hf' else ''}--batch 2 --sequence 16"
        f" --dtype {precision} --n 3 --strategies naive,sequential --gpu h200"
    )


def test_a_name_that_no_profile_may_have(folder: Path) -> None:
    (folder / "_mine.py").write_text(MINE)
    long = folder / f"_{'x' * 200}"
    long.mkdir()
    (folder / "config.json").rename(long / "config.json")
    for model, name in (("--model=_mine:build", "mine-build"), (f"--hf={long}", 100 * "x")):
        ended = mtp_mem(folder, "predict", model, *STEP, "--n", "1")
        assert ended.returncode == 0, ended.stderr
        assert (folder / "results" / f"predict-{name}-h200").is_dir()


def test_timeline_plan_and_verify(folder: Path) -> None:
    shown = mtp_mem(folder, "timeline", "--hf", ".", "--n", "2", "--sequence", "16", "--kind", "deepseek", "--out", "t")
    assert shown.returncode == 0, shown.stderr
    assert (folder / "t" / "timeline.png").exists()
    small = ("--gpu", "t4", "--gpu-memory", "30MiB", "--n", "2", "--strategies", "sequential")
    planned = mtp_mem(folder, "plan", "--hf", "config.json", "--sequence", "16", *small)
    assert planned.returncode == 0, planned.stderr
    assert "Use sequential: batch" in planned.stdout
    verified = mtp_mem(folder, "verify", "--model", "mine:build", *STEP, "--n", "2", "--dtype", "fp32")
    assert verified.returncode == 0, verified.stderr
    assert "Right: 2 checks, none failed." in verified.stdout
    verified = mtp_mem(folder, "verify", "--hf", ".", *STEP, "--n", "2", "--trunk-checkpointing", "full")
    assert verified.returncode == 0, verified.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "mine:no_model"), "returns a Linear without n_future, vocab_size, dim, trunk, heads"),
        (("--model", "mine:another_n"), "returns a model with n_future = 7"),
        (("--model", "mine:raises"), "mine:raises(1): ValueError: no such size"),
        (("--model", "mine:no_width"), "--model mine:no_width: vocab_size = 301, dim = None: expected whole numbers"),
        (("--model", "math:sqrt"), "--model math:sqrt: module 'math' has no source"),
        (("--model", "mine:sparse"), "embedding makes sparse gradients"),
        (("--model", "mine:none"), "module 'mine' has no function 'none'"),
        (("--model", "nowhere:build"), "no module 'nowhere'"),
        (("--model", "mine"), "expected package.module:function"),
        (("--model", "mine:build", "--kind", "causal"), "--kind is an option of --hf"),
        (("--model", "mine:build", "--trunk-checkpointing", "full"), "Mine has no method checkpoint_trunk"),
        (("--model", "mine:build", "--frozen", "heads"), "unknown part 'heads'"),
        (("--hf", "nowhere.json"), "nowhere.json: cannot be read"),
        (("--hf", "mine.py"), "mine.py: not a whole JSON object"),
        (("--hf", "config.json", "--profile", "quick"), "not allowed with argument"),
        (("--hf", "config.json", "--kind", "twisted"), "invalid choice: 'twisted'"),
    ],
)
def test_bad_input_is_named(folder: Path, options: tuple[str, ...], words: str) -> None:
    ended = mtp_mem(folder, "predict", *options)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
