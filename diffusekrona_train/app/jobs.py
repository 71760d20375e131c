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

from diffusekrona_train.common.files import atomic
from diffusekrona_train.common.run_folder import STOP_FILE
from diffusekrona_train.config import EMBEDDED
from diffusekrona_train.training import status
from diffusekrona_train.training.status import ASKED, LOG, PID, USED

HOME = ".studio"
"""Folder beside the runs: the queue, the subject that is being prepared, settings, the secret."""
STOP_LATER, MEASURE_PID, MEASURE_LOG = ".studio-stop", "measure.pid", "measure.log"
CHILDREN: list[subprocess.Popen[bytes]] = []
"""Processes started here; asked now and then, so that none stays behind as a zombie."""


def enqueue(root: Path, name: str, overrides: Sequence[str] = ()) -> None:
    """Put a run at the end of the queue; a run that waits already keeps its place."""
    if name not in waiting(root):
        with atomic(root / HOME / "queue" / f"{time.time_ns():020d}.json") as temporary:
            temporary.write_text(json.dumps({"run": name, "set": list(overrides)}))


def entries(root: Path) -> list[tuple[Path, dict]]:
    """Return (file, what it says) of the queue in order; a file that says nothing is passed over."""
    files = sorted((root / HOME / "queue").glob("*.json"))
    read = [(file, next(status.json_lines(file, whole=True), {})) for file in files]
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
    at_work = [folder for folder in status.all_runs(root) if status.process_of(folder)]
    for folder in at_work:
        if (folder / STOP_LATER).exists() and _can_stop(folder):
            stop(folder)
            (folder / STOP_LATER).unlink(missing_ok=True)
    for file, found in [] if at_work else entries(root)[:1]:
        try:
            with suppress(LookupError):  # deleted meanwhile
                start(status.find_run(root, found["run"]), [str(text) for text in found.get("set", ())])
        finally:  # what cannot be started must not block the others
            file.unlink(missing_ok=True)


def start(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Train the run of a folder in a process of its own: from its newest state, or from the beginning."""
    begun = (folder / USED).is_file()
    # the folder may have been moved since its config was written
    sets = [word for text in (f"output={json.dumps(str(folder))}", *overrides) for word in ("--set", text)]
    config = ["--config", str(folder / (USED if begun else ASKED)), *sets, *(["--resume"] if begun else [])]
    env = dict(os.environ)
    if status.config_of(folder).model in EMBEDDED:
        env.setdefault("OMP_NUM_THREADS", "1")  # so small a model is faster on one thread
    (folder / STOP_LATER).unlink(missing_ok=True)
    spawn(["diffusekrona_train.cli.train", *config], folder / LOG, folder / PID, env)


def measure(folder: Path) -> None:
    """Measure the checkpoints of a run in a process of its own, as `krona-eval best` does."""
    if status.live_process(folder / MEASURE_PID) is None:
        (folder / MEASURE_LOG).unlink(missing_ok=True)
        arguments = ["diffusekrona_train.cli.evaluate", "best", str(folder)]
        spawn(arguments, folder / MEASURE_LOG, folder / MEASURE_PID, dict(os.environ))


def spawn(arguments: Sequence[str], log: Path, pid: Path, env: dict[str, str]) -> None:
    """Start `python -m …` so that it outlives this process; what it prints is appended to `log`."""
    apart = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x208}  # no console, own group
    command = [sys.executable, "-m", *arguments]
    with log.open("ab") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, **apart)  # type: ignore[arg-type]
    CHILDREN.append(child)
    pid.write_text(str(child.pid))


def _can_stop(folder: Path) -> bool:
    """Whether the loop reads the request by now: it removes one that was there before its first step."""
    return status.status_of(folder).state == "running"


def stop(folder: Path) -> None:
    """Ask a run to end after its step, with a checkpoint; before its first step, as soon as it reads requests."""
    (folder / (STOP_FILE if _can_stop(folder) else STOP_LATER)).touch()


def delete(root: Path, folder: Path) -> None:
    """Remove a run folder; ValueError while it trains."""
    if status.process_of(folder) is not None:
        raise ValueError(f"{folder.name} is training; stop it first")
    leave_queue(root, folder.name)
    shutil.rmtree(folder)
