"""The output folder of many jobs: one folder a job, who holds it, what is done, and the list of what failed.

runs/fleet/dog-17/job.json              hash, state, seconds: by this a job is skipped, resumed or refused
runs/fleet/dog-17/dog-17.safetensors    and config.yaml, metrics.jsonl, events.jsonl as in every run folder
runs/fleet/failed.jsonl                 a line a job that could not be trained, with the reason
runs/fleet/.locks/dog-17.lock           held by the process that works on the job
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from diffusekrona_train.common import run_folder
from diffusekrona_train.common.files import atomic

FORMAT = 1
CANCEL_FILE = "cancel"
"""A file of this name in a job's folder ends the job, and keeps it from being trained until the file is removed."""

State = Literal["open", "done"]


@dataclass(frozen=True)
class Record:
    """What job.json says."""

    id: str
    hash: str
    state: State
    steps: int = 0
    seconds: float = 0.0
    """Time in which the job had a slot, up to its end."""
    device_seconds: float = 0.0
    """Its share of that time: a step of 8 jobs counts an eighth for each."""
    loss: float | None = None
    finished: float | None = None
    """Seconds since 1970."""


def read_record(folder: Path) -> Record | None:
    """Return what the job.json of a folder says, None where there is none; ValueError where it cannot be read."""
    path = folder / "job.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found.pop("format") == FORMAT
        return Record(**found)
    except (ValueError, TypeError, KeyError, AssertionError, AttributeError):
        raise ValueError(f"{path} cannot be read; give the job another id, or --overwrite") from None


def write_record(folder: Path, record: Record) -> None:
    """Write job.json, whole or not at all."""
    with atomic(folder / "job.json") as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(record)}, indent=1) + "\n", encoding="utf-8")


def adapter_of(folder: Path) -> Path:
    return folder / f"{folder.name}.safetensors"


def is_done(folder: Path, record: Record | None, wanted: str) -> bool:
    """Return whether a folder holds the adapter of the job with this hash."""
    same = record is not None and record.state == "done" and record.hash == wanted
    return same and adapter_of(folder).is_file()


def other_job(folder: Path, record: Record | None, wanted: str) -> str | None:
    """Return why the job with this hash may not be trained in a folder; None where it may."""
    if record is not None and record.hash != wanted:
        return (
            f"id: {folder} holds a job with other photos, captions, model or settings; give this one another id, or "
            "--overwrite to replace that one"
        )
    if record is None and run_folder.own_entries(folder):
        return f"id: {folder} holds a run that is not of this list; give the job another id, or --overwrite"
    return None


@contextlib.contextmanager
def held(output: Path, name: str) -> Iterator[None]:
    """Hold a job for this process; run_folder.Busy where another one has it. A kill lets go.

    The lock is by lower-case id and its file stays: to remove it would let two processes hold two files of one name.
    """
    path = output / ".locks" / f"{name.lower()}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise run_folder.Busy(f"{name}: another process is at it") from None
    except OSError as error:
        if error.errno in run_folder.WITHOUT_LOCKS:
            raise ValueError(f"--output {output}: this file system has no locks, which jobs need") from None
        raise
    try:
        yield
    finally:
        lock.release()


def same_but_for_case(output: Path, name: str) -> str | None:
    """Return the folder in the output whose name differs from `name` in upper and lower case only."""
    entries = output.iterdir() if output.is_dir() else ()
    return next((entry.name for entry in entries if entry.name.lower() == name.lower() and entry.name != name), None)


class Failures:
    """failed.jsonl: a line a job that failed, the newest reason only; a job that is done later has no line any more."""

    def __init__(self, output: Path):
        self.path = output / "failed.jsonl"

    def add(self, name: str, reason: str) -> None:
        """Note a job that failed."""
        self._change(name, {"id": name, "reason": reason, "time": round(time.time(), 3)})

    def drop(self, name: str) -> None:
        """Forget a job that has not failed after all."""
        if any(line.get("id") == name for line in self.read()):
            self._change(name, None)

    def read(self) -> list[dict[str, Any]]:
        """Return the lines."""
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
        return found

    def _change(self, name: str, line: dict[str, Any] | None) -> None:
        lock = self.path.parent / ".locks" / "failed.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            kept = [other for other in self.read() if other.get("id") != name]
            lines = kept if line is None else [*kept, line]
            with atomic(self.path) as temporary:
                text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
                temporary.write_text(text, encoding="utf-8")
