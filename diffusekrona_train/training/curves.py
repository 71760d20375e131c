"""Loss and learning rate over the steps of a run: numbers from metrics.jsonl, and `loss.png` in the run folder."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from diffusekrona_train.common.files import atomic
from diffusekrona_train.common.run_folder import read_metrics
from diffusekrona_train.report.charts import COLOURS


def series(metrics: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of the lines that hold a finite number under `key`."""
    found = [(line["step"], line[key]) for line in metrics if _is_number(line.get(key))]
    return [step for step, _ in found], [value for _, value in found]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Return the exponential mean without the pull towards the start."""
    out, mean, mass = [], 0.0, 0.0
    for value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + 1 - weight
        out.append(mean / mass)
    return out


def write_loss_plot(run_folder: Path | str) -> Path | None:
    """Write `loss.png` into a run folder from its metrics.jsonl; None where no loss was logged yet."""
    folder = Path(run_folder)
    metrics = read_metrics(folder / "metrics.jsonl")
    if not series(metrics, "loss")[0]:
        return None
    path = folder / "loss.png"
    with atomic(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters in the run's name that the font lacks are shown as boxes
        _drawn(metrics, folder.resolve().name).savefig(temporary, dpi=120)
    return path


def _drawn(metrics: list[dict], name: str) -> Any:
    """Return a figure of its own, unknown to pyplot: the loss above, the learning rate below, over the same steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, loss = series(metrics, "loss")
    held_steps, held = series(metrics, "validation_loss")
    above.plot(steps, loss, color=COLOURS[0], alpha=0.3, linewidth=0.8, label="training", marker=_dot(steps))
    above.plot(steps, smoothed(loss), color=COLOURS[0], linewidth=1.8, label="training, smoothed")
    if held:
        above.plot(held_steps, held, color=COLOURS[1], linewidth=1.8, marker="o", markersize=4, label="held-out noise")
    above.set_ylabel("loss")
    above.set_title(name, loc="left", fontsize=11, parse_math=False)
    above.legend(frameon=False, fontsize=9)
    steps, rate = series(metrics, "lr")
    below.plot(steps, rate, color=COLOURS[2], linewidth=1.8, marker=_dot(steps))
    below.set_ylim(0, max(rate, default=1.0) * 1.15 or 1.0)
    below.ticklabel_format(axis="y", scilimits=(-3, 4))
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.2, linewidth=0.6)
        axes.margins(x=0.02)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _dot(steps: list[int]) -> str | None:
    """Return a marker for a line of one point, which would not be seen."""
    return "o" if len(steps) == 1 else None
