"""Which part of a photo is learnt from: square crops or aspect buckets, flips, and the numbers SDXL is told about them.

A pure function of (seed, file content, settings), so that every process and every run plans the same crops.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffusekrona_train.config import DataConfig
from diffusekrona_train.data.pictures import Picture


@dataclass(frozen=True)
class Crop:
    """A rectangle of a picture after it was scaled (and mirrored, where `flipped`); all pairs are (height, width)."""

    picture: Picture
    scaled_hw: tuple[int, int]
    """Size in pixels that the whole picture is scaled to."""
    top_left: tuple[int, int]
    """Where the crop begins in the scaled picture, mirrored first where `flipped`: SDXL's crop ids."""
    size_hw: tuple[int, int]
    """Size of the crop: SDXL's target size."""
    flipped: bool = False

    @property
    def original_hw(self) -> tuple[int, int]:
        """Size of the photo after its orientation: SDXL's original size."""
        return self.picture.height, self.picture.width

    @property
    def upscaling(self) -> float:
        """How much larger the scaled picture is than the photo; above 1 its detail is invented."""
        return self.scaled_hw[0] / self.picture.height

    @property
    def share(self) -> float:
        """Share of the photo's area that the crop shows."""
        return math.prod(self.size_hw) / math.prod(self.scaled_hw)

    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the crop in pixels of the upright, unmirrored photo."""
        (scaled_h, scaled_w), (height, width) = self.scaled_hw, self.size_hw
        top, left = self.top_left
        left = scaled_w - left - width if self.flipped else left
        x, y = self.picture.width / scaled_w, self.picture.height / scaled_h
        return (
            left * x,
            top * y,
            min((left + width) * x, self.picture.width),
            min((top + height) * y, self.picture.height),
        )


def plan_crops(pictures: Sequence[Picture], data: DataConfig, seed: int) -> list[list[Crop]]:
    """For each picture its `data.variants` crops, all of one size."""
    return [[_plan(picture, data, seed, variant) for variant in range(data.variants)] for picture in pictures]


def crop_pixels(crop: Crop, photo: Image.Image | None = None) -> np.ndarray:
    """Return the crop as (H, W, 3) uint8, RGB. Scales only what is cut out, however long the photo is.

    `photo` is the decoded photo where the caller holds it already.
    """
    image = photo if photo is not None else crop.picture.open()
    height, width = crop.size_hw
    box = crop.box()
    if crop.scaled_hw == crop.original_hw:
        image = image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]
    else:
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if crop.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """(height, width) of all buckets: at most resolution² pixels, at most 2:1, in steps of 64 (of 16 when small)."""
    step = 64 if resolution >= 256 else 16 if resolution >= 32 else 8
    sizes = {(resolution, resolution)}
    for width in range(step, 2 * resolution + 1, step):
        height = resolution * resolution // width // step * step
        if height and 0.5 <= height / width <= 2:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def _size_for(picture: Picture, data: DataConfig) -> tuple[int, int]:
    if not data.buckets:
        return data.resolution, data.resolution
    sizes = bucket_sizes(data.resolution)
    if (picture.height, picture.width) in sizes:
        return picture.height, picture.width
    aspect = math.log(picture.height / picture.width)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]))


def _plan(picture: Picture, data: DataConfig, seed: int, variant: int) -> Crop:
    height, width = _size_for(picture, data)
    scale = max(height / picture.height, width / picture.width)
    scaled_h, scaled_w = max(height, round(picture.height * scale)), max(width, round(picture.width * scale))
    digest = hashlib.sha256(f"{seed}:{picture.sha256}:{variant}".encode()).digest()
    chance = random.Random(digest)
    if data.crop == "random":
        top_left = chance.randint(0, scaled_h - height), chance.randint(0, scaled_w - width)
    else:
        top_left = (scaled_h - height) // 2, (scaled_w - width) // 2
    # by turns and not by chance, so that few variants hold both sides
    flipped = data.flip and (variant + int(picture.sha256[:2], 16)) % 2 == 1
    return Crop(picture, (scaled_h, scaled_w), top_left, (height, width), flipped)
