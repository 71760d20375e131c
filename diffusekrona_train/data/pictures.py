"""A photo with its caption, and a collection of them with what was left out and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from diffusekrona_train.data import colour
from diffusekrona_train.data.captions import Captions
from diffusekrona_train.data.images import inspect_image, open_image, printable


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
    """The class noun: tells whether `front_mask` is a mask or a photo of one."""


@dataclass
class Found:
    """What a source holds: candidates in order, (name, why) of what was skipped, and what else is to be said."""

    candidates: list[Candidate]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    metadata: bool = False
    """Whether there is a metadata file."""


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
    more_captions: Captions = ()
    """Captions that take turns with `caption`."""
    colour: str = ""
    """How its colours were converted; '' where they are sRGB as they lie in the file."""

    @property
    def captions(self) -> Captions:
        """All captions, in the order of their turns."""
        return self.caption, *self.more_captions

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
    notes: list[str] = field(default_factory=list)
    """What was found and is not used as its owner may have meant it; training says it too."""
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
    """The picture and remarks on it; ValueError where it cannot be used."""
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
        colour.VERSION if opened.converted else "",
    )
    return picture, opened.remarks
