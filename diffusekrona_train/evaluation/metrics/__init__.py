"""Scores of generated images: CLIP-I, CLIP-T and DINO as the papers define them, class drift and copy score.

Everything is a cosine similarity of unit embeddings, computed in fp64 with numpy. A metric gives one value a generated
image; its score is their mean (the largest, for the copy score), its ± their standard deviation over images. The
encoders are in `encoders.py`. A new metric is a function and a row in METRICS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Embeddings:
    """Unit embeddings of one subject's images, (number, width) each.

    R real photos, G generated images with G texts, C images of the class prompt by the base and by the adapted
    model, at the same C seeds.
    """

    clip_real: np.ndarray
    clip_generated: np.ndarray
    clip_text: np.ndarray
    dino_real: np.ndarray
    dino_generated: np.ndarray
    dino_class_base: np.ndarray | None = None
    dino_class_adapted: np.ndarray | None = None


def clip_i(e: Embeddings) -> np.ndarray:
    """Return (G,) mean CLIP similarity to the real photos; its mean is that over all pairs."""
    return cosines(e.clip_generated, e.clip_real).mean(axis=1)


def clip_t(e: Embeddings) -> np.ndarray:
    """Return (G,) CLIP similarity to the image's own text."""
    return (e.clip_generated.astype(np.float64) * e.clip_text).sum(axis=1)


def dino(e: Embeddings) -> np.ndarray:
    """Return (G,) mean DINO similarity to the real photos; its mean is that over all pairs."""
    return cosines(e.dino_generated, e.dino_real).mean(axis=1)


def class_drift(e: Embeddings) -> np.ndarray | None:
    """Return (C,) 1 - DINO similarity of the class prompt's image by base and adapted model, at the same seed."""
    if e.dino_class_base is None or e.dino_class_adapted is None:
        return None
    return 1 - (e.dino_class_base.astype(np.float64) * e.dino_class_adapted).sum(axis=1)


def copy_score(e: Embeddings) -> np.ndarray:
    """Return (G,) DINO similarity to the nearest real photo."""
    return cosines(e.dino_generated, e.dino_real).max(axis=1)


@dataclass(frozen=True)
class Metric:
    """A row of METRICS: values by image, how they become one score, and which way is good."""

    of_pictures: Callable[[Embeddings], np.ndarray | None]
    title: str
    higher_is_better: bool
    largest: bool = False
    """The score is the largest value and not the mean."""

    def reduce(self, values: np.ndarray) -> np.ndarray:
        return values.max(axis=-1) if self.largest else values.mean(axis=-1)


METRICS: dict[str, Metric] = {
    "clip_i": Metric(clip_i, "CLIP-I", True),
    "clip_t": Metric(clip_t, "CLIP-T", True),
    "dino": Metric(dino, "DINO", True),
    "class_drift": Metric(class_drift, "class drift", False),
    "copy": Metric(copy_score, "copy score", False, largest=True),
}


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the (A, B) similarities in fp64 of unit rows (A, W) and (B, W)."""
    return a.astype(np.float64) @ b.astype(np.float64).T


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; ValueError where one is not finite or is zero."""
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise ValueError("an embedding is zero or not finite: is the encoder's file damaged?")
    return (rows / length).astype(np.float32)


def values_of(embeddings: Embeddings) -> dict[str, list[float]]:
    """Return metric -> one value per image, for the metrics that these embeddings allow."""
    found = {name: metric.of_pictures(embeddings) for name, metric in METRICS.items()}
    return {name: [float(value) for value in values] for name, values in found.items() if values is not None}


def summarise(name: str, values: Sequence[float], seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Return value, std over images (n - 1), 95 % bootstrap interval low to high, n, and with `seeds` the value by
    seed."""
    metric, array = METRICS[name], np.asarray(values, dtype=np.float64)
    low, high = bootstrap(array, metric.reduce)
    summary: dict[str, Any] = {
        "value": float(metric.reduce(array)),
        "std": float(array.std(ddof=1)) if len(array) > 1 else 0.0,
        "low": low,
        "high": high,
        "n": len(array),
    }
    if seeds is not None:
        marks = np.asarray(seeds)
        summary["by_seed"] = {str(seed): float(metric.reduce(array[marks == seed])) for seed in sorted(set(seeds))}
    return summary


def bootstrap(
    values: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray] = lambda rows: rows.mean(axis=-1), seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic over resampled images; the same numbers for the same seed."""
    picks = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAPS, len(values)))
    low, high = np.percentile(reduce(values[picks]), (2.5, 97.5))
    return float(low), float(high)


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return the mean of first - second over the same prompts and seeds, its bootstrap interval, and whether that
    excludes 0."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} images cannot be compared one by one")
    gap = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    low, high = bootstrap(gap)
    return {"value": float(gap.mean()), "low": low, "high": high, "larger_than_chance": low > 0 or high < 0}
