"""A photo with its caption, and a collection of them with what was left out and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffusekrona_train.data.images import inspect_image, open_image, printable


@dataclass(frozen=True)
class Candidate:
    """An image before it was opened: a file, or the bytes that `read` fetches, and the caption found with it."""

    name: str
    path: Path | None = None
    read: Callable[[], bytes] | None = None
    caption: str | None = None
    caption_source: str = "subject.prompt"
    repeats: int = 1

    def content(self) -> bytes | Path:
        return self.read() if self.read is not None else self.path  # type: ignore[return-value]


@dataclass(frozen=True)
class Picture:
    """A photo that was opened once and found whole. Width and height are in pixels, after its orientation."""

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

    def open(self) -> Image.Image:
        """The RGB image: upright, transparency over white."""
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


def open_all(
    candidates: Sequence[Candidate],
    skipped: Iterable[tuple[str, str]],
    fill: Callable[[str | None], str],
    is_prior: bool,
) -> Collection:
    """Decode every candidate once; ValueError naming the first that is broken and how many more are."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        results = list(pool.map(_examine, candidates))
    broken = [result for result in results if isinstance(result, str)]
    if broken:
        more = f" (and {len(broken) - 1} more images are unusable)" if len(broken) > 1 else ""
        raise ValueError(broken[0] + more)
    collection = Collection([], [(printable(name), why) for name, why in skipped])
    whole = [result for result in results if not isinstance(result, str)]
    for candidate, (digest, width, height, remarks) in zip(candidates, whole, strict=True):
        caption = fill(candidate.caption)
        collection.pictures.append(
            Picture(
                candidate.path,
                caption,
                is_prior,
                digest,
                width,
                height,
                candidate.name,
                candidate.repeats,
                candidate.read,
            )
        )
        collection.caption_source[candidate.caption_source] += 1
        collection.remarks += [(printable(candidate.name), remark) for remark in remarks]
    return collection


def _examine(candidate: Candidate) -> tuple[str, int, int, list[str]] | str:
    """(sha256 of the content, width, height, remarks), or what is wrong with it."""
    try:
        content = candidate.content()
        image, remarks = inspect_image(content, candidate.name)
        if isinstance(content, Path):
            with open(content, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            digest = hashlib.sha256(content).hexdigest()
    except OSError as error:
        return f"{printable(candidate.name)}: cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)
    return digest, image.width, image.height, remarks
