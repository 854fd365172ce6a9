"""The report as one HTML page without any link to elsewhere."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mtp_mem.report.content import Section

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Chart:
    """A drawn chart: its SVG, beside which the other files lie, and its text for screen readers."""

    svg: Path
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
    """matplotlib's SVG made fit to embed: without namespaces and metadata, with unique ids and a description."""
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
