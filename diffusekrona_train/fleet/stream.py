"""Jobs from a stream that may never end: read in a thread, so that running jobs do not wait for the next line."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

from diffusekrona_train.fleet.jobs import JobError, Tree, row_of

POLL_SECONDS = 0.2
"""How often somebody who waits for a line can be stopped."""


class Stream:
    """A source of jobs (`service.Source`) over lines that come when they come."""

    def __init__(self, lines: Iterable[str]):
        self._lines: queue.Queue[tuple[int, str] | None] = queue.Queue(maxsize=1000)
        self._ended = False
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterable[str]) -> None:
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                self._lines.put((number, line))
        self._lines.put(None)

    def take(self, wait: bool) -> tuple[int, Tree | JobError] | None:
        """Return the next job; None where no line has come yet."""
        if self._ended:
            raise StopIteration
        try:
            found = self._lines.get(timeout=POLL_SECONDS if wait else 0.0) if wait else self._lines.get_nowait()
        except queue.Empty:
            return None
        if found is None:
            self._ended = True
            raise StopIteration
        number, line = found
        return number, row_of(line, number)
