"""Where the results of a call lie: a folder of this machine, or a URL of fsspec that a local folder is copied to.

Work is done in the local folder, so a run is the same in both cases. A job's folder is copied to the URL at each
checkpoint and at its end, job.json last: what says that a job is done comes after its adapter. A call on another
machine continues from there. One process at a time writes to a URL; it holds a lease there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from diffusekrona_train.common import run_folder
from diffusekrona_train.fleet.folder import Record, adapter_of, is_done, read_record
from diffusekrona_train.fleet.photos import filesystem, is_url

LEASE = "lease.json"
LEASE_SECONDS = 600.0
"""How long a lease holds after it was last renewed."""
RENEW_SECONDS = 60.0
NOT_COPIED = (".lock", "photos")


class Outlet:
    """A folder of this machine."""

    def __init__(self, root: Path):
        self.root = root

    def folder(self, name: str) -> Path:
        """Return the local folder of a job."""
        return self.root / name

    def bring(self, name: str) -> None:
        """Make the local folder hold what the job has reached."""

    def push(self, name: str) -> None:
        """Make what the job has reached safe."""

    def push_lists(self) -> None:
        """The same for what is of no job: failed.jsonl, events.jsonl, fleet.html."""

    def keep(self) -> None:
        """Show that this process is at work; ValueError where another has taken over."""

    def close(self) -> None:
        """Let others write here."""

    def done(self, name: str, record: Record | None, mark: str) -> bool:
        """Return whether the job with this hash has its adapter."""
        return is_done(self.folder(name), record, mark)

    def adapter(self, name: str) -> Path | str:
        """Return where the adapter of a job is in the end."""
        return adapter_of(self.folder(name))

    def cancelled(self, name: str) -> bool:
        """Return whether somebody has cancelled a job."""
        return (self.folder(name) / "cancel").exists()


def open_outlet(output: str) -> Outlet:
    """Return the outlet of a folder or URL, which it now holds; ValueError where another process holds the URL."""
    if not is_url(output) or output.startswith("file://"):
        return Outlet(Path(output.removeprefix("file://")).expanduser())
    return RemoteOutlet(output)


class RemoteOutlet(Outlet):
    """A URL, with a local folder in `runs` that is named after it."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        mark = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        super().__init__(Path("runs") / f"{PurePosixPath(self.url).name or 'fleet'}-{mark}")
        self.system, self.path = filesystem(self.url)
        self._pushed: dict[str, tuple[int, int]] = {}
        self._renewed = 0.0
        self._token = ""
        self._take()

    # ---- the lease ----

    def _take(self) -> None:
        """Take the lease: made where there is none, taken over where it has run out; of several only one can."""
        there = self._read(LEASE)
        if there is None:
            if self._create(LEASE, self._lease()):
                return
            there = self._read(LEASE) or {}
        left = there.get("until", 0) - time.time()
        # whoever makes the heir of a lease first may replace it
        if left > 0 or not self._create(f".leases/{there.get('token')}", {"by": socket.gethostname()}):
            raise ValueError(
                f"--output {self.url}: process {there.get('process')} on {there.get('host')} writes there; wait for "
                f"it, or if it is gone, {max(left, 0):.0f} s until its lease ends"
            )
        self._write(LEASE, self._lease())

    def _lease(self) -> dict[str, Any]:
        self._token, self._renewed = self._token or uuid.uuid4().hex, time.monotonic()
        until = time.time() + LEASE_SECONDS
        return {"token": self._token, "host": socket.gethostname(), "process": os.getpid(), "until": until}

    def keep(self) -> None:
        if time.monotonic() - self._renewed < RENEW_SECONDS:
            return
        if (self._read(LEASE) or {}).get("token") != self._token:
            raise ValueError(f"--output {self.url}: another process has taken over, as this one was away for too long")
        self._write(LEASE, self._lease())

    def close(self) -> None:
        self.push_lists()
        if (self._read(LEASE) or {}).get("token") == self._token:
            self.system.rm_file(self._at(LEASE))

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _create(self, name: str, value: dict[str, Any]) -> bool:
        """Write an object that is not there yet; False where it is."""
        try:
            self.system.pipe_file(self._at(name), json.dumps(value).encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def _write(self, name: str, value: dict[str, Any]) -> None:
        self.system.pipe_file(self._at(name), json.dumps(value).encode())

    def _read(self, name: str) -> dict[str, Any] | None:
        self.system.invalidate_cache()
        try:
            return json.loads(self.system.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    # ---- jobs ----

    def bring(self, name: str) -> None:
        there = self._read(f"{name}/job.json")
        if there is None:
            return
        folder = self.folder(name)
        found = self.system.find(self._at(name))
        relative = {path: path[len(self._at(name)) + 1 :] for path in found}
        own = read_record(folder)
        if own is not None and own.hash == there.get("hash"):
            is_done = there.get("state") == own.state == "done"
            if is_done or _reached(folder) >= _farthest(relative.values()):
                return
        shutil.rmtree(folder, ignore_errors=True)
        wanted = there.get("state") != "done"
        for path, short in relative.items():
            if wanted or short == "job.json":  # of a job that is done, what it says of itself is enough
                target = folder / short
                target.parent.mkdir(parents=True, exist_ok=True)
                self.system.get_file(path, str(target))

    def push(self, name: str) -> None:
        folder = self.folder(name)
        here = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).parts[0] not in NOT_COPIED and ".writing-" not in str(path)
        }
        for short in sorted(here, key=lambda short: short == "job.json"):
            self._put(here[short], f"{name}/{short}")
        self.system.invalidate_cache()
        for path in self.system.find(self._at(name)) if self.system.exists(self._at(name)) else []:
            if path[len(self._at(name)) + 1 :] not in here:
                self.system.rm_file(path)
        self.keep()

    def push_lists(self) -> None:
        for path in self.root.glob("*.*") if self.root.is_dir() else ():
            if path.is_file() and not path.name.startswith("."):
                self._put(path, path.name)

    def _put(self, path: Path, name: str) -> None:
        about = path.stat()
        mark = (about.st_size, about.st_mtime_ns)
        if self._pushed.get(name) != mark:
            self.system.pipe_file(self._at(name), path.read_bytes())
            self._pushed[name] = mark

    def done(self, name: str, record: Record | None, mark: str) -> bool:
        same = record is not None and record.state == "done" and record.hash == mark
        return same and self.system.exists(self._at(f"{name}/{name}.safetensors"))

    def adapter(self, name: str) -> Path | str:
        return f"{self.url}/{name}/{name}.safetensors"

    def cancelled(self, name: str) -> bool:
        return super().cancelled(name) or self.system.exists(self._at(f"{name}/cancel"))


def _reached(folder: Path) -> int:
    return _farthest(path.relative_to(folder).as_posix() for path in folder.glob("resume/*/state.safetensors"))


def _farthest(names: Iterable[str]) -> int:
    """Return the newest step of the resume states among the files of a job, -1 without one."""
    states = [PurePosixPath(name) for name in names if name.endswith("/state.safetensors")]
    return max((run_folder.step_of(Path(state.parent.name)) for state in states), default=-1)
