"""Is a generated image recognised as its subject among look-alikes? And the titles of all that a study can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusekrona_train.evaluation.inputs import Generated, photos_of
from diffusekrona_train.evaluation.metrics import METRICS, cosines

TITLES = {name: metric.title for name, metric in METRICS.items()} | {"gallery": "recognised", "rank": "gallery rank"}
"""Metric -> head of its column. recognised: the share of images whose nearest photo shows the subject; gallery rank:
the subject's place among all subjects by their nearest photo, 1 where it is recognised."""


def needs_gallery(metrics: Sequence[str]) -> bool:
    return not {"gallery", "rank"}.isdisjoint(metrics)


def rank_in_gallery(encoder: Any, own: str, others: Sequence[str], generated: Sequence[Generated]) -> dict[str, float]:
    """Return `gallery` and `rank`, means over the generated images.

    own and others: where the photos of the subject and of each look-alike are. encoder.images gives unit rows.
    """
    images = encoder.images([image.open() for image in generated])
    nearest = [cosines(images, encoder.images(photos_of(each))).max(axis=1) for each in (own, *others)]
    ranks = ranks_of(np.stack(nearest))
    return {"gallery": round(float((ranks == 1).mean()), 6), "rank": round(float(ranks.mean()), 6)}


def ranks_of(nearest: np.ndarray) -> np.ndarray:
    """(1 + look-alikes, images) similarities, the subject's first -> (images,) its rank; a tie is not a win."""
    return 1 + (nearest[1:] >= nearest[0]).sum(axis=0)
