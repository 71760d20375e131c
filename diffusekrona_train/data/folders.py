"""Images in folders: photos with captions beside them, metadata files, kohya's `10_sks dog`, explicit files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffusekrona_train.data.captions import Beside, choose, is_caption_file
from diffusekrona_train.data.images import HEIC_SUFFIXES, SUFFIXES
from diffusekrona_train.data.metadata import NAMES, Metadata, read_metadata
from diffusekrona_train.data.names import existing, is_mask, is_mask_folder, loose, printable
from diffusekrona_train.data.pictures import Candidate, Found, Wanted

MOST_REPEATS = 500
"""A larger number before a folder's name is a year, a date or a count: `2023_summer` is not 2,023 repeats."""
_KOHYA = re.compile(r"(\d+)_(.+)")
_EARLIEST, _LATEST = 1900, 2100


def read_folder(folder: Path, wanted: Wanted) -> Found:
    """Return the images of one folder, by name; its folders count where they are kohya's or its metadata names them."""
    entries = list_folder(folder)
    kohya = [entry for entry in entries if entry.is_dir() and _KOHYA.fullmatch(entry.name)]
    if kohya and not any(is_image(entry) for entry in entries):
        found = _read_kohya(folder, entries, kohya, wanted)
    else:
        found = _scan(folder, entries, wanted)
    if wanted.key is not None and wanted.captions and not found.metadata:
        raise ValueError(f"subject.caption_key: {printable(str(folder))} holds neither {NAMES[0]} nor {NAMES[1]}")
    return found


def read_files(files: list[str], folder: Path | None, wanted: Wanted) -> Found:
    """Return exactly these files, in this order; relative names are looked up in `folder` if there is one."""
    candidates: list[Candidate] = []
    skipped: list[tuple[str, str]] = []
    beside: dict[Path, Beside] = {}
    for index, name in enumerate(files):
        path = existing(Path(folder or "", name).expanduser())
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "is not there"
            raise ValueError(f"subject.files[{index}]: {printable(str(path))} {kind}; name an image file")
        if any(path.samefile(other.path) for other in candidates if other.path):
            raise ValueError(f"subject.files[{index}]: {printable(name)} is named twice")
        if path.parent not in beside:
            beside[path.parent] = _beside(path.parent)
        candidates.append(_from_file(path, path.name, beside[path.parent], wanted, skipped))
    return Found(candidates, skipped)


def read_file(path: Path, wanted: Wanted) -> Found:
    """Return one image with the caption beside it."""
    skipped: list[tuple[str, str]] = []
    return Found([_from_file(path, path.name, _beside(path.parent), wanted, skipped)], skipped)


def _beside(folder: Path) -> Beside:
    entries = list_folder(folder)
    return Beside(entries, filter(is_image, entries))


def _from_file(path: Path, name: str, beside: Beside, wanted: Wanted, skipped: list[tuple[str, str]]) -> Candidate:
    """Return the image at `path` with the captions of the text file beside it; other text files of it go to
    `skipped`."""
    if not wanted.captions:
        return Candidate(name, path)
    captions, source, others = choose(path, beside.of(path))
    skipped += [(other.name, why) for other, why in others]
    return Candidate(name, path, captions=captions, caption_source=source)


def list_folder(folder: Path) -> list[Path]:
    """Return everything in `folder`, by name; ValueError where it may not be read."""
    try:
        return sorted(folder.iterdir(), key=lambda path: (path.name.casefold(), path.name))
    except OSError as error:
        raise ValueError(f"{printable(str(folder))}: cannot be read ({error.strerror})") from None


def is_image(path: Path) -> bool:
    """Return whether `path` is a visible file with the suffix of an image."""
    return not path.name.startswith(".") and path.suffix.lower() in SUFFIXES | HEIC_SUFFIXES and path.is_file()


def _scan(folder: Path, entries: Sequence[Path], wanted: Wanted, outer: Metadata | None = None) -> Found:
    """Return the photos among `entries`, with the captions of metadata (the folder's own before `outer`) or beside
    them."""
    metadata = read_metadata(folder, list(entries), wanted.key, wanted.captions)
    captions = {**(outer.captions if outer else {}), **metadata.captions}
    source = metadata.name or (outer.name if outer else "")
    images = [entry for entry in entries if is_image(entry)]
    stems = {loose(image.stem) for image in images}
    masks = {image for image in images if is_mask(image.stem, stems, wanted.subject)}
    photos = [image for image in images if image not in masks]
    beside = Beside(entries, photos)
    found = Found([], [], list(metadata.notes), bool(metadata.name))
    for path in photos:
        own = captions.get(path, ())
        if own:
            why = f"{source} has the caption of {printable(path.name)}"
            found.skipped += [(file.name, why) for file in beside.of(path)]
            found.candidates.append(Candidate(path.name, path, captions=own, caption_source=source))
        else:
            found.candidates.append(_from_file(path, path.name, beside, wanted, found.skipped))
    _add_listed(found, metadata, photos, masks, wanted)
    told = {metadata.path, *photos, *(file for path in photos for file in beside.of(path))}
    for entry in entries:
        if entry not in told:
            found.skipped.append((entry.name, "a mask, by its name" if entry in masks else _why_skipped(entry)))
    return found


def _add_listed(found: Found, metadata: Metadata, photos: Sequence[Path], masks: set[Path], wanted: Wanted) -> None:
    """Add the images in folders below that the metadata names."""
    there = {*photos, *masks}
    for path, own in metadata.captions.items():
        if path in there or not metadata.path:
            continue
        name = path.relative_to(metadata.path.parent).as_posix()
        stems = {loose(other.stem) for other in metadata.captions if other.parent == path.parent}
        if is_mask(path.stem, stems, wanted.subject) or any(map(is_mask_folder, Path(name).parts[:-1])):
            found.skipped.append((name, f"a mask, by its name, though {metadata.name} lists it"))
        elif own:
            found.candidates.append(Candidate(name, path, captions=own, caption_source=metadata.name))
        else:
            found.candidates.append(_from_file(path, name, _beside(path.parent), wanted, found.skipped))


def _why_skipped(entry: Path) -> str:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        kind = "a folder of masks" if is_mask_folder(entry.name) else "a folder"
        return f"{kind}; only images directly in subject.images are read"
    if not entry.is_file():
        return "a link that leads nowhere" if entry.is_symlink() else "no regular file"
    if is_caption_file(entry):
        return "a caption without an image"
    if loose(entry.name) in NAMES:
        return f"{NAMES[0]} is read"
    return "no image, by its suffix"


def _read_kohya(folder: Path, entries: Sequence[Path], folders: Sequence[Path], wanted: Wanted) -> Found:
    outer = read_metadata(folder, list(entries), wanted.key, wanted.captions)
    found = Found([], [], list(outer.notes), bool(outer.name))
    stray = [entry for entry in entries if entry not in folders and entry != outer.path]
    found.skipped += [(entry.name, _why_skipped(entry)) for entry in stray]
    for inner in folders:
        if is_mask_folder(inner.name):
            found.skipped.append((inner.name, "a folder of masks, by its name"))
            continue
        repeats, words = _repeats(inner.name, found)
        within = _scan(inner, list_folder(inner), wanted, outer)
        found.skipped += [(f"{inner.name}/{name}", why) for name, why in within.skipped]
        found.notes += [f"{printable(inner.name)}/{note}" for note in within.notes]
        found.metadata |= within.metadata
        for candidate in within.candidates:
            if not candidate.captions and words and wanted.captions:
                candidate = replace(candidate, captions=(words,), caption_source="kohya folder names")
            found.candidates.append(replace(candidate, name=f"{inner.name}/{candidate.name}", repeats=repeats))
    return found


def _repeats(name: str, found: Found) -> tuple[int | None, str]:
    """Return (repeats, caption) of a folder name as kohya writes it; (None, …) and a note where the number means
    another."""
    number, words = _KOHYA.fullmatch(name).groups()  # type: ignore[union-attr]
    repeats = int(number)
    if repeats == 0:
        raise ValueError(f"{printable(name)}: 0 repeats; a kohya folder has 1 to {MOST_REPEATS}")
    if repeats <= MOST_REPEATS:
        return repeats, words
    is_date = _EARLIEST <= repeats <= _LATEST or repeats > 10_000
    taken = "a date" if is_date else "no number of repeats"
    found.notes.append(
        f"{printable(name)}: {number[:20]} is taken for {taken} (repeats go to {MOST_REPEATS}): each photo counts once"
    )
    # a year's folder is named after an occasion, not after the subject
    return None, "" if is_date else words
