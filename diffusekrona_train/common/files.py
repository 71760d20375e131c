"""Write files that are either complete or absent: beside their target, flushed, then renamed. Standard library only."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
"""What lies in the package: the embedded model, configs of known models, layer tables, suites, page templates."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file or make a folder at, which takes the name `path` when the block ends well.

    On an error, or a kill in the middle, what was at `path` before is untouched. Missing parent folders are made.
    The temporary name keeps the suffix, for libraries that choose a format by it. A folder replaces only an absent or
    an empty folder: OSError otherwise.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        room = Path(tempfile.mkdtemp(prefix=".writing-", dir=target.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target.parent)) from None
    try:
        temporary = room / target.name
        yield temporary
        mode = _usual_mode(room)
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            if file.is_file():
                file.chmod(mode)
                _flush(file)
        temporary.replace(target)
        _flush(target.parent)
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(target)) from error  # names what the user knows
    finally:
        shutil.rmtree(room, ignore_errors=True)


def remove_abandoned(folder: str | Path, seconds: float = 3600.0) -> None:
    """Remove what killed processes were writing under `folder`: temporary folders untouched for so long.

    Other processes may be writing there now; none of them takes an hour for one file of a cache.
    """
    for place, folders, _ in os.walk(folder):  # os.walk skips what others remove meanwhile
        for room in (Path(place, name) for name in folders if name.startswith(".writing-")):
            with contextlib.suppress(OSError):
                touched = max(path.stat().st_mtime for path in (room, *room.iterdir()))
                if time.time() - touched > seconds:
                    shutil.rmtree(room, ignore_errors=True)


def _usual_mode(room: Path) -> int:
    """Return the permissions that a new file gets here: some writers (safetensors) give theirs to the owner only."""
    probe = room / ".mode"
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


def _system_error(error: Exception) -> int | None:
    """Return the errno of an OSError, also of one that a library written in Rust reports as text; None for other
    errors."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems refuse fsync of a folder; the rename is still atomic
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path, advice: str = "save it as UTF-8") -> str:
    """Read a text file in UTF-8, or in UTF-16 where it begins with its mark; a byte-order mark is taken off.

    ValueError naming the file and the byte that is not UTF-8. Notepad, Excel and PowerShell write such marks.
    """
    path = Path(path)
    return decode_text(path.read_bytes(), repr(path.name)[1:-1], advice)


def decode_text(content: bytes, name: str, advice: str = "save it as UTF-8") -> str:
    """Return the text of `content`, as `read_text`; `name` is what messages call it."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} is not UTF-8; {advice}") from None
