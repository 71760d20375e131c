"""Captions of photos: the text files beside them, one or several for a photo, none lost in silence.

A photo may have several captions: the lines of its text file, a list in metadata or in a data set's column. They are
taken by turns, one a pass, so that a photo with five is not seen more often than one with a single caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusekrona_train.common.files import read_text
from diffusekrona_train.data.names import loose, plain, printable

SUFFIXES = (".txt", ".caption")
KEYS = ("text", "caption", "prompt")
"""Keys of metadata and columns of data sets that hold captions, unless the config names another."""

Captions = tuple[str, ...]
"""The captions of one photo, in the order of their turns; empty where it has none."""


def tidy(text: str) -> str:
    """Return the text on one line."""
    return " ".join(text.split())


def as_captions(value: object, place: str) -> Captions:
    """Return captions of a value in metadata or a column: a text, a list of texts, or nothing; ValueError for
    others."""
    texts: Sequence[Any] = value if isinstance(value, list | tuple) else [] if value is None else [value]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"{place}: the caption should be text and is {type(wrong).__name__}")
    return tuple(filter(None, map(tidy, texts)))


def read_captions(path: Path) -> Captions:
    """Return the captions of a text file, one a line; ValueError where it is not text."""
    lines = re.split(r"\r\n|\r|\n", read_text(path, "save the caption as UTF-8"))
    return tuple(filter(None, map(tidy, lines)))


def is_caption_file(path: Path) -> bool:
    """Return whether `path` is a text file by its suffix, whatever its capitals."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def pick(row: dict[str, Any], key: str | None) -> Any:
    """Return the caption in a row of metadata: under `key`, or under the first of KEYS that holds one; None without."""
    wanted = (key,) if key is not None else KEYS
    by_name = {loose(name): value for name, value in reversed(row.items()) if isinstance(name, str)}
    found = (row[name] if name in row else by_name.get(loose(name)) for name in wanted)
    return next((value for value in found if value is not None), None)


def looks_like_text(value: object) -> bool:
    """Return whether a value that nobody reads could be a caption: a text with letters, or a list of such."""
    if isinstance(value, list | tuple):
        return any(map(looks_like_text, value))
    return isinstance(value, str) and any(character.isalpha() for character in value)


class Beside:
    """The caption files of one folder, found by the names of its photos."""

    def __init__(self, entries: Iterable[Path], photos: Iterable[Path]) -> None:
        self._owned = {plain(photo.stem) for photo in photos}
        self._files: dict[str, list[Path]] = {}
        for entry in entries:
            if is_caption_file(entry):
                self._files.setdefault(loose(entry.name), []).append(entry)

    def of(self, photo: Path) -> list[Path]:
        """Return all caption files of `photo`, the best match first: dog.txt, dog.caption, dog.jpg.txt,
        dog.jpg.caption.

        Capitals and Unicode forms of the names may differ, unless another photo has exactly the file's name.
        """
        found: list[Path] = []
        for stem in dict.fromkeys((plain(photo.stem), plain(photo.name))):
            for suffix in SUFFIXES:
                fitting = self._files.get(loose(stem + suffix), [])
                mine = [path for path in fitting if plain(path.stem) == stem or plain(path.stem) not in self._owned]
                found += sorted(mine, key=lambda path: (plain(path.stem) != stem, path.suffix != suffix, path.name))
        return found


def choose(photo: Path, files: list[Path]) -> tuple[Captions, str, list[tuple[Path, str]]]:
    """Return (captions, where they are from, the other files with why they are not used) among a photo's caption
    files."""
    if not files:
        return (), "subject.prompt", []
    contents = {path: read_captions(path) for path in files}
    used = next((path for path in files if contents[path]), files[0])
    suffix, captions = used.suffix.lower(), contents[used]
    why = f"another caption of {printable(photo.name)}; {printable(used.name)} is used"
    source = f"{suffix} files" if captions else f"subject.prompt ({suffix} file is empty)"
    return captions, source, [(path, why) for path in files if path != used]
