"""The written pages: every link leads somewhere, every command line is understood, and what they show runs."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_huggingface import language_model

import mtp_mem
from mtp_mem.cli import main, make_parser
from mtp_mem.strategy import BUILTIN
from mtp_mem.testing import check_strategy
from mtp_mem.verification.broken_conduct import ALL_BROKEN
from mtp_mem.verification.scenarios import REAL_SIZES, SCENARIOS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "profiles/README.md", ROOT / "tests/MUTATION.md"])
QUICK = ("list", "env", "profile check", "chart", "timeline --strategy sequential --n 4", "regressions")
"""The beginnings of command lines that take a few seconds."""


def anchors(page: Path) -> set[str]:
    """The names that the headings of a page have as link targets."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def table(page: str, first_column: str) -> list[list[str]]:
    """The cells of the page's table whose header begins with `first_column`; without the header and code marks."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n| {first_column} |", 1)[1]
    rows = text.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def recorded(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The newest of the recorded results in this folder, by strategy and n."""
    lines = (ROOT / "profiles/recorded" / folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["strategy"], record["n"]): record for record in map(json.loads, lines)}


def command_lines() -> list[tuple[str, str]]:
    """Page and line of every `mtp-mem` command in a code block."""
    lines = [(page, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return [(page.name, line) for page, line in lines if line.startswith("mtp-mem ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("`strategies/my_strategy.py`", "")
    for name in re.findall(r"`((?:mtp_mem|strategies|profiles|tests|docs)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_every_command_line_is_understood(page: str, line: str) -> None:
    make_parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("line", dict.fromkeys(line for _, line in command_lines() if line[8:].startswith(QUICK)))
def test_quick_command_lines_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ROOT / "profiles/recorded/cpu-2-cores/quick/results.jsonl"
    for name in ("results/quick/results.jsonl", "OLD/results.jsonl", "NEW/results.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(quick.read_bytes())
    for name in ("mine.toml", "my.toml"):
        (tmp_path / name).write_bytes((ROOT / "profiles/quick.toml").read_bytes())
    assert main(shlex.split(line, comments=True)[1:]) == 0
    assert capsys.readouterr().out


def test_the_readme_is_short_and_its_trainer_lines_run() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170
    trainer, strategy = blocks(ROOT / "README.md", "python")
    ids = torch.randint(1, 131, (2, 12))
    names = {"mtp_mem": mtp_mem, "lm": language_model("llama"), "ids": ids, "labels": ids}
    exec(trainer, names)
    assert names["losses"].shape == (4,)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    exec(strategy, names)
    check_strategy(names["HalfAtATime"](), scenarios=SCENARIOS[:5])


def test_the_figures_in_the_readme_are_the_recorded_ones() -> None:
    measured, predicted = recorded("cpu-2-cores/quick"), recorded("predicted/llama3-8b-h200")
    rows = table("README.md", "strategy")
    assert [row[0] for row in rows] == ["naive", "sequential", "chunked_vocab", "chunked_tokens", "checkpointed"]
    needs = {name: r["peak_requested_bytes"] - r["baseline_bytes"] for (name, n), r in measured.items() if n == 8}
    naive_ms = measured["naive", 8]["step_ms"]
    for name, *cells in rows:
        record = measured[name, 8]
        assert cells == [
            f"{needs[name] / 2**20:.1f} MiB",
            f"{needs[name] / needs['naive']:.2f}x",
            f"{record['step_ms']:.0f} ms",
            f"{record['step_ms'] / naive_ms:.2f}x",
            record["gradient"].replace("within bound", f"within {record['gradient_error']:.0e}"),
            f"{predicted[name, 8]['peak_allocated_bytes'] / 2**30:.1f} GiB",
        ]


def test_the_predicted_figures_are_the_recorded_ones() -> None:
    predicted = recorded("predicted/llama3-8b-h200")
    for n, *cells in table("docs/prediction.md", "n"):
        names = ["naive", "sequential", "chunked_vocab", "chunked_tokens", "checkpointed"]
        assert cells[:5] == [f"{predicted[name, int(n)]['peak_allocated_bytes'] / 2**30:.1f}" for name in names]


def test_the_readme_lists_every_strategy() -> None:
    names = [name.strip("`, ") for row in table("README.md", "name") for name in row[0].split(", ")]
    assert names == list(BUILTIN)


def test_what_is_said_of_the_verifier_is_what_it_runs() -> None:
    text = (ROOT / "docs/verification.md").read_text(encoding="utf-8")
    assert f"{len(SCENARIOS) + len(REAL_SIZES)} small training steps" in text
    assert f"- {len(SCENARIOS)} tiny scenarios" in text
    assert f"- {len(REAL_SIZES)} larger ones" in text
    assert f"{len(ALL_BROKEN)} broken strategies" in text
    assert f"{len(ALL_BROKEN)} broken strategies" in (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [(row[0], row[-1]) for row in table("docs/verification.md", "broken strategy")]
    assert rows == [(one.__name__, one.caught_by) for one in ALL_BROKEN]


def test_the_list_for_a_gpu_is_tox_s() -> None:
    section = re.search(r"^\[testenv:gpu\]\n(.*?)(?=^\[|\Z)", (ROOT / "tox.ini").read_text(), re.MULTILINE | re.DOTALL)
    assert section
    text = (
        section[1].replace("{[testenv:gpu]out}", "results/gpu").replace("{posargs:20}", "20").replace("{tox_root}/", "")
    )
    own = re.search(r"^own = (.*)$", text, re.MULTILINE)
    assert own
    text = text.replace("{[testenv:gpu]own}", own[1])
    commands = [line.strip() for line in text.partition("\ncommands =\n")[2].splitlines() if line.strip()]
    assert blocks(ROOT / "docs/gpu.md", "sh")[0].splitlines() == commands
