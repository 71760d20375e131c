"""Compute scores: both encoders on generated images, their prompts, the photos and the class images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusekrona_train.evaluation.inputs import Generated, without_words
from diffusekrona_train.evaluation.metrics import METRICS, Embeddings, summarise, values_of
from diffusekrona_train.evaluation.metrics.encoders import CLIP, DINO, Encoder, open_clip, open_dino


@dataclass
class Judges:
    """The two encoders of all scores."""

    clip: Encoder
    dino: Encoder

    @classmethod
    def open(
        cls, clip: str | None, dino: str | None, *, toybox: bool, device: torch.device | str, cache: Path | None
    ) -> Judges:
        """Open encoders by name; without one the paper's, or toybox's own for images of the embedded model."""
        names = ("toybox", "toybox") if toybox else (CLIP, DINO)
        return cls(open_clip(clip or names[0], device, cache), open_dino(dino or names[1], device, cache))

    def describe(self) -> dict[str, str]:
        """Describe how a result was measured."""
        about = {"CLIP": self.clip.describe(), "DINO": self.dino.describe()}
        return {f"{name} {key}": value for name, told in about.items() for key, value in told.items()}


@dataclass
class Measured:
    """Values by image, and which images they belong to; class drift belongs to the class images."""

    pictures: list[Generated]
    values: dict[str, list[float]]
    class_seeds: list[int] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Return metric -> metrics.summarise of its values."""
        seeds = [picture.seed for picture in self.pictures]
        marks = {name: self.class_seeds if name == "class_drift" else seeds for name in self.values}
        return {name: summarise(name, values, marks[name]) for name, values in self.values.items()}

    def as_json(self) -> dict[str, Any]:
        """Return scores and each image's values, with only the base names of files."""
        rows = [
            {"file": picture.file.name, "prompt": picture.prompt, "seed": picture.seed}
            | {name: round(values[i], 6) for name, values in self.values.items() if name != "class_drift"}
            for i, picture in enumerate(self.pictures)
        ]
        return {"scores": self.scores, "pictures": rows}


def measure(
    judges: Judges,
    photos: Sequence[Image.Image],
    generated: Sequence[Generated],
    *,
    identifiers: Sequence[str] = (),
    class_base: Sequence[Generated] = (),
    class_adapted: Sequence[Generated] = (),
) -> Measured:
    """Compute all scores of one subject's images.

    `identifiers` are left out of the texts that CLIP-T compares with (none: texts as they are). class_base and
    class_adapted show the class prompt at the same seeds, by the base and the adapted model (none: no class drift).
    """
    assert [p.seed for p in class_base] == [p.seed for p in class_adapted], "class pictures at other seeds"
    pictures = [picture.open() for picture in generated]
    texts = [without_words(picture.prompt, identifiers) if identifiers else picture.prompt for picture in generated]
    drift = [judges.dino.images([p.open() for p in side]) if side else None for side in (class_base, class_adapted)]
    embeddings = Embeddings(
        clip_real=judges.clip.images(photos),
        clip_generated=judges.clip.images(pictures),
        clip_text=judges.clip.texts(texts),
        dino_real=judges.dino.images(photos),
        dino_generated=judges.dino.images(pictures),
        dino_class_base=drift[0],
        dino_class_adapted=drift[1],
    )
    return Measured(list(generated), values_of(embeddings), [picture.seed for picture in class_adapted])


def pool(measured: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Compute scores over the images of several subjects together."""
    pooled = {}
    for name in METRICS:
        parts = [(m.values[name], m) for m in measured if name in m.values]
        if parts:
            values = [value for own, _ in parts for value in own]
            seeds = [
                s for _, m in parts for s in (m.class_seeds if name == "class_drift" else [p.seed for p in m.pictures])
            ]
            pooled[name] = summarise(name, values, seeds)
    return pooled
