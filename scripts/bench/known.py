"""Peak memory of a training step of every known transformer, counted without a GPU or weights.

    python -m scripts.bench.known [--models z-image klein-4b] [--write docs/performance.md]

As `scripts.bench.trace` counts it: autograd runs over tensors that have shapes and no content. A step is counted at 3
and at 5 repeated blocks of each kind and continued to the model's own depth, as every block takes the same (`--whole`
counts all of them). Prints, for each model, what its family should say in MemoryFigures, then the table of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusekrona_train.adapters import Fp32Module
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.common.files import atomic
from diffusekrona_train.config import MODEL_DEFAULTS, AdapterConfig
from diffusekrona_train.config.known import known_models
from diffusekrona_train.models import open_model
from diffusekrona_train.models.contracts import MemoryFigures
from diffusekrona_train.models.layers import linears_of_shapes
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.models.stored import block_of
from diffusekrona_train.training.base import enable_checkpointing
from diffusekrona_train.training.memory import GIB, Level, estimate
from scripts.bench.trace import FusedAttention, Peak, storages

SIDES = (512, 1024)
LEVELS = {
    "bf16": Level("plain", "none", False),
    "checkpointing": Level("checkpointing", "none", True),
    "fp8": Level("checkpointing", "fp8", True),
    "NF4": Level("nf4", "nf4", True),
    "offload": Level("offload", "nf4", True, offload=True),
}
MARKS = "<!-- counted by python -m scripts.bench.known -->"


@dataclass(frozen=True)
class Counted:
    """GiB at the peak of a step beside the base in bf16, for one image: (plain, with checkpointing) by side."""

    base: int
    trained: int
    activations: dict[int, tuple[float, float]]
    quantized_share: float
    largest_block: float

    @property
    def figures(self) -> MemoryFigures:
        plain, again = self.activations[1024]
        return MemoryFigures(plain, again, self.quantized_share, self.largest_block)


DEPTHS = ("num_layers", "num_single_layers", "n_layers")
"""Fields of a denoiser's config that say how often a kind of block is repeated."""
FEW, MORE = 3, 5
Config = Mapping[str, Any]


def count(alias: str, whole: bool = False) -> Counted:
    """Count everything of a known model."""
    source = open_model(alias)
    sizes = {name: i * o for name, (i, o) in linears_of_shapes(source._meta_shapes).items()}
    inside = {name: size for name, size in sizes.items() if source.family.quantizes(name)}
    blocks: Counter[str] = Counter()
    for name, size in inside.items():
        blocks[block_of(name)] += size
    base = source.base_parameters()
    unequal = bool(source.denoiser_config.get("dual_attention_layers"))  # of SD 3.5 medium's blocks
    at = peak if whole or unequal else continued
    peaks = {side: (at(source, side, False), at(source, side, True)) for side in SIDES}
    activations = {side: (plain[0], again[0]) for side, (plain, again) in peaks.items()}
    shares = sum(inside.values()) / base, max(blocks.values()) / base
    return Counted(base, peaks[512][0][1], activations, *shares)


def continued(source: ModelSource, side: int, checkpointing: bool) -> tuple[float, int]:
    """What `peak` gives, from a few blocks of each kind."""
    config = source.denoiser_config
    depths = [name for name in DEPTHS if name in config]
    few = {**config, **dict.fromkeys(depths, FEW)}
    memory, trained = start = peak(source, side, checkpointing, few)
    for name in depths:
        more, times = peak(source, side, checkpointing, {**few, name: MORE}), (config[name] - FEW) / (MORE - FEW)
        memory, trained = memory + times * (more[0] - start[0]), trained + round(times * (more[1] - start[1]))
    return memory, trained


def peak(source: ModelSource, side: int, checkpointing: bool, config: Config | None = None) -> tuple[float, int]:
    """GiB beside the base at the peak of two steps without an optimiser, and how many numbers are trained."""
    family, alias = source.family, str(source.alias)
    shape = family.latent_shape(source.vae_config, side, side)
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            from diffusekrona_train.models.source import class_of

            denoiser = (
                class_of(family.parts.denoiser).from_config(config or source.denoiser_config).requires_grad_(False)
            )
        finally:
            torch.set_default_dtype(torch.float32)
        if checkpointing:
            enable_checkpointing(denoiser)
        known = storages(denoiser)
        injection = inject(denoiser, AdapterConfig.model_validate(MODEL_DEFAULTS[alias].get("adapter", {})))
        with Peak(known | {value.untyped_storage()._cdata for value in injection.parameters()}) as most:
            for _ in range(2):
                x_t = torch.empty(1, *shape, dtype=torch.bfloat16)
                row = {name: _empty(name, size) for name, size in known_models()[alias].prompt.items()}
                told = family.predict(denoiser, x_t, torch.tensor([0.5]), family.collate([row]))
                told.float().square().mean().backward()
                for value in injection.parameters():
                    value.grad = None
    return most.most / GIB, injection.count


def _empty(name: str, size: list[int]) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool) if name.endswith("_mask") else torch.empty(size, dtype=torch.bfloat16)


def needs(found: Counted, level: Level, side: int) -> float:
    """GiB of a run with AdamW at a level, one image of `side` pixels at once."""
    plain, again = found.activations[side]
    figures = MemoryFigures(plain, again, found.quantized_share, found.largest_block)
    return estimate(level, found.base, 1.0, torch.bfloat16, figures) + 16 * found.trained / GIB


def table(counted: dict[str, Counted]) -> str:
    """Return the table of docs/performance.md."""
    lines = [
        f"| model | parameters | trained | pixels | {' | '.join(LEVELS)} |",
        f"|---|---|---|---|{'---|' * len(LEVELS)}",
    ]
    for alias, found in counted.items():
        for side in SIDES:
            cells = [f"{needs(found, level, side):.1f}" for level in LEVELS.values()]
            sizes = f"{found.base / 1e9:.2f} B | {found.trained / 1e6:.1f} M"
            lines.append(f"| {alias} | {sizes} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Put the table between the two marks of a page."""
    page = path.read_text(encoding="utf-8")
    between = re.compile(re.escape(MARKS) + r"\n.*?" + re.escape(MARKS), re.S)
    if not between.search(page):
        raise ValueError(f"{path} does not hold the line {MARKS} twice")
    with atomic(path) as temporary:
        temporary.write_text(between.sub(lambda _: f"{MARKS}\n{text}\n{MARKS}", page), encoding="utf-8")


def main() -> None:
    everything = [alias for alias, model in known_models().items() if model.prompt]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=everything, choices=everything)
    parser.add_argument("--whole", action="store_true", help="count every block: ten times as long")
    parser.add_argument("--write", type=Path, help="page to put the table into")
    given = parser.parse_args()
    hollow()
    counted: dict[str, Any] = {}
    for alias in given.models:
        found = counted[alias] = count(alias, given.whole)
        figures = found.figures
        print(
            f"{alias}: MemoryFigures(plain={figures.plain:.1f}, checkpointing={figures.checkpointing:.2f}, "
            f"quantized_share={figures.quantized_share:.2f}, largest_block={figures.largest_block:.3f})",
            flush=True,
        )
    print(table(counted))
    if given.write:
        write(given.write, table(counted))


def hollow() -> None:
    """Let attention and adapters work on tensors without content."""
    torch.nn.functional.scaled_dot_product_attention = _attention
    Fp32Module._apply = lambda self, fn, recurse=True: self


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    return FusedAttention.apply(query, key, value)


if __name__ == "__main__":
    main()
