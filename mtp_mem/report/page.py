"""The report as one HTML page without any link to elsewhere, or as Markdown with its charts beside it."""

import html
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mtp_mem.report.content import Grid, Section

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Chart:
    """A drawn chart: its SVG and PNG files, and its words for those who cannot see it."""

    svg: Path
    png: Path
    alt: str


@dataclass(frozen=True)
class Group:
    """A section with its charts."""

    content: Section
    charts: tuple[Chart, ...]


def to_html(
    groups: Sequence[Group], panels: Chart | None, timelines: Sequence[dict[str, Any]], notes: Sequence[str]
) -> str:
    """The page. All text is escaped by the template engine; only our own SVG, style and script go in as they are."""
    folder = resources.files("mtp_mem.report").joinpath("assets")
    # A template engine, because it escapes every value unless told otherwise.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    numbers = iter(range(1, 1 + len(groups) * 10))

    def inline(chart: Chart) -> dict[str, Any]:
        return {"svg": inline_svg(chart.svg, f"chart-{next(numbers)}", chart.alt), "alt": chart.alt}

    sections = [{"content": group.content, "charts": [inline(chart) for chart in group.charts]} for group in groups]
    return template.render(
        sections=sections,
        panels=inline(panels) if panels else None,
        timelines=timelines,
        notes=notes,
        css=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        script=Markup(folder.joinpath("timeline.js").read_text(encoding="utf-8")),
    )


def inline_svg(path: Path, prefix: str, alt: str) -> Markup:
    """matplotlib's SVG for use inside a page: no namespaces or metadata, ids that no other chart has, a description."""
    root = ET.parse(path).getroot()
    for parent in root.iter():
        for child in [c for c in parent if c.tag == f"{SVG}metadata"]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            if name == "id":
                value = f"{prefix}-{value}"
            elif name == f"{XLINK}href" and value.startswith("#"):
                value = f"#{prefix}-{value[1:]}"
            element.set(name.removeprefix(XLINK), value.replace("url(#", f"url(#{prefix}-"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return Markup(ET.tostring(root, encoding="unicode"))


def to_markdown(
    groups: Sequence[Group], panels: Chart | None, timelines: Sequence[dict[str, Any]], notes: Sequence[str], base: Path
) -> str:
    """The same as Markdown; pictures are linked relative to the folder `base`."""
    lines = ["# Head-backward strategies: memory, time, gradients", ""]
    for group in groups:
        s = group.content
        lines += [f"## {_text(s.title)}", "", f"**{_text(s.answer)}**", ""]
        lines += [f"- {_text(name)}: {_text(value)}" for name, value in s.figures]
        lines += ["", f"Bytes: {_text(s.how)}.", "", *_pictures(group.charts, base)]
        lines += ["### Cases", "", *_grid(s.cases)]
        if s.remarks:
            lines += ["### Remarks", "", *(f"- {_text(line)}" for line in s.remarks), ""]
        if s.slopes:
            lines += ["### What a further head costs", "", *_grid(s.slopes)]
        lines += ["### Gradients", "", _text(s.gradients), "", "### Run it again", ""]
        lines += [*(f"    {line}" for line in s.command.splitlines()), "", "### Machine", "", *_grid(s.machine)]
    if panels:
        lines += ["## All groups", "", *_pictures([panels], base)]
    for t in timelines:
        lines += ["## What is live during one step", "", _text(f"{t['path']}: {t['peak']['words']}"), ""]
        lines += _grid(Grid(("category", "bytes at the peak"), tuple(t["at_peak"]), (True, False)))
        lines += _grid(Grid(("bytes", "category", "made by", "in"), tuple(t["largest"]), (False, True, True, True)))
    if notes:
        lines += ["## What was skipped", "", *(f"- {_text(line)}" for line in notes)]
    return "\n".join(lines).rstrip() + "\n"


def _pictures(charts: Sequence[Chart], base: Path) -> list[str]:
    lines = []
    for chart in charts:
        link = quote(Path(os.path.relpath(chart.png, base)).as_posix())
        lines += [f"![{_text(chart.alt)}]({link})", ""]
    return lines


def _grid(table: Grid) -> list[str]:
    rule = ["---" if left else "---:" for left in table.words]
    rows = [[_text(cell) for cell in row] for row in (table.titles, *table.rows)]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])] + [""]


def _text(text: str) -> str:
    """One line that Markdown shows as it is, in a table too."""
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "\\`*_[]|" else c for c in text)
