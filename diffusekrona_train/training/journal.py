"""What a run tells: the bar, metrics.jsonl, accelerate's trackers, and the signals it listens to."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


class Journal:
    """Bar, metrics.jsonl and trackers; silent on all processes but the main one."""

    def __init__(
        self, folder: Path, accelerator: Accelerator, start: int, steps: int, config: dict, seconds_before: float = 0.0
    ):
        from tqdm import tqdm

        self.path = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.bar = tqdm(total=steps, initial=start, disable=not self.main, unit="step", dynamic_ncols=True, leave=True)
        self.began = time.monotonic() - seconds_before
        self._told: set[tuple[str, str, str]] = set()
        self._lap(start)
        if accelerator.log_with:
            accelerator.init_trackers("diffusekrona", config=_scalars(config))

    @property
    def seconds(self) -> float:
        """Time spent training so far, that before a resume included."""
        return time.monotonic() - self.began

    def _lap(self, step: int) -> None:
        self.last_step, self.last_time = step, time.monotonic()

    def advance(self) -> None:
        self.bar.update(1)

    def log(self, step: int, images_a_step: int, values: dict[str, float | None]) -> None:
        """One line of training metrics; img/s is over the steps since the last line."""
        now = time.monotonic()
        rate = (step - self.last_step) * images_a_step / max(now - self.last_time, 1e-9)
        self._lap(step)
        shown = f"{values['loss']:.4f}" if values["loss"] is not None else "not finite"
        self.bar.set_postfix_str(f"loss {shown}, lr {values['lr']:.1e}, {rate:.2f} img/s")
        self.write({"step": step, **values, "images_per_s": round(rate, 3), "time": round(self.seconds, 3)})

    def skip_time(self, began: float) -> None:
        """Leaves what happened since `began` (a validation, a checkpoint) out of img/s."""
        self.last_time += time.monotonic() - began

    def write(self, line: dict) -> None:
        """Appends to metrics.jsonl, and to the trackers; a disk that is full loses the line and not the run."""
        if not self.main:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
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
        """A line above the bar."""
        if self.main:
            self.bar.write(text)

    def warn(self, what: str, error: Exception) -> None:
        """Says, once for each kind of error, that something failed which no run depends on."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        if (told := (what, type(error).__name__, reason)) not in self._told:
            self._told.add(told)
            self.say(f"after step {self.bar.n}: {what} ({type(error).__name__}: {reason}); the run goes on")

    def close(self) -> None:
        self.bar.close()


def _scalars(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested config as the flat numbers and strings that trackers take."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _scalars(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


class Stop:
    """Whether somebody asked the run to stop. The first signal lets the step finish; a second one ends at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.in_loop = False
        self._wish: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.in_loop and self.signum is None:
            self.signum = number
            print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)
            return
        if not self.in_loop:
            print("\nstopped before the first step; the same command starts again", file=sys.stderr)
        raise SystemExit(128 + number)

    def agreed(self, wish: torch.Tensor, processes: int) -> bool:
        """Whether all processes stop after this step: they read the same averaged wish.

        On a GPU the answer is read a step late, when it has long arrived, so that nobody waits for the device.
        """
        if processes == 1:
            return self.signum is not None
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

    @property
    def status(self) -> int:
        """Exit status for the signal; another process's signal counts as SIGTERM."""
        return 128 + (self.signum or signal.SIGTERM)
