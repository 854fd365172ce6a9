"""Every kind of file that somebody else may have written, with a few changes: read, or refused in one line."""

import contextlib
import copy
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import mtp_mem
from fixed import record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_mem import data
from mtp_mem.config.gpus import load_gpu
from mtp_mem.config.other_models import huggingface_profile
from mtp_mem.config.profiles import builtin_folder, load_profile
from mtp_mem.config.schema import Workload
from mtp_mem.errors import BadInput, MtpMemError
from mtp_mem.memory.trace import Event, Storage, Trace
from mtp_mem.model.build import parameters
from mtp_mem.report.draw_files import plan_chart
from mtp_mem.report.timeline_page import drawing, read_timeline
from mtp_mem.runs import check_prediction
from mtp_mem.runs.read_results import groups, read

CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f\u202e]")
NUMBERS = (0, -1, 2**31, 2**62, 2**63, 10**400, 1e308, 1e-320, 0.5)
TEXTS = ("", "x", "\x00", "\x1b[2J", "../../x", "x" * 5000, "NaN", "=cmd|x", "\u202e", "a\nb", "<script>", "fp32")
ODD = st.sampled_from([None, True, *NUMBERS, *TEXTS, [], {}, [[]], {"": 0}, [None], {"a": {"b": 1}}])
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything inside a document, its first items where there are many."""
    inner = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))[:5]
        if isinstance(value, list)
        else []
    )
    return [way for key, item in inner for way in [(*at, key), *places(item, (*at, key))]]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three places changed or gone."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        ways = places(document)
        if not ways:
            break
        *way, last = draw(st.sampled_from(ways))
        table = document
        for key in way:
            table = table[key]
        if draw(st.integers(0, 4)):
            table[last] = copy.deepcopy(draw(ODD))
        else:
            del table[last]
    return document


@st.composite
def written(draw: st.DrawFn, document: Any, dump: Callable[[Any], str] = json.dumps) -> bytes:
    """A mutated document as bytes, which now and then are cut off or hold what is no text."""
    content = dump(draw(mutated(document))).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(content)))
        content = content[:cut] + draw(st.binary(max_size=4)) + content[cut + draw(st.integers(0, 9)) :]
    return content


@contextlib.contextmanager
def one_line_at_most() -> Any:
    """An error of ours is fine, in one line of a bounded length; any other is a bug."""
    said = ""
    try:
        yield
    except MtpMemError as e:
        said = str(e)
    assert not CONTROLS.search(said)
    assert len(said) < 3000


def toml(table: dict[str, Any], at: tuple[str, ...] = ()) -> str:
    """The table as TOML; what TOML has no value for is left out."""
    lines, inner = [], []
    for key, value in table.items():
        if isinstance(value, dict):
            inner.append(f"[{'.'.join(map(json.dumps, (*at, key)))}]\n{toml(value, (*at, key))}")
        elif value is not None and None not in (value if isinstance(value, list) else []):
            lines.append(f"{json.dumps(key)} = {json.dumps(value)}")
    return "\n".join([*lines, *inner]) + "\n"


BENCH = {
    "machine_info": {"mtp_mem": {"device": "cpu", "cpu": "A CPU", "torch": "2.13.0"}},
    "benchmarks": [
        {
            "fullname": f"t[{name}]",
            "stats": {"median": 1.0},
            "extra_info": {"times_floor": 1.3, "peak_over_inputs_bytes": 100},
        }
        for name in "ab"
    ],
}
GPUS = {"mine": {"name": "Mine", "total_bytes": 2**34, "workspace_bytes": 2**23, "multiprocessors": 80, "source": "me"}}
HF = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "torch_dtype": "bfloat16",
}
PROFILE = tomllib.loads((builtin_folder() / "quick.toml").read_text(encoding="utf-8")) | {
    "training": {
        "trunk_checkpointing": 2,
        "optimizer": "sgd",
        "micro_batches": 2,
        "frozen": ["norm"],
        "set_to_none": False,
    }
}


def timeline() -> dict[str, Any]:
    storages = {i: Storage(100 + i, "logits", "head 1 loss", "mm", (10, 10), "fp32", "") for i in range(4)}
    events = [Event("alloc", 1), Event("alloc", 2), Event("free", 1), Event("move", 3, 2), Event("free", 3)]
    return Trace(storages, [0], events).to_json()


@FEW
@given(content=written([record(n=n).to_json() for n in (1, 2)], lambda rows: "\n".join(map(json.dumps, rows))))
def test_results(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.jsonl").write_bytes(content)
    notes: list[str] = []
    with one_line_at_most():
        groups(read([tmp_path], notes), notes)
    assert not [note for note in notes if CONTROLS.search(note)]
    ended = mtp_mem(tmp_path, "regressions", "results.jsonl", "results.jsonl", "--json")
    assert ended.returncode in (0, 2)
    assert "Traceback" not in ended.stderr


@FEW
@given(content=written(BENCH))
def test_benchmarks(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "old.json").write_text(json.dumps(BENCH))
    (tmp_path / "new.json").write_bytes(content)
    for files in (("old.json", "new.json"), ("new.json", "old.json")):
        ended = mtp_mem(tmp_path, "regressions", *files)
        assert ended.returncode in (0, 1, 2)
        assert "Traceback" not in ended.stderr


@FEW
@given(content=written(timeline()))
def test_a_timeline(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "timeline.json").write_bytes(content)
    with one_line_at_most():
        drawing(read_timeline(tmp_path / "timeline.json"))


@FEW
@given(content=written(PROFILE, toml))
def test_a_profile(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.toml").write_bytes(content)
    with one_line_at_most():
        profile = load_profile(str(tmp_path / "p.toml"))
        assert not re.search("[/\x00-\x1f]", profile.name)


@FEW
@given(content=written(GPUS, toml))
def test_a_file_of_gpus(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.toml").write_bytes(content)
    with one_line_at_most():
        load_gpu(f"{tmp_path}/g.toml:mine")


@FEW
@given(content=written(HF))
def test_a_config_of_hugging_face(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with one_line_at_most():
        profile = huggingface_profile(tmp_path)
        if profile.model.n_layers < 10:
            parameters(profile.model.with_n(1))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "p.toml").write_text(
        "[model]\nvocab_size = 300\ndim = 32\nn_layers = 2\nn_attention_heads = 2\n[workload]\nbatch = 1\n"
        'sequence = 8\ntokenizer = "uniform"\n[sweep]\nn = [1]\nstrategies = ["naive"]\n'
    )
    options = ("--gpu", "t4", "--gpu-memory", "4MiB", "--out", ".")
    assert mtp_mem(folder, "plan", "--profile", "p.toml", *options).returncode == 0
    document: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return document


@settings(parent=FEW, max_examples=8)
@given(draw=st.data())
def test_a_plan(tmp_path: Path, plan: dict[str, Any], draw: st.DataObject) -> None:
    changed = draw.draw(mutated(plan))
    if isinstance(changed, dict):
        with one_line_at_most():
            plan_chart(changed, tmp_path)


@FEW
@given(content=written({"gpu": {}, "cases": [{"shape": "narrow", "n": 1, "strategy": "naive", "error": None}]}))
def test_the_cases_of_a_check(tmp_path: Path, content: bytes) -> None:
    (tmp_path / check_prediction.FILE).write_bytes(content)
    with one_line_at_most():
        check_prediction._before(tmp_path, {"gpu": {}})


def test_a_cached_vocabulary_that_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is damaged, or has ids that the model has no rows for, is trained again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = tmp_path / "text"
    text.write_text("a b c d e f g " * 100)
    workload = Workload(batch=1, sequence=16)
    right = data.load_corpus(workload, 257, text)
    (cached,) = (tmp_path / "mtp_mem").iterdir()
    whole = json.loads(cached.read_text())
    larger = copy.deepcopy(whole)
    larger["model"]["vocab"] |= {"zz": 10**6}
    for content in (
        b"",
        b"\xff",
        b"[]",
        b"{",
        json.dumps(whole | {"model": None}).encode(),
        json.dumps(larger).encode(),
    ):
        cached.write_bytes(content)
        assert data.load_corpus(workload, 257, text).digest == right.digest
        assert json.loads(cached.read_text()) == whole
    with pytest.raises(BadInput, match="not a regular file"):
        data.load_corpus(workload, 257, Path("/dev/zero"))
