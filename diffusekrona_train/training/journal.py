"""What a run reports and writes down: its events, metrics.jsonl, accelerate's trackers; and whether it is to stop."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusekrona_train.common.progress import Progress


class Journal:
    """Events, metrics.jsonl and trackers; only the main process writes."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        progress: Progress,
        start: int,
        steps: int,
        config: dict,
        seconds_before: float = 0.0,
    ):
        self.path = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.progress = progress
        self.main = accelerator.is_main_process
        self.began = time.monotonic() - seconds_before
        self.losses: list[float | None] = []
        self._reported: set[tuple[str, str, str]] = set()
        self.step = start
        self._lap()
        if accelerator.log_with:
            accelerator.init_trackers("diffusekrona", config=_scalars(config))
        progress.report("phase", name="train", start=start, steps=steps)

    @property
    def seconds(self) -> float:
        """Return the seconds spent training so far, those before a resume included."""
        return time.monotonic() - self.began

    def _lap(self) -> None:
        self.last_step, self.last_time = self.step, time.monotonic()

    def advance(self) -> None:
        """Report one more step."""
        self.step += 1
        self.progress.report("step", step=self.step)

    def log(self, step: int, images_a_step: int, values: dict[str, float | None]) -> None:
        """Report and write one line of training metrics; images per second are over the steps since the last line."""
        now = time.monotonic()
        rate = (step - self.last_step) * images_a_step / max(now - self.last_time, 1e-9)
        self._lap()
        self.losses.append(values["loss"])
        self.write({"step": step, **values, "images_per_s": round(rate, 3), "time": round(self.seconds, 3)})

    def skip_time(self, began: float) -> None:
        """Leave what happened since `began` (a validation, a checkpoint) out of the images per second."""
        self.last_time += time.monotonic() - began

    def write(self, line: dict) -> None:
        """Report a line of metrics, append it to metrics.jsonl and pass it to the trackers.

        A disk that is full loses the line and not the run.
        """
        if not self.main:
            return
        self.progress.report("loss", **line)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self.warn("metrics.jsonl cannot be written, lines are lost", error)
        if self.accelerator.log_with:
            numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
            try:
                self.accelerator.log(numbers, step=line["step"])
            except Exception as error:
                self.warn("a tracker failed", error)

    def say(self, text: str) -> None:
        """Report a line for a reader."""
        self.progress.message(text)

    def warn(self, what: str, error: Exception) -> None:
        """Report, once for each kind of error, that something failed which no run depends on."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        if (kind := (what, type(error).__name__, reason)) not in self._reported:
            self._reported.add(kind)
            text = f"after step {self.step}: {what} ({type(error).__name__}: {reason}); the run continues"
            self.progress.warning(text)


def _scalars(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config to the numbers and strings that trackers take."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


class Stop:
    """Whether the run is to end after this step: its caller asked for it, or somebody made the file `stop`."""

    def __init__(self, progress: Progress, file: Path | None = None) -> None:
        self.progress, self.file = progress, file
        self._wish: tuple[torch.Tensor, Any] | None = None
        self.obey()

    def wanted(self) -> bool:
        """Return whether this process was asked; only the main one looks for `file`."""
        return self.progress.should_stop() or (self.file is not None and self.file.exists())

    def obey(self) -> None:
        """Remove the file, so that it does not stop the next run too."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def agreed(self, wish: torch.Tensor, processes: int) -> bool:
        """Return whether all processes stop after this step: they read the same averaged wish.

        On a GPU the answer is read a step late, when it has long arrived, so that nobody waits for the device.
        """
        if processes == 1:
            return self.wanted()
        if not wish.is_cuda:
            return wish.item() > 0
        here = torch.empty((), dtype=wish.dtype, pin_memory=True)
        here.copy_(wish, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        before, self._wish = self._wish, (here, arrived)
        if before is None:
            return False
        before[1].synchronize()
        return before[0].item() > 0
