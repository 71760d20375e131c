"""metadata.jsonl and metadata.csv: captions by file name, as imagefolder data sets keep them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusekrona_train.common.files import read_text
from diffusekrona_train.data.captions import KEYS, Captions, as_captions, looks_like_text, pick
from diffusekrona_train.data.images import HEIC_SUFFIXES, SUFFIXES
from diffusekrona_train.data.names import find_below, loose, printable

NAMES = ("metadata.jsonl", "metadata.csv")
"""The first that is there is read."""
_SHOULD = {
    ".jsonl": '{"file_name": "a.jpg", "text": "…"}',
    ".csv": "file_name,text in its first line and a.jpg,… below",
}


@dataclass
class Metadata:
    """Captions by image; images without a caption have an empty tuple. `name` is that of the file, '' without one."""

    captions: dict[Path, Captions] = field(default_factory=dict)
    name: str = ""
    path: Path | None = None
    notes: list[str] = field(default_factory=list)
    """What was found in the file and is not used."""


def read_metadata(folder: Path, entries: list[Path], key: str | None, use: bool = True) -> Metadata:
    """Return the metadata file among `entries` of `folder`, if any; ValueError with the line that is wrong.

    `key`: `subject.caption_key`. `use` False: captions are not read, only which files there are.
    """
    by_name = {loose(entry.name): entry for entry in entries if entry.is_file()}
    path = next((by_name[name] for name in NAMES if name in by_name), None)
    if path is None:
        return Metadata()
    metadata = Metadata(name=printable(path.name), path=path)
    unused: dict[str, None] = {}
    seen, keyed, bare = {}, 0, 0
    for place, row in _rows(path):
        image = _image(folder, row, place, path.suffix.lower())
        if image in metadata.captions:
            raise ValueError(f"{place}: {printable(image.name)} has a line already")
        value = pick(row, key) if use else None
        metadata.captions[image] = as_captions(value, place)
        seen |= dict.fromkeys(name for name in row if isinstance(name, str) and loose(name) != "file_name")
        keyed += value is not None
        if use and not metadata.captions[image]:
            others = [name for name, other in row.items() if looks_like_text(other) and loose(str(name)) != "file_name"]
            unused |= dict.fromkeys(others)
            bare += bool(others)
    if use and key is not None and not keyed:
        known = ", ".join(map(printable, seen)) or "none besides file_name"
        raise ValueError(
            f"subject.caption_key: no line of {metadata.name} has {printable(key)!r}; its keys are {known}"
        )
    if unused:
        wanted = f"{', '.join(KEYS[:-1])} or {KEYS[-1]}" if key is None else printable(key)
        names = ", ".join(map(printable, unused))
        metadata.notes.append(
            f"{metadata.name}: {bare} lines have no caption under {wanted}; not used: {names} "
            "(subject.caption_key names the one to take)"
        )
    return metadata


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return (what to call it, row) for each line of the file."""
    text = read_text(path)
    return _json_rows(text, printable(path.name)) if path.suffix.lower() == ".jsonl" else _csv_rows(text, path.name)


def _json_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number}: is not JSON ({error})") from None
        yield f"{name}, line {number}", row if isinstance(row, dict) else {}


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    first = text.lstrip().split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)  # where the comma is the decimal sign, Excel writes semicolons
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    head: list[str] | None = None
    try:
        for cells in reader:
            place = f"{printable(name)}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if head is None:
                head = [cell.strip() for cell in cells]
            elif len(cells) != len(head):
                raise ValueError(
                    f"{place}: has {len(cells)} values for {len(head)} columns; a caption that holds "
                    f"{'a tab' if delimiter == chr(9) else repr(delimiter)} goes into double quotes"
                )
            else:
                yield place, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{printable(name)}, line {reader.line_num}: is not CSV ({error})") from None


def _image(folder: Path, row: dict[str, Any], place: str, suffix: str) -> Path:
    """Return the image that a row names; ValueError where it names none, or one outside the folder."""
    name = next((value for key, value in row.items() if loose(str(key)) == "file_name"), None)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{place}: should read {_SHOULD[suffix]}")
    shown = printable(name)
    path = find_below(folder, name)
    if path is None and "\\" in name:  # written on Windows
        name = name.replace("\\", "/")
        path = find_below(folder, name)
    if Path(name).is_absolute() or ".." in Path(name).parts or (path and not _is_within(folder, path)):
        raise ValueError(f"{place}: {shown} leads out of the folder of the images")
    if path is None or not path.is_file():
        raise ValueError(f"{place}: {shown} is not there")
    if path.suffix.lower() not in SUFFIXES | HEIC_SUFFIXES:
        raise ValueError(f"{place}: {shown} is not an image, by its suffix")
    return path


def _is_within(folder: Path, path: Path) -> bool:
    """Return whether a file lies in the folder, or, in a snapshot of the hub's cache, is a link to a blob of its
    repository.

    The cache keeps owner--name/blobs/HASH, and owner--name/snapshots/REVISION/dog.jpg as a link to it.
    """
    home, target = folder.resolve(), path.resolve()
    if target.is_relative_to(home):
        return True
    snapshots = next((parent for parent in home.parents if parent.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.parent / "blobs"
