"""What a run reports while it works, how its caller asks it to stop, and how it ends.

    def watch(event, fields):
        if event == "step" and fields["step"] == 100:
            progress.stop()

    progress = Progress(watch)
    train("dog.yaml", progress=progress)   # raises Stopped after step 100, with a checkpoint

| event | fields |
|---|---|
| `phase` | `name`: prepare, train (`start`, `steps`), evaluate, finished, stopped, failed (`error`), sample |
| `step` | `step`: optimiser steps done |
| `loss` | `step`, `loss` (None: not finite), `lr`, `grad_norm`, `images_per_s`, `time` (s); or `validation_loss` |
| `image` | `file`, `prompt`, `seed`; of a run also `step` |
| `saved` | `file`: an adapter; of a run also `step` |
| `message` | `text`: a line for a reader |
| `warning` | `text`: something failed or looks wrong, and the work continues |

Standard library only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Fields = dict[str, Any]
"""What an event says: numbers, strings and None, as JSON takes them."""


class Diverged(RuntimeError):
    """Several steps in a row were not finite."""


class Stopped(Exception):
    """A run was asked to stop: it ended after `step` of `steps`, saved as `checkpoint` (an adapter file).

    `train(..., resume=True)` continues it.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path):
        super().__init__(f"stopped after step {step} of {steps}; saved as {checkpoint}")
        self.step, self.steps, self.checkpoint = step, steps, checkpoint


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    file: Path
    """The final adapter."""
    steps: int
    """Optimiser steps, those before a resume included."""
    seconds: float
    """Time spent in the loop, that before a resume included."""
    losses: tuple[float | None, ...]
    """The last ten logged losses, the newest last; None where no loss was finite."""


class Progress:
    """Receives the events of one run; silent unless `on_event(event, fields)` is given or `report` is overridden.

    Events arrive in the thread that runs `train`, on the main process; the other processes of a run report only their
    phases. Whatever `on_event` raises ends the run. `stop` may be called from any thread, and from a signal handler.
    """

    def __init__(self, on_event: Callable[[str, Fields], object] | None = None):
        self._on_event = on_event
        self._stopping = False

    def report(self, event: str, **fields: object) -> None:
        """Take one event; the table above lists them."""
        if self._on_event is not None:
            self._on_event(event, fields)

    def message(self, text: str) -> None:
        """Report a line for a reader."""
        self.report("message", text=text)

    def warning(self, text: str) -> None:
        """Report that something failed or looks wrong while the work continues."""
        self.report("warning", text=text)

    def stop(self) -> None:
        """Ask the run to end after the step that it is in, with a checkpoint. It cannot be taken back."""
        self._stopping = True

    def should_stop(self) -> bool:
        """Return whether the run was asked to stop."""
        return self._stopping


class EventLog(Progress):
    """Passes events on to the caller's progress and appends them to a run's `events.jsonl`.

    A line is `{"time": seconds since 1970, "event": …, its fields}`. Lines wait in memory until `open` says where the
    file is, because a run that is refused leaves no file. `step` events are written at most once a second.
    """

    STEP_SECONDS = 1.0

    def __init__(self, progress: Progress, main: bool = True):
        super().__init__()
        self.progress, self.main = progress, main
        self._path: Path | None = None
        self._waiting: list[str] = []
        self._last_step = 0.0
        self._lost = False

    def open(self, path: Path) -> None:
        """Write what has been reported so far to `path`, and from now on each event."""
        self._path = path
        self._write("".join(self._waiting))
        self._waiting.clear()

    def report(self, event: str, **fields: object) -> None:
        if self.main:
            self._keep(event, fields)
        if self.main or event == "phase":
            self.progress.report(event, **fields)

    def should_stop(self) -> bool:
        return self.progress.should_stop()

    def _keep(self, event: str, fields: Fields) -> None:
        now = time.time()
        if event == "step":
            if now - self._last_step < self.STEP_SECONDS:
                return
            self._last_step = now
        line = json.dumps({"time": round(now, 3), "event": event, **fields}, ensure_ascii=False, default=str) + "\n"
        if self._path is None:
            self._waiting.append(line)
        else:
            self._write(line)

    def _write(self, text: str) -> None:
        """Append a line; a full disk loses lines, not the run."""
        assert self._path is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if not self._lost:
                self._lost = True
                self.progress.warning(f"events.jsonl cannot be written, lines are lost ({error.strerror or error})")
