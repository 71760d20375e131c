"""Charts as inline SVG: text and axes take the page's own colour, so that one chart suits a light and a dark page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

INK = "#010203"  # replaced by currentColor
COLOURS = ("#3b82f6", "#e8833a", "#22a06b", "#a169e0", "#d64d6a", "#8a8f98")


@dataclass(frozen=True)
class Line:
    """One line of a chart; `faint` draws it thin behind the others, `points` marks its values."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    points: bool = False


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str = "step", mark_x: float | None = None, log_y: bool = False
) -> str:
    """Plot lines over a shared axis as SVG; `mark_x` adds a dashed vertical line."""
    figure, axes = _axes(title)
    colour = 0
    for line in lines:
        style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.35} if line.faint else {"linewidth": 1.8}
        label = None if line.faint else line.label
        marker = "o" if line.points else None
        axes.plot(
            line.x, line.y, color=COLOURS[colour % len(COLOURS)], label=label, marker=marker, markersize=4, **style
        )
        colour += not line.faint
    if mark_x is not None:
        axes.axvline(mark_x, color=INK, linestyle="--", linewidth=1)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.yaxis.get_offset_text().set(color=INK, fontsize=8)
    axes.set_xlabel(x_label)
    axes.margins(x=0.03)
    if sum(not line.faint for line in lines) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return _svg(figure, title)


def bar_chart(title: str, labels: Sequence[str], values: Sequence[float], errors: Sequence[tuple[float, float]]) -> str:
    """Plot horizontal bars with intervals as SVG; errors: (below, above) of each value."""
    figure, axes = _axes(title, height=0.9 + 0.32 * len(labels))
    below, above = zip(*errors, strict=True)
    axes.barh(range(len(labels)), values, xerr=(below, above), color=COLOURS[0], height=0.6, ecolor=INK, capsize=3)
    axes.set_yticks(range(len(labels)), [label if len(label) < 28 else label[:26] + "…" for label in labels])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return _svg(figure, title)


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Plot cells coloured by value (nan: empty) as SVG, rows from the top, with a colour bar."""
    figure, axes = _axes(title, height=0.9 + max(0.15 * len(rows), 1.2))
    mesh = axes.pcolormesh(values, cmap="viridis", edgecolors="none")
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows, fontsize=8 if len(rows) < 24 else 5)
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
    axes.invert_yaxis()
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    return _svg(figure, title)


def _axes(title: str, height: float = 2.7):
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(9)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def _svg(figure, title: str) -> str:
    """Return the figure as an <svg> element whose ids no other chart of the page has, and which scales with the
    page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
