"""Training as processes of their own, and the queue: files in a folder, whose names are their order.

A process outlives the server: it has its own session and writes into its run folder. It is stopped by the file `stop`,
never by its number. `tick` is called once a second and after a restart; all it knows is in the folders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from diffusekrona_train.app import runs
from diffusekrona_train.app.runs import ASKED, HOME, LOG, MEASURE_LOG, MEASURE_PID, PID, STOP_LATER, USED
from diffusekrona_train.common.files import atomic
from diffusekrona_train.common.run_folder import STOP_FILE
from diffusekrona_train.config import EMBEDDED

CHILDREN: list[subprocess.Popen[bytes]] = []
"""Processes started here; asked now and then, so that none stays behind as a zombie."""


# ---- the queue -----------------------------------------------------------------------------------------------------


def enqueue(root: Path, name: str, overrides: Sequence[str] = ()) -> None:
    """Put a run at the end of the queue; a run that waits already keeps its place."""
    if name in waiting(root):
        return
    with atomic(root / HOME / "queue" / f"{time.time_ns():020d}.json") as temporary:
        temporary.write_text(json.dumps({"run": name, "set": list(overrides)}))


def entries(root: Path) -> list[tuple[Path, dict]]:
    """Return (file, what it says) of the queue in order; a file that says nothing is passed over."""
    files = sorted((root / HOME / "queue").glob("*.json"))
    read = [(file, next(runs.json_lines(file, whole=True), {})) for file in files]
    return [(file, found) for file, found in read if isinstance(found.get("run"), str)]


def waiting(root: Path) -> list[str]:
    """Return the names of the runs in the queue, in order."""
    return [found["run"] for _, found in entries(root)]


def leave_queue(root: Path, name: str) -> None:
    """Take a run out of the queue."""
    for file, found in entries(root):
        if found["run"] == name:
            file.unlink(missing_ok=True)


def tick(root: Path) -> None:
    """Start the first of the queue where nothing runs, and pass on stops that came before the first step."""
    CHILDREN[:] = [child for child in CHILDREN if child.poll() is None]
    busy = False
    for folder in runs.all_runs(root):
        if runs.process_of(folder) is None:
            (folder / STOP_LATER).unlink(missing_ok=True)
            continue
        busy = True
        if (folder / STOP_LATER).exists() and _can_stop(folder):
            (folder / STOP_FILE).touch()
            (folder / STOP_LATER).unlink(missing_ok=True)
    if busy:
        return
    for file, found in entries(root)[:1]:
        overrides = [text for text in found.get("set", []) if isinstance(text, str)]
        try:
            with suppress(LookupError):  # deleted meanwhile
                start(runs.find_run(root, found["run"]), overrides)
        finally:  # what cannot be started must not block the others
            file.unlink(missing_ok=True)


# ---- processes -----------------------------------------------------------------------------------------------------


def start(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Train the run of a folder in a process of its own: from its newest state, or from the beginning."""
    begun = (folder / USED).is_file()
    config = folder / (USED if begun else ASKED)
    # the folder may have been moved since its config was written
    sets = [word for text in (f"output={json.dumps(str(folder))}", *overrides) for word in ("--set", text)]
    arguments = ["diffusekrona_train.cli.train", "--config", str(config), *sets, *(["--resume"] if begun else [])]
    env = dict(os.environ)
    if runs.config_of(folder).model in EMBEDDED:
        env.setdefault("OMP_NUM_THREADS", "1")  # so small a model is faster on one thread
    child = spawn(arguments, folder / LOG, env)
    (folder / STOP_LATER).unlink(missing_ok=True)
    (folder / PID).write_text(str(child.pid))


def spawn(arguments: Sequence[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start `python -m …` so that it outlives this process; what it prints is appended to `log`."""
    detached = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x208}  # no console, own group
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            **detached,  # type: ignore[arg-type]
        )
    CHILDREN.append(child)
    return child


def _can_stop(folder: Path) -> bool:
    """Whether the loop reads the request by now: it removes one that was there before its first step."""
    process = runs.process_of(folder)
    phases = [event for event in runs.events_of(folder) if event.get("event") == "phase"]
    return bool(phases and process and phases[-1].get("name") == "train" and phases[-1]["time"] > process.create_time())


def stop(folder: Path) -> None:
    """Ask a run to end after its step, with a checkpoint; before its first step, as soon as it reads requests."""
    (folder / (STOP_FILE if _can_stop(folder) else STOP_LATER)).touch()


def measure(folder: Path) -> None:
    """Measure the checkpoints of a run in a process of its own, as `krona-eval best` does."""
    if runs.measuring(folder) != "running":
        (folder / MEASURE_LOG).unlink(missing_ok=True)
        child = spawn(["diffusekrona_train.cli.evaluate", "best", str(folder)], folder / MEASURE_LOG, dict(os.environ))
        (folder / MEASURE_PID).write_text(str(child.pid))


def delete(root: Path, folder: Path) -> None:
    """Remove a run folder; ValueError while it trains."""
    if runs.process_of(folder) is not None:
        raise ValueError(f"{folder.name} is training; stop it first")
    leave_queue(root, folder.name)
    shutil.rmtree(folder)
