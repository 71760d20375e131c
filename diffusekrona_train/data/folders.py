"""Images in folders: photos with captions beside them, metadata.jsonl, kohya's `10_sks dog`, explicit files."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from diffusekrona_train.data.images import HEIC_SUFFIXES, SUFFIXES, printable
from diffusekrona_train.data.pictures import Candidate

Found = tuple[list[Candidate], list[tuple[str, str]]]
"""Candidates in order, and (name, why) of what was skipped."""

CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_KEYS = ("text", "caption", "prompt")
_KOHYA = re.compile(r"(\d+)_(.+)")


def read_folder(folder: Path) -> Found:
    """The images of one folder, by name; its folders count where they are kohya's or metadata.jsonl names them."""
    entries = list_folder(folder)
    kohya = [entry for entry in entries if entry.is_dir() and _KOHYA.fullmatch(entry.name)]
    if kohya and not any(is_image(entry) for entry in entries):
        return _read_kohya(entries, kohya)
    captions = _read_metadata(folder) if (folder / "metadata.jsonl").is_file() else {}
    candidates, skipped = _scan(folder, entries)
    listed = {candidate.path for candidate in candidates}
    for path in captions:
        if path not in listed:
            candidates.append(from_file(path, path.relative_to(folder).as_posix()))
    return [_with_metadata(candidate, captions) for candidate in candidates], skipped


def read_files(files: list[str], folder: Path | None) -> Found:
    """Exactly these files, in this order; relative names are looked up in `folder` where there is one."""
    candidates = []
    for index, name in enumerate(files):
        path = Path(folder or "", name).expanduser()
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "is not there"
            raise ValueError(f"subject.files[{index}]: {printable(str(path))} {kind}; name an image file")
        if any(path.samefile(other.path) for other in candidates):
            raise ValueError(f"subject.files[{index}]: {printable(name)} is named twice")
        candidates.append(from_file(path, path.name))
    return candidates, []


def from_file(path: Path, name: str) -> Candidate:
    """The image at `path` with the caption in the text file beside it, if there is one."""
    for suffix in CAPTION_SUFFIXES:
        beside = path.with_suffix(suffix)
        if beside.is_file():
            caption = _read_caption(beside)
            source = f"{suffix} files" if caption else f"subject.prompt ({suffix} file is empty)"
            return Candidate(name, path, caption=caption or None, caption_source=source)
    return Candidate(name, path)


def list_folder(folder: Path) -> list[Path]:
    """Everything in `folder`, by name; ValueError where it may not be read."""
    try:
        return sorted(folder.iterdir(), key=lambda path: (path.name.casefold(), path.name))
    except OSError as error:
        raise ValueError(f"{printable(str(folder))}: cannot be read ({error.strerror})") from None


def is_image(path: Path) -> bool:
    """Whether `path` is a visible file with the suffix of an image."""
    return not path.name.startswith(".") and path.suffix.lower() in SUFFIXES | HEIC_SUFFIXES and path.is_file()


def _scan(folder: Path, entries: list[Path]) -> Found:
    candidates, skipped = [], []
    images = {entry.with_suffix("") for entry in entries if is_image(entry)}
    for entry in entries:
        if is_image(entry):
            candidates.append(from_file(entry, entry.name))
        elif entry.suffix.lower() in CAPTION_SUFFIXES and entry.with_suffix("") in images:
            continue
        elif entry.name != "metadata.jsonl":
            skipped.append((entry.name, _why_skipped(entry)))
    return candidates, skipped


def _why_skipped(entry: Path) -> str:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "a folder; only images directly in subject.images are read"
    if not entry.is_file():
        return "a link that leads nowhere" if entry.is_symlink() else "no regular file"
    if entry.suffix.lower() in CAPTION_SUFFIXES:
        return "a caption without an image"
    return "no image, by its suffix"


def _read_caption(path: Path) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return " ".join(content.decode(encoding).split())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable(path.name)}: byte {error.start} is not UTF-8; save the caption as UTF-8"
        ) from None


def _read_kohya(entries: list[Path], folders: list[Path]) -> Found:
    candidates: list[Candidate] = []
    skipped = [(entry.name, _why_skipped(entry)) for entry in entries if entry not in folders]
    for folder in folders:
        repeats, words = _KOHYA.fullmatch(folder.name).groups()  # type: ignore[union-attr]
        if not 1 <= int(repeats) <= 10_000:
            raise ValueError(f"{printable(folder.name)}: {repeats} repeats; a kohya folder has 1 to 10000")
        inner, left_out = _scan(folder, list_folder(folder))
        skipped += [(f"{folder.name}/{name}", why) for name, why in left_out]
        for candidate in inner:
            caption, source = candidate.caption, candidate.caption_source
            if caption is None:
                caption, source = words, "kohya folder names"
            name = f"{folder.name}/{candidate.name}"
            candidates.append(
                Candidate(name, candidate.path, caption=caption, caption_source=source, repeats=int(repeats))
            )
    return candidates, skipped


def _read_metadata(folder: Path) -> dict[Path, str | None]:
    """Image -> caption (None where the line has none) from metadata.jsonl; ValueError with the line that is wrong."""
    captions: dict[Path, str | None] = {}
    try:
        text = (folder / "metadata.jsonl").read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"metadata.jsonl: byte {error.start} is not UTF-8") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            path, caption = _read_metadata_line(folder, line, f"metadata.jsonl, line {number}")
            if path in captions:
                raise ValueError(f"metadata.jsonl, line {number}: {printable(path.name)} has a line already")
            captions[path] = caption
    return captions


def _read_metadata_line(folder: Path, line: str, place: str) -> tuple[Path, str | None]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: is not JSON ({error})") from None
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f'{place}: should read {{"file_name": "a.jpg", "text": "…"}}')
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{place}: {printable(name)} leads out of the folder of the images")
    if not path.is_file():
        raise ValueError(f"{place}: {printable(name)} is not there")
    if path.suffix.lower() not in SUFFIXES | HEIC_SUFFIXES:
        raise ValueError(f"{place}: {printable(name)} is no image, by its suffix")
    caption = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), None)
    if caption is not None and not isinstance(caption, str):
        raise ValueError(f"{place}: the caption should be text and is {type(caption).__name__}")
    return path, " ".join(caption.split()) or None if caption else None


def _with_metadata(candidate: Candidate, captions: dict[Path, str | None]) -> Candidate:
    caption = captions.get(candidate.path) if candidate.path else None
    if caption is None:
        return candidate
    return Candidate(candidate.name, candidate.path, caption=caption, caption_source="metadata.jsonl")
