"""The report: one whole page without any address elsewhere, the right words, exit codes; and it works in a browser."""

import csv
import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fixed import MODEL, WORKLOAD, record, records

from mtp_mem.cli import main
from mtp_mem.config.profiles import load_profile
from mtp_mem.config.schema import Training
from mtp_mem.memory.trace import Event, Storage, Trace
from mtp_mem.report import timeline_page as timeline_module
from mtp_mem.report.build import MOST_STRATEGIES, telling
from mtp_mem.report.reproduce import command
from mtp_mem.report.timeline_page import read_timeline
from mtp_mem.runs.record import Record

RECORDED = Path(__file__).parents[2] / "profiles" / "recorded"
TIMELINE = RECORDED / "cpu-2-cores" / "timeline-quick-sequential" / "timeline.json"
EVIL = "<script>alert('x')</script>|`&\"]("
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks as it reads: every element is closed in turn; collects ids, references, addresses and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            value = value or ""
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                (self.references.add(value[1:]) if value.startswith("#") else self.addresses.append(value))
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value))
            if "://" in value:
                self.addresses.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write(path: Path, content: list[Record]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.jsonl").write_text("".join(json.dumps(r.to_json()) + "\n" for r in content))
    return path


def check(text: str) -> Page:
    page = Page(text)
    assert page.addresses == []
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)
    assert text.startswith("<!DOCTYPE html>")
    return page


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.html"
    results = write(tmp_path / "results", [*records(), record("sequential", 16, status="oom", error="no room")])
    shutil.copy(TIMELINE, results)
    assert main(["report", str(results), "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == [str(out)]
    text = out.read_text(encoding="utf-8")
    page = check(text)
    assert page.tags.count("svg") > 5  # four charts, the timeline, its legend
    answer = "At n = 8 use sequential: it needs 103.0 MiB over the baseline where naive needs 356.0 MiB (-71%)"
    assert document["groups"][0]["answer"].startswith(answer)
    assert page.text.index(answer) < page.text.index("Memory of a training step")  # the answer comes first
    for words in (
        "253.0 MiB (-71%)",
        "0.90x",
        "sequential, n = 16: oom: no room",
        "Of 16 cases 16 were held against naive: bit-identical 12, within bound 4. The largest error is 3e-07",
        "# add --text FILE: a text\nmtp-mem compare --profile quick --n 1,2,4,8,16"
        " --strategies naive,sequential,chunked_vocab,checkpointed --device cpu",
        "A CPU",
        "peak 150.4 MiB in head 1 loss",
    ):
        assert words in page.text, words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "results"]
    assert sorted(p.name for p in results.iterdir()) == ["results.jsonl", "timeline.json"]
    again = out.read_bytes()
    assert main(["report", str(results), "-o", str(out)]) == 0
    assert out.read_bytes() == again


def test_names_from_a_file_are_text(tmp_path: Path) -> None:
    evil = [
        record(strategy, 2, case=strategy, workload={**WORKLOAD, "source": EVIL}, peak_phase=EVIL, error=EVIL, **more)
        for strategy, more in (("naive", {}), (EVIL, {}), ("other", {"status": "error"}))  # type: ignore[var-annotated]
    ]
    results = write(tmp_path / "results", evil)
    storages = [Storage(1, "logits", "", "", (1,), "x"), Storage(5, "logits", "<b>", f"</script>{EVIL}", (1,), EVIL)]
    trace = Trace(dict(enumerate(storages)), [0], [Event("alloc", 1)])
    (results / "timeline.json").write_text(json.dumps(trace.to_json()))
    out = tmp_path / "r.html"
    assert main(["report", str(results), "-o", str(out)]) == 0
    page = check(out.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2  # the timeline's data and its script
    assert "b" not in page.tags
    assert EVIL in page.text


def test_recorded_results_of_two_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What this repository recorded: a comparison, a prediction, a timeline, on one page."""
    out = tmp_path / "r.html"
    recorded = [str(RECORDED / "cpu-2-cores"), str(RECORDED / "predicted" / "llama3-8b-h200")]
    assert main(["report", *recorded, "-o", str(out), "--charts", str(tmp_path / "c")]) == 0
    page = check(out.read_text(encoding="utf-8"))
    assert "mtp-mem compare --profile quick --device cpu" in page.text
    assert "mtp-mem predict --profile llama3-8b --gpu h200" in page.text
    assert "Time and gradients were not predicted." in page.text
    assert "In all at n = 8: naive 125.7 GiB, sequential 92.7 GiB" in page.text  # as in README
    assert (tmp_path / "c" / "memory-vs-n-panels.svg").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["none.jsonl"], "none.jsonl: cannot be read: No such file or directory"),
        (["empty"], "nothing to report: no usable record"),
        (["cut"], "results.jsonl:1: skipped: not a whole JSON object (cut off?)"),
        (["good", "-o", "good"], "good: is a folder"),
        (["good", "-o", "good/results.jsonl"], "is one of the files to read"),
        (["good", "-o", "/proc/nowhere/r.html"], "/proc/nowhere: cannot be written"),
        (["good", "--timeline", "cut/results.jsonl"], "cut/results.jsonl: no timeline.json (cut off?): "),
        (["good", "--timeline", "t.json"], "t.json: no timeline.json (cut off?): not a step's storages and events"),
        (
            ["good", "--timeline", "huge.json"],
            "huge.json: no timeline.json (cut off?): huge.json: holds a whole number",
        ),
        (["good", "--timeline", "empty.json"], "empty.json: no timeline.json (cut off?): no events"),
        (["good", "--timeline", "kind.json"], "kind.json: no timeline.json (cut off?): an event of an unknown kind"),
        (["good", "--timeline", "twice.json"], "an event of an unknown kind, or a storage that is made twice"),
    ],
)
def test_bad_input(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("good"), records())
    write(Path("empty"), [])
    write(Path("cut"), [])
    Path("cut/results.jsonl").write_text('{"schema": 1, "case"')
    Path("t.json").write_text('{"timeline": 1, "storages": [], "before": [], "events": [["free", 3]]}')
    Path("empty.json").write_text('{"timeline": 1, "storages": [], "before": [], "events": []}')
    one = {0: Storage(5, "logits", "", "", (1,), "x")}
    kind = Trace(one, [], [Event("made", 0)]).to_json()  # type: ignore[arg-type]
    Path("kind.json").write_text(json.dumps(kind))
    twice = Trace(one, [], [Event("alloc", 0)]).to_json()
    Path("twice.json").write_text(json.dumps(twice | {"events": twice["events"] * 2}))
    huge = Trace({0: Storage(10**400, "logits", "", "", (1,), "x")}, [0], [])
    Path("huge.json").write_text(json.dumps(huge.to_json()))
    before = sorted(map(str, tmp_path.rglob("*")))
    assert main(["report", *args]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_damaged_line_is_named_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write(tmp_path / "results", records())
    with (results / "results.jsonl").open("a") as file:
        file.write('{"schema": 99}\n{"schema": 1, "ca')
    (results / "timeline.json").write_text('{"timeline": 1}')
    out = tmp_path / "r.html"
    assert main(["report", str(results), "-o", str(out)]) == 0
    err, text = capsys.readouterr().err, html.unescape(out.read_text(encoding="utf-8"))
    for words in ("results.jsonl:17: skipped: schema 99", "results.jsonl:18: skipped: not a whole", "no timeline.json"):
        assert words in err
        assert words in text


def test_the_command_to_run_again() -> None:
    quick = load_profile("quick")
    sweep = [record(s, n) for n in quick.sweep.n for s in quick.sweep.strategies]
    text = command([_as("CPython's pydoc_data.topics", r) for r in sweep])
    assert text == "# mtp_mem 0.1.0, commit 1234567, torch 2.13.0\nmtp-mem compare --profile quick --device cpu"
    assert command([_as("CPython's pydoc_data.topics", sweep[len(quick.sweep.strategies)])]).endswith(
        "--profile quick --n 2 --strategies naive --device cpu"
    )
    other = command([record("chunked_vocab:chunk=3", 2, model={**MODEL, "dim": 32, "n_future": 2})])
    assert "dim = 32" in other
    assert "--strategies chunked_vocab:chunk=3" in other
    assert "# add --text FILE: a text" in other
    assert "'a b;c'" in command([record("a b;c")])
    training = Training(sharding="fsdp2", world=4).facts("fp32")
    sharded = [dataclasses.replace(_as("CPython's pydoc_data.topics", r), training=training) for r in sweep]
    assert command(sharded).endswith("--profile quick --sharding fsdp2 --device cpu --nproc 4")
    foreign = [dataclasses.replace(r, model={**r.model, "architecture": "Llama", "settings": "12"}) for r in sharded]
    assert command(foreign).endswith(  # not the profile's sweep, though the shape is quick's
        "--hf config.json --kind parallel --batch 4 --sequence 256 --dtype fp32 --sharding fsdp2 --n 1,2,4,8"
        f" --strategies {','.join(quick.sweep.strategies)} --device cpu --nproc 4"
    )


def _as(source: str, like: Record) -> Record:
    return record(like.strategy, like.n, workload={**WORKLOAD, "source": source})


def test_a_timeline_is_read_back_as_it_was_drawn() -> None:
    """Event by event the bytes of the file beside the chart, of which the tensors and what was live before are all."""
    trace = read_timeline(TIMELINE)
    drawn = timeline_module.drawing(trace)
    data = drawn["data"]
    for category, name in enumerate(data["categories"]):
        change = [0] * (len(data["rows"]) + 1)
        for tensor_category, nbytes, _, born, died in data["tensors"]:
            if tensor_category == category:
                change[born] += nbytes
                change[died] -= nbytes
        live = data["rows"][0][category]
        for i, row in enumerate(data["rows"]):
            live += change[i]
            assert live == row[category], (name, i)
    with TIMELINE.with_suffix(".csv").open() as file:
        assert [sum(row) for row in data["rows"]] == [int(row["total"]) for row in csv.DictReader(file)]
    assert drawn["largest"][0][:2] == ("32.0 MiB", "logits")
    assert drawn["largest"][0][3] == "head 1 loss"


def test_a_chart_shows_no_more_strategies_than_can_be_told_apart() -> None:
    many = [record("naive", n) for n in (1, 4)]
    many += [
        record(f"chunked_tokens:chunk={c}", n, peak_requested_bytes=c * 100) for c in range(60, 0, -1) for n in (1, 4)
    ]
    shown = telling(many)
    least = {f"chunked_tokens:chunk={c}" for c in range(1, MOST_STRATEGIES)}
    assert {r.strategy for r in shown} == {"naive", *least}
    assert len(shown) == 2 * MOST_STRATEGIES
    assert telling(records()) == records()


def test_a_long_timeline_keeps_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_module, "MOST_COLUMNS", 100)
    trace = read_timeline(TIMELINE)
    drawn = timeline_module.drawing(trace)
    assert 50 < drawn["moments"] <= 100
    assert max(sum(row) for row in drawn["data"]["rows"]) == trace.peak().nbytes


BROWSERS = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "google-chrome",
    "chrome-headless-shell",
    "chrome",
)
BROWSER = os.environ.get("MTP_MEM_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
PROBE = """<script>
const problems = [];
addEventListener("error", (e) => problems.push(e.message));
addEventListener("securitypolicyviolation", (e) => problems.push(e.blockedURI));
addEventListener("load", () => {
  const said = {problems};
  const figure = document.querySelector("figure.timeline"), svg = figure.querySelector("svg");
  const box = svg.getBoundingClientRect(), tip = figure.querySelector(".tip");
  const point = (x, y) => svg.dispatchEvent(new PointerEvent("pointermove",
    {clientX: box.left + box.width * x, clientY: box.top + box.height * y, bubbles: true}));
  said.before = tip.textContent;
  point(0.3, 0.999); said.bottom = tip.textContent;
  point(PEAK, 0.5); said.peak = tip.textContent;
  svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); said.left = tip.textContent;
  said.overflow = document.documentElement.scrollWidth - innerWidth;
  const pre = document.createElement("pre");
  pre.id = "said"; pre.textContent = JSON.stringify(said); document.body.append(pre);
});
</script>"""


needs_a_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here; MTP_MEM_BROWSER may name one"
)


def browse(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([BROWSER, *flags, *args], capture_output=True, text=True, timeout=120)


@needs_a_browser
def test_without_javascript_and_on_paper(tmp_path: Path) -> None:
    """With every script forbidden the page says the same, and it prints."""
    results = write(tmp_path / "results", records())
    out = tmp_path / "r.html"
    assert main(["report", str(results), "--timeline", str(TIMELINE), "-o", str(out)]) == 0
    forbidden = '<head><meta http-equiv="Content-Security-Policy" content="script-src \'none\'">'
    bare = tmp_path / "bare.html"
    probe = "<script>document.title = 'it ran'</script>"
    bare.write_text(out.read_text(encoding="utf-8").replace("<head>", forbidden, 1) + probe, encoding="utf-8")
    done = browse(tmp_path, "--dump-dom", bare.as_uri())
    assert "it ran" not in re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    for words in ("At n = 8 use sequential", "Of 16 cases 16 were held against", "peak 150.4 MiB in head 1 loss"):
        assert words in done.stdout, words
    assert done.stdout.count("<svg") == out.read_text(encoding="utf-8").count("<svg") >= 5
    pdf = tmp_path / "r.pdf"
    browse(tmp_path, f"--print-to-pdf={pdf}", bare.as_uri())
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) >= 2


@needs_a_browser
def test_in_a_browser(tmp_path: Path) -> None:
    """The page runs without an error, and pointing at a band says what it is, how large, and where it was made."""
    results = write(tmp_path / "results", records())
    out = tmp_path / "r.html"
    assert main(["report", str(results), "--timeline", str(TIMELINE), "-o", str(out)]) == 0
    trace = read_timeline(TIMELINE)
    peak = trace.peak().event + 1
    probe = PROBE.replace("PEAK", repr(peak / len(trace.events)))
    probed = tmp_path / "probed.html"
    probed.write_text(out.read_text(encoding="utf-8").replace("<head>", f"<head>{probe}", 1), encoding="utf-8")
    done = browse(tmp_path, "--virtual-time-budget=5000", "--window-size=800,2000", "--dump-dom", probed.as_uri())
    match = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(html.unescape(match[1]))
    assert said["problems"] == []
    assert said["before"] == ""
    assert said["bottom"].startswith("parameters: 5.88 MiB of ")
    assert "in what was live before the step" in said["bottom"]
    assert said["peak"].startswith("logits: 96.0 MiB of 151.2 MiB32.0 MiB  made by ")
    assert "in head 1 loss" in said["peak"]
    assert f"event {peak}:" in said["peak"]
    assert f"event {peak - 1}:" in said["left"]
    assert said["overflow"] <= 0  # 800 pixels are enough: wide tables scroll by themselves
