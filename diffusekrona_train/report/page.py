"""One self-contained HTML page from plain sections: images become data URIs and nothing is fetched.

The template escapes every text that it is given; only charts, which matplotlib wrote, go in as they are.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffusekrona_train.common.files import ASSETS, atomic

TEMPLATES = ASSETS / "report"


@dataclass(frozen=True)
class Figure:
    """An image with a caption; `marked` draws a frame around it. `pixelated` keeps small images crisp."""

    uri: str
    caption: str
    marked: bool = False
    pixelated: bool = False


@dataclass(frozen=True)
class Strip:
    """Images side by side under one label."""

    label: str
    figures: list[Figure]


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading row; the row numbered `best` is marked."""

    head: list[str]
    rows: list[list[str]]
    best: int | None = None


@dataclass
class Section:
    """One part of the page; whatever is empty is left out."""

    title: str
    note: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)
    """(what it does, the command)."""


def picture(source: Image.Image | Path, caption: str, *, side: int = 512, marked: bool = False) -> Figure:
    """Make a figure from a PIL image or a file, reduced to `side` pixels: PNG where small, else JPEG of quality 88."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    image = image.convert("RGB")
    small = max(image.size) <= 128
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    kind = "png" if small else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return Figure(f"data:image/{kind};base64,{data}", caption, marked, pixelated=small)


def write_page(
    path: Path, title: str, summary: str, sections: Sequence[Section], *, refresh_seconds: int | None = None
) -> Path:
    """Render the sections to one HTML file at `path`, atomically; with refresh_seconds the page reloads itself."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("page.html").render(
        title=title, summary=summary, sections=sections, refresh_seconds=refresh_seconds
    )
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
