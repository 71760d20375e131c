"""What a photographer would say about the photos before training on them. Numbers from PIL and numpy, no model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from diffusekrona_train.data.names import printable
from diffusekrona_train.data.pictures import Crop

ENLARGED = 1.25
"""Enlargement from which invented detail shows."""
CUT_AWAY = 0.6
"""A crop that keeps less than this share of a photo may have lost the subject."""
BLURRED = 25.0
"""Variance of the Laplacian, photos at 512 pixels: out-of-focus ones lie below, sharp ones in the hundreds."""
STRAIGHT, TILTED = 3.0, (4.0, 20.0)
"""How far the commonest direction of edges exceeds the mean one to count; degrees at which a photo leans by mistake."""
SAME_BITS, ALIKE_BITS = 6, 14
"""Of 64 bits of a difference hash: two shots of one moment; a set without variety (unrelated photos differ in 32)."""


def advise(crops: Sequence[Sequence[Crop]]) -> list[str]:
    """Return a line for each thing worth changing about the photos, by their planned crops.

    Photos are decoded one after the other: only a number and a hash of each are kept.
    """
    first = [row[0] for row in crops]
    sharp, leaning, hashes = [], [], []
    for crop in first:
        image = crop.picture.open()
        sharp.append(sharpness(image))
        leaning.append(tilt(image))
        hashes.append(difference_hash(image))
        del image
    lines = []
    enlarged = [crop for crop in first if crop.upscaling > ENLARGED]
    if enlarged:
        worst = max(enlarged, key=lambda crop: crop.upscaling)
        lines.append(
            f"small: {_names(enlarged)} would be enlarged, at worst {worst.upscaling:.1f}x "
            f"({worst.picture.width} x {worst.picture.height}); take larger photos or lower data.resolution"
        )
    cut = [crop for crop in first if crop.share < CUT_AWAY]
    if cut:
        worst = min(cut, key=lambda crop: crop.share)
        lines.append(
            f"cropped: {_names(cut)} lose much, at worst only {worst.share:.0%} is kept; look at the sheet, "
            "crop them by hand, or set data.buckets: true"
        )
    blurred = [crop for crop, value in zip(first, sharp, strict=True) if value < BLURRED]
    if blurred:
        lines.append(f"blurred: {_names(blurred)} look out of focus; a blurred photo teaches blur")
    tilted = [f"{_name(crop)} by {abs(angle):.0f}°" for crop, angle in zip(first, leaning, strict=True) if angle]
    if tilted:
        more = f" and {len(tilted) - 3} more" if len(tilted) > 3 else ""
        lines.append(f"tilted: {', '.join(tilted[:3])}{more}; straighten it, or what is generated may lean too")
    return lines + _likeness(first, hashes)


def _likeness(crops: Sequence[Crop], hashes: Sequence[np.ndarray]) -> list[str]:
    pairs = list(itertools.combinations(range(len(hashes)), 2))[:200_000]
    distances = [int(np.count_nonzero(hashes[i] != hashes[j])) for i, j in pairs]
    near = [pair for pair, distance in zip(pairs, distances, strict=True) if distance <= SAME_BITS]
    lines = []
    if near:
        shown = ", ".join(f"{_name(crops[i])} and {_name(crops[j])}" for i, j in near[:3])
        more = f" and {len(near) - 3} more pairs" if len(near) > 3 else ""
        lines.append(f"near-duplicates: {shown}{more}; they count as one view seen more often")
    elif len(hashes) > 2 and np.mean(distances) < ALIKE_BITS:
        lines.append("all alike: the photos hardly differ, so pose and background would be learnt with the subject")
    if len(hashes) == 1:
        lines.append("one photo: the subject is learnt only in this pose; 3 to 5 photos from several sides show more")
    return lines


def sharpness(image: Image.Image) -> float:
    """Return the variance of the Laplacian of the grey photo, at most 512 pixels wide; infinite for tiny drawings."""
    if min(image.size) < 128:
        return float("inf")
    small = image.convert("L")
    small.thumbnail((512, 512), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return float(laplacian.var())


def tilt(image: Image.Image) -> float:
    """Return how far a photo leans, in degrees (clockwise is positive), or 0 where its edges do not say so.

    Level and upright edges, of tables, walls and horizons, share one direction up to right angles. A photo leans where
    the strongest tenth of its edges agrees on another one, 4 to 20 degrees away, and few edges are level or upright.
    """
    if min(image.size) < 128:
        return 0.0
    small = image.convert("L")
    small.thumbnail((512, 512), Image.Resampling.BOX)
    grey = np.asarray(small.filter(ImageFilter.GaussianBlur(3)), dtype=np.float64)  # stairs of pixels have no direction
    across, down = grey[:, 2:] - grey[:, :-2], grey[2:] - grey[:-2]
    x = 3 * across[:-2] + 10 * across[1:-1] + 3 * across[2:]  # Scharr's filters: true to the direction
    y = 3 * down[:, :-2] + 10 * down[:, 1:-1] + 3 * down[:, 2:]
    strength = np.hypot(x, y)
    strong = strength >= np.quantile(strength, 0.9)
    strength, angles = strength[strong], (np.degrees(np.arctan2(y[strong], x[strong])) + 45) % 90 - 45
    edges = np.histogram(angles, bins=90, range=(-45, 45), weights=strength)[0]
    edges = sum(np.roll(edges, shift) for shift in (-1, 0, 1)) / max(3 * edges.mean(), 1e-9)
    at = int(edges.argmax())
    near = abs(angles - (at - 44.5)) <= 5
    angle = float(np.average(angles[near], weights=strength[near] + 1e-9)) if near.any() else 0.0
    clear = edges[at] >= STRAIGHT and edges[42:48].max() < edges[at] / 2
    return angle if clear and TILTED[0] <= abs(angle) <= TILTED[1] else 0.0


def difference_hash(image: Image.Image) -> np.ndarray:
    """Return (64,) bool: is each of 8 x 8 cells brighter than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return (grey[:, :-1] > grey[:, 1:]).ravel()


def _name(crop: Crop) -> str:
    return printable(crop.picture.name, limit=40)


def _names(crops: Sequence[Crop]) -> str:
    shown = ", ".join(_name(crop) for crop in crops[:3])
    return shown if len(crops) <= 3 else f"{shown} and {len(crops) - 3} more"
