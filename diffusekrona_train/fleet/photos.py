"""Photos of a job from where they are: archives and URLs become a local folder, all else is read as in a config."""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from diffusekrona_train.common.files import atomic

LARGEST = 4 * 2**30
"""Bytes that the photos of one job may have, unpacked: more is no set of photos, or a trap."""
MOST_FILES = 10_000


def is_url(text: str) -> bool:
    """Return whether this is a URL that fsspec opens: s3://bucket/dog, https://…/dog.zip, memory://dog."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def is_archive(text: str) -> bool:
    return text.lower().endswith((".zip", *TARS))


TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


def is_elsewhere(images: str | None) -> bool:
    """Return whether `fetch` has to bring these photos here."""
    return images is not None and (is_url(images) or is_archive(images))


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it; ValueError where its package is not installed."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {_one_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{url}: cannot be opened ({_one_line(error)})") from None


def fetch(images: str, folder: Path) -> Path:
    """Bring an archive, or what a URL names, to `folder`, which is replaced; return the folder with the photos.

    ValueError of one line where it cannot be read, is damaged, or is larger than photos are.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic(folder) as room, tempfile.TemporaryDirectory() as scratch:
            room.mkdir()
            if is_url(images):
                _download(images, room, Path(scratch))
            else:
                unpack(Path(images).expanduser(), room)
    except ValueError as error:
        raise ValueError(f"images: {error}") from None
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"images: {images} cannot be read ({_one_line(error)})") from None
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _download(url: str, room: Path, scratch: Path) -> None:
    system, path = filesystem(url)
    if is_archive(url):
        local = scratch / Path(path).name
        _check_size(url, [system.size(path) or 0])
        system.get_file(path, str(local))
        return unpack(local, room)
    found = system.find(path, detail=True)
    if not found:
        raise ValueError(f"{url}: there is nothing")
    _check_size(url, [about.get("size") or 0 for about in found.values()])
    for name in found:
        relative = name[len(path.rstrip("/")) + 1 :] if name != path else Path(name).name
        if ".." in Path(relative).parts:
            raise ValueError(f"{url}: {relative!r} would lie outside of its folder")
        target = room / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(name, str(target))
    return None


def unpack(archive: Path, room: Path) -> None:
    """Unpack an archive into the folder `room`; ValueError where it is damaged, or holds what no photos need."""
    if not archive.is_file():
        raise ValueError(f"{archive} is not there")
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as zipped:
                _check_size(archive.name, [member.file_size for member in zipped.infolist()])
                zipped.extractall(room)
        else:
            with tarfile.open(archive) as tarred:
                _check_size(archive.name, [member.size for member in tarred.getmembers()])
                tarred.extractall(room, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{archive.name} cannot be unpacked ({_one_line(error)})") from None


def _check_size(name: str, sizes: list[int]) -> None:
    if sum(sizes) > LARGEST or len(sizes) > MOST_FILES:
        raise ValueError(
            f"{name}: {len(sizes)} files of {sum(sizes) / 2**20:.0f} MiB; at most {MOST_FILES} of {LARGEST >> 20} MiB "
            "are taken as the photos of one job"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
