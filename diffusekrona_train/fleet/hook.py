"""A POST to a URL when a job ends: in a thread, so that a server that is slow or away keeps no job waiting."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

TRIES = 3
SECONDS = 10.0
"""How long one try may take, and how long `close` waits for those under way."""


class Webhook:
    """Sends what is reported of jobs that ended as JSON; `warn` hears of what could not be sent."""

    def __init__(self, url: str, warn: Callable[[str], object], pause: float = 1.0):
        self.url, self.warn, self.pause = url, warn, pause
        self._under_way: list[threading.Thread] = []

    def send(self, fields: dict[str, Any]) -> None:
        """Send one object, soon."""
        body = json.dumps(fields, ensure_ascii=False, default=str).encode()
        thread = threading.Thread(target=self._post, args=(body, fields.get("job")), daemon=True)
        self._under_way = [other for other in self._under_way if other.is_alive()] + [thread]
        thread.start()

    def close(self) -> None:
        """Wait for what is under way."""
        until = time.monotonic() + SECONDS
        for thread in self._under_way:
            thread.join(max(0.0, until - time.monotonic()))

    def _post(self, body: bytes, job: object) -> None:
        reason = ""
        for attempt in range(TRIES):
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=SECONDS):
                    return
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
            if attempt + 1 < TRIES:
                time.sleep(self.pause)
        self.warn(f"--webhook {self.url}: was not told of job {job} ({reason})")
