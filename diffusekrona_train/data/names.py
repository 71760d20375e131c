"""Comparing file names as people write them: Unicode forms, capitals, Windows separators. Standard library only."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path


def printable(name: str, limit: int = 100) -> str:
    """Return a file name on one line: line ends and control characters escaped, very long names cut in the middle."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in name)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def plain(name: str) -> str:
    """Return the name in composed form (NFC): macOS writes `é` as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def loose(name: str) -> str:
    """Return what two names share that differ only in Unicode form or capitals, as FAT drives and cameras change
    them."""
    return plain(plain(name).casefold())


_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)  # names that Windows keeps for itself


def safe_name(name: str, fallback: str, limit: int = 60) -> str:
    """Return letters, digits, `-` and `_` of a name, at most `limit`; `fallback` where nothing is left."""
    words = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:limit].strip("-")
    return f"{fallback}-{words}" if _DEVICES.fullmatch(words) else words or fallback


def find_below(folder: Path, name: str) -> Path | None:
    """Return the entry of `folder` that the relative `name` means, None where there is none or several fit equally
    well.

    Each part is looked up as it is, then in any Unicode form, then with any capitals.
    """
    place = folder
    for part in Path(name).parts:
        found = _entry(place, part)
        if found is None:
            return None
        place = found
    return place


def existing(path: Path) -> Path:
    """Return `path` itself if it or nothing like it exists, else the entry whose name differs only in Unicode form."""
    try:
        if path.exists():
            return path
        anchor = Path(path.anchor)
        found = find_below(anchor if path.is_absolute() else Path(), str(path.relative_to(anchor)))
    except (OSError, ValueError):
        return path
    return found if found is not None and plain(str(found)) == plain(str(path)) else path


def _entry(folder: Path, part: str) -> Path | None:
    direct = folder / part
    if part == ".." or direct.exists() or direct.is_symlink():
        return direct
    if not folder.is_dir():
        return None
    entries = list(folder.iterdir())
    for form in (plain, loose):
        fitting = [entry for entry in entries if form(entry.name) == form(part)]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


# ---- what is not a photo of the subject ----

_ALWAYS = re.compile(r".+[-_](masklabel|condlabel)", re.IGNORECASE)
_MASK = re.compile(r"(.+?)([-_. ])masks?", re.IGNORECASE)
_MASK_FIRST = re.compile(r"masks?[-_. ](.+)", re.IGNORECASE)
_MASK_FOLDER = re.compile(r"(.*[-_. ])?(masks?|masklabels?|condlabels?|conditioning)", re.IGNORECASE)


def is_mask(stem: str, stems: set[str], subject: str = "") -> bool:
    """Return whether an image is a mask by its name: `0-masklabel`, `0-condlabel`, `0_mask`, or `mask_0` beside `0`.

    `stems` are the loose stems of all images beside it, `subject` the class noun: of a subject that is itself a mask,
    `front_mask` is left out only where `front` is there too.
    """
    if _ALWAYS.fullmatch(stem):
        return True
    first = _MASK_FIRST.fullmatch(stem)
    if first and loose(first[1]) in stems:
        return True
    match = _MASK.fullmatch(stem)
    if match is None or loose(match[1]) in stems:
        return match is not None
    return match[2] != " " and "mask" not in subject.casefold()  # `pug with mask` is a photo


def is_mask_folder(name: str) -> bool:
    """Return whether a folder holds masks by its name: `masks`, `10_sks dog_mask`, `conditioning`."""
    return bool(_MASK_FOLDER.fullmatch(name))
