"""Hold a photo with its caption, the crops of it that are learnt from, and a collection with what was left out and why.

Crops are square or of an aspect bucket. They are a pure function of (seed, file content, settings), so that every
process and every run plans the same ones.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from diffusekrona_train.config import DataConfig
from diffusekrona_train.data.captions import Captions
from diffusekrona_train.data.images import COLOUR_VERSION, inspect_image, open_image
from diffusekrona_train.data.names import printable


@dataclass(frozen=True)
class Candidate:
    """An image before it was opened: a file, or the bytes that `read` fetches, and the captions found with it."""

    name: str
    path: Path | None = None
    read: Callable[[], bytes] | None = None
    captions: Captions = ()
    caption_source: str = "subject.prompt"
    repeats: int | None = None
    """How often a pass shows it, where its folder says so."""

    def content(self) -> bytes | Path:
        return self.read() if self.read is not None else self.path  # type: ignore[return-value]


@dataclass(frozen=True)
class Wanted:
    """What a source should look for."""

    captions: bool = True
    key: str | None = None
    """subject.caption_key"""
    subject: str = ""
    """The class noun: decides whether `front_mask` is a mask or a photo of one."""


@dataclass
class Found:
    """What a source holds: candidates in order, (name, why) of what was skipped, and other notes."""

    candidates: list[Candidate]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: bool = False
    """Whether there is a metadata file."""


@dataclass(frozen=True)
class Picture:
    """A photo that was opened once and found intact. Width and height are in pixels, after its orientation."""

    path: Path | None
    caption: str
    is_prior: bool
    sha256: str
    width: int
    height: int
    name: str
    repeats: int = 1
    """How often a pass shows it (kohya folders)."""
    read: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)
    more_captions: Captions = ()
    """Captions that take turns with `caption`."""
    colour: str = ""
    """How its colours were converted; '' where they are sRGB as they lie in the file."""

    @property
    def captions(self) -> Captions:
        """Return all captions, in the order of their turns."""
        return self.caption, *self.more_captions

    def open(self) -> Image.Image:
        """Return the RGB image: upright, transparency over white."""
        return open_image(self.read() if self.read is not None else self.path, self.name)  # type: ignore[arg-type]


@dataclass
class Collection:
    """What a source of images gave."""

    pictures: list[Picture]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, why) of everything found that is not used."""
    caption_source: Counter[str] = field(default_factory=Counter)
    """How many captions came from where."""
    remarks: list[tuple[str, str]] = field(default_factory=list)
    """(name, what) of images that are used and that something was done to."""
    notes: list[str] = field(default_factory=list)
    """What was found and is not used as its owner may have meant it; training reports it too."""
    repeats_are_given: bool = False
    """Whether folders say how often a pass shows their photos (kohya)."""


def open_all(found: Found, fill: Callable[[str | None], str], is_prior: bool) -> Collection:
    """Decode every candidate once, one after the other; ValueError naming the first that is broken, and how many more.

    One decoded photo is held at a time: sixty of 24 megapixels would need 4 GiB.
    """
    collection = Collection([], [(printable(name), why) for name, why in found.skipped], notes=list(found.notes))
    broken: list[str] = []
    for candidate in found.candidates:
        try:
            picture, remarks = _examine(candidate, fill, is_prior)
        except ValueError as error:
            broken.append(str(error))
            continue
        collection.pictures.append(picture)
        collection.caption_source[candidate.caption_source] += 1
        collection.remarks += [(printable(candidate.name), remark) for remark in remarks]
        collection.repeats_are_given |= candidate.repeats is not None
    if broken:
        more = f" (and {len(broken) - 1} more images are unusable)" if len(broken) > 1 else ""
        raise ValueError(broken[0] + more)
    several = [picture for picture in collection.pictures if picture.more_captions]
    if several:
        shown = ", ".join(printable(picture.name, limit=40) for picture in several[:3])
        shown += f" and {len(several) - 3} more" if len(several) > 3 else ""
        collection.notes.append(f"captions by turns, one a pass: {shown} (a line of a text file is a caption)")
    return collection


def _examine(candidate: Candidate, fill: Callable[[str | None], str], is_prior: bool) -> tuple[Picture, list[str]]:
    """Return the photo and remarks on it; ValueError if it cannot be used."""
    try:
        content = candidate.content()
        opened = inspect_image(content, candidate.name)
        if isinstance(content, Path):
            with content.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            digest = hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise ValueError(f"{printable(candidate.name)}: cannot be read ({error.strerror or error})") from None
    first, *more = [fill(caption) for caption in candidate.captions] or [fill(None)]
    picture = Picture(
        candidate.path,
        first,
        is_prior,
        digest,
        opened.image.width,
        opened.image.height,
        candidate.name,
        candidate.repeats or 1,
        candidate.read,
        tuple(more),
        COLOUR_VERSION if opened.converted else "",
    )
    return picture, opened.remarks


# ---- crops ----


@dataclass(frozen=True)
class Crop:
    """A rectangle of a photo after it was scaled (and mirrored, where `flipped`); all pairs are (height, width)."""

    picture: Picture
    scaled_hw: tuple[int, int]
    """Size in pixels that the photo is scaled to."""
    top_left: tuple[int, int]
    """Where the crop begins in the scaled photo, mirrored first where `flipped`: SDXL's crop ids."""
    size_hw: tuple[int, int]
    """Size of the crop: SDXL's target size."""
    flipped: bool = False

    @property
    def original_hw(self) -> tuple[int, int]:
        """Return the size of the photo after its orientation: SDXL's original size."""
        return self.picture.height, self.picture.width

    @property
    def upscaling(self) -> float:
        """Return how much larger the scaled photo is; above 1 its detail is invented."""
        return self.scaled_hw[0] / self.picture.height

    @property
    def share(self) -> float:
        """Return the share of the photo's area that the crop shows."""
        return math.prod(self.size_hw) / math.prod(self.scaled_hw)

    def box(self) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) of the crop in pixels of the upright, unmirrored photo."""
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
    """Return for each photo its `data.variants` crops, all of one size."""
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
    """Return (height, width) of all buckets: up to resolution² pixels, up to 2:1, in steps of 64 (16 when small)."""
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
