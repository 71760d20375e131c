"""The run folder: who may write in it, what it holds, and what a resumed or replaced run clears first."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from diffusekrona_train.common.files import atomic

OWN = (
    "config.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "samples",
    "checkpoints",
    "resume",
    "report.html",
    "loss.png",
    "trackers",
)
"""What a run writes besides `<name>.safetensors` and `<name>.png`; --overwrite removes these and nothing else."""
STOP_FILE = "stop"
"""A file of this name in a run folder ends its run at the next step, with a checkpoint."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system answers that has no locks."""


class Busy(ValueError):
    """Another run holds the folder."""


def own_entries(folder: Path) -> list[Path]:
    """Return files and folders of a run that are there."""
    names = (*OWN, f"{folder.name}.safetensors", f"{folder.name}.png")
    return [folder / name for name in names if (folder / name).exists()]


def refuse_existing(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ValueError if the folder holds a run that this call would mix with, or is not a folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; give a folder")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite ask for opposite things; give one")
    if own_entries(folder) and not (resume or overwrite):
        raise ValueError(
            f"output: {folder} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or choose another output"
        )


@contextmanager
def claimed(folder: Path, main: bool = True) -> Iterator[None]:
    """Lock the folder for this run (its main process); Busy if another run writes in it. A kill releases the lock.

    Folders that it makes and that are still empty at the end, of a run that was refused, are removed again.
    """
    if not main:
        yield
        return
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(errors="replace").strip() if path.is_file() else ""
        raise Busy(f"output: {folder} is being written by another run (process {holder or '?'})") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:  # there, two runs in one folder are the user's care
            raise
    with suppress(OSError):  # the lock holds on a full disk too; only the number is missing in another's message
        path.write_text(str(os.getpid()))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def remove_own(folder: Path) -> None:
    """Remove what a run has left in the folder."""
    for entry in own_entries(folder):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def forget_states(folder: Path) -> None:
    """Remove the states that a finished run will not resume from: four times the size of its adapter each."""
    shutil.rmtree(folder / "resume", ignore_errors=True)


def prepare(folder: Path, start: int, config_yaml: str) -> None:
    """Remove what the folder holds of steps after `start` (0: everything), and write config.yaml."""
    if start == 0:
        remove_own(folder)
    for leftover in folder.rglob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in (folder / "samples").glob("step-*"):
        if step_of(path) > start:
            shutil.rmtree(path, ignore_errors=True)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] <= start]
    if lines:
        with atomic(folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with atomic(folder / "config.yaml") as temporary:
        temporary.write_text(config_yaml)


def step_name(step: int) -> str:
    """Return the name of a step's folder: step-000100."""
    return f"step-{step:06d}"


def adapter_file(folder: Path, step: int) -> Path:
    """Return the adapter file of a run's checkpoint at `step`."""
    return folder / "checkpoints" / step_name(step) / "adapter.safetensors"


def step_of(path: Path) -> int:
    """Return 100 for a path that ends in step-000100; -1 for another name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else -1


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics.jsonl; a last line cut by a kill is passed over."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
