"""Plot what an adapter learnt: norms by block, singular values, the factors themselves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusekrona_train.adapters.spectra import LayerSpectrum, strongest
from diffusekrona_train.common.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def summary(rows: list[LayerSpectrum]) -> dict[str, Any]:
    """Return the measurements as one JSON object."""
    measured = "relative" if all(row.relative is not None for row in rows) else "absolute"
    return {"norms": measured, "layers": [asdict(row) for row in rows]}


def write_pictures(rows: list[LayerSpectrum], groups: dict[str, dict[str, Tensor]], folder: Path) -> list[Path]:
    """Write spectra.json, norms.png, singular_values.png and, if A is a full matrix, factors.png to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "spectra.json") as path:
        path.write_text(json.dumps(summary(rows), indent=1) + "\n")
    written = [
        folder / "spectra.json",
        norm_map(rows, folder / "norms.png"),
        spectrum_plot(rows, folder / "singular_values.png"),
    ]
    picture = factor_sheet(rows, groups, folder / "factors.png")
    return written + ([picture] if picture else [])


def norm_map(rows: list[LayerSpectrum], path: Path) -> Path:
    """Plot a heat map of ‖ΔW‖ / ‖W‖ (or ‖ΔW‖): blocks along the network across, projections down."""
    plt = _pyplot()
    relative = all(row.relative is not None for row in rows)
    # models list the middle after the end; in the network it is between down and up
    columns = sorted(dict.fromkeys(_block(row.name) for row in rows), key=lambda block: STAGES.index(block.split()[0]))
    lines = _roles(rows)
    grid = torch.full((len(lines), len(columns)), float("nan"))
    for row in rows:
        grid[lines.index(_role(row)), columns.index(_block(row.name))] = row.size if relative else row.norm
    figure, axes = plt.subplots(
        figsize=(max(6.0, 2.2 + 0.24 * len(columns)), 1.9 + 0.3 * len(lines)), layout="constrained"
    )
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_title(
        "Change relative to the frozen weight, ‖ΔW‖ / ‖W‖" if relative else "Absolute size of the change, ‖ΔW‖"
    )
    axes.set_xlabel("block.attention.layer along the network", fontsize=8)
    figure.colorbar(image, ax=axes, pad=0.01)
    return _save(figure, path)


def spectrum_plot(rows: list[LayerSpectrum], path: Path) -> Path:
    """Plot singular values by projection, each layer's scaled to its largest: median and middle half of the layers."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for role in _roles(rows):
        spectra = [row.singular_values for row in rows if _role(row) == role and row.norm > 0]
        if not spectra:
            continue
        length = min(len(values) for values in spectra)
        scaled = torch.tensor(
            [[value / values[0] for value in values[:length]] for values in spectra], dtype=torch.float64
        )
        low, middle, high = (torch.quantile(scaled, q, dim=0).numpy() for q in (0.25, 0.5, 0.75))
        ranks = range(1, length + 1)
        (line,) = axes.plot(ranks, middle, label=f"{role} ({len(spectra)})")
        axes.fill_between(ranks, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(
        xlabel="index of the singular value",
        ylabel="σ / largest σ",
        title="Singular values of ΔW, median over layers",
        ylim=(0, 1.03),
    )
    if axes.lines:
        axes.legend(fontsize=8, ncols=2)
    else:
        axes.text(0.5, 0.5, "every ΔW is zero", ha="center", transform=axes.transAxes)
    return _save(figure, path)


def factor_sheet(
    rows: list[LayerSpectrum], groups: dict[str, dict[str, Tensor]], path: Path, most: int = 24
) -> Path | None:
    """Show the factors A (a2, a1) of the layers that changed most as images; None if A is not a full matrix."""
    chosen = strongest([row for row in rows if "lokr_w1" in groups[row.name]])[:most]
    if not chosen:
        return None
    plt = _pyplot()
    across = min(8, len(chosen))
    down = math.ceil(len(chosen) / across)
    # a tall A (64, 4) would be a thin line: lay it down
    images = [_lying(groups[row.name]["lokr_w1"].float()) for row in chosen]
    shape = max(max(image.shape[0] / image.shape[1] for image in images), 0.25)
    figure, grid = plt.subplots(
        down, across, figsize=(1.75 * across, down * (1.5 * shape + 0.5) + 0.6), squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, row, image in zip(grid.flat, chosen, images, strict=False):
        bound = float(image.abs().max()) or 1.0
        axes.imshow(image.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto" if shape <= 0.25 else "equal")
        axes.set_title(f"{_block(row.name)} {_role(row)}", fontsize=7)
    turned = groups[chosen[0].name]["lokr_w1"].shape[0] > groups[chosen[0].name]["lokr_w1"].shape[1]
    figure.suptitle(
        f"A ({'a1 down, a2 across' if turned else 'a2 down, a1 across'}) of the {len(chosen)} layers that changed most",
        fontsize=10,
    )
    return _save(figure, path)


ROLES = [f"{kind} {letter}" for kind in ("self", "cross") for letter in "qkvo"] + [
    "ffn in",
    "ffn out",
    "proj in",
    "proj out",
]


STAGES = ("down", "mid", "up", "other")


def _roles(rows: list[LayerSpectrum]) -> list[str]:
    """Return the roles of these layers: the usual ones first, then fused linears and what only other tools adapt."""
    present = list(dict.fromkeys(_role(row) for row in rows))
    return [*(role for role in ROLES if role in present), *(role for role in present if role not in ROLES)]


def _role(row: LayerSpectrum) -> str:
    if row.kind == "other":
        return ".".join(row.name.split(".")[-2:])
    if row.kind != "ffn":
        return f"{row.kind} {row.projection}"
    return "ffn out" if row.name.endswith("net.2") else "ffn in"


def _block(name: str) -> str:
    """Shorten down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q to 'down 1.0.0'."""
    parts = name.split(".")
    last = 1 if parts[-1] in ("proj_in", "proj_out") else 2
    numbers = [part for part in parts[: max(len(parts) - last, 1)] if part.isdigit()]
    stage = parts[0].split("_")[0]
    return f"{stage if stage in STAGES else 'other'} {'.'.join(numbers[:3])}"


def _lying(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Figure, path: Path) -> Path:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    _pyplot().close(figure)
    return path
