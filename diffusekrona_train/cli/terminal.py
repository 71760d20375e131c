"""A run in a terminal: its events as a bar and lines, and the signals that ask it to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from diffusekrona_train.common.progress import Fields, Progress

if TYPE_CHECKING:
    from tqdm import tqdm


def first_process() -> bool:
    """Return whether this process speaks for all that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


class Terminal(Progress):
    """Shows the events of a run: a tqdm bar over its steps, lines above it, warnings on stderr."""

    def __init__(self, *, images: bool = False) -> None:
        super().__init__()
        self.signum: int | None = None
        """The first signal that came while the run could still save."""
        self.interruptible = False
        self._show_images = images
        self._bar: tqdm | None = None

    def report(self, event: str, **fields: object) -> None:
        shown = {"phase": self._phase, "step": self._step, "loss": self._loss, "image": self._image}
        if event in ("message", "warning"):
            self._line(str(fields["text"]), warning=event == "warning")
        elif event in shown:
            shown[event](fields)

    def _phase(self, fields: Fields) -> None:
        self.interruptible = self.interruptible or fields["name"] == "train"
        if fields["name"] == "train" and first_process():
            from tqdm import tqdm

            steps, start = fields["steps"], fields["start"]
            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, leave=True)
        elif self._bar is not None:
            self._bar.close()
            self._bar = None

    def _step(self, fields: Fields) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def _loss(self, fields: Fields) -> None:
        if self._bar is not None and "lr" in fields:
            loss = f"{fields['loss']:.4f}" if fields["loss"] is not None else "not finite"
            self._bar.set_postfix_str(f"loss {loss}, lr {fields['lr']:.1e}, {fields['images_per_s']:.2f} img/s")

    def _image(self, fields: Fields) -> None:
        if self._show_images:
            print(Path(fields["file"]).name)

    def _line(self, text: str, warning: bool) -> None:
        if self._bar is not None:
            self._bar.write(text)
        elif warning:
            print(f"warning: {text}", file=sys.stderr)
        else:
            print(text)

    # ---- signals ----

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Make SIGINT and SIGTERM ask the run to stop; a second one, or one before the first step, ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.interruptible and self.signum is None:
            self.signum = number
            self.stop()
            print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr)
            return
        if not self.interruptible:
            print("\nstopped before the first step; the same command starts again", file=sys.stderr)
        self.leave(number)

    def leave(self, number: int | None = None) -> NoReturn:
        """End the command as the signal would have; a stop that no signal asked for here counts as SIGTERM."""
        raise SystemExit(128 + (number or self.signum or signal.SIGTERM))
