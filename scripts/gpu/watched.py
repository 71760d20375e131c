"""One training run, watched: where its seconds go and how much memory each phase needs at most.

    python -m scripts.gpu.watched --config dog.yaml [--set train.steps=6] --json FILE [--cap 8]

`--cap` is a card of so many GiB: the allocator gives no more, and what is free is told accordingly. `--blind` leaves
the latter as it is, so that a run has to notice by itself that it does not fit.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

GIB = 2**30


class Watch:
    """The phase a run is in. A phase that is left gets the time since it was entered, and the peak of that time."""

    def __init__(self, began: float):
        self.phase, self.since = "import", began
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, tuple[float, float]] = {}
        self.calls: dict[str, int] = {}

    def enter(self, phase: str) -> str:
        """Goes over to `phase`; returns the one before."""
        before = self.phase
        if phase == before:
            return before
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self.since
        if on_gpu:
            peak = (torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB)
            old = self.memory.get(before, (0.0, 0.0))
            self.memory[before] = (max(peak[0], old[0]), max(peak[1], old[1]))
            torch.cuda.reset_peak_memory_stats()
        self.phase, self.since = phase, now
        self.calls[phase] = self.calls.get(phase, 0) + 1
        return before

    def around(self, owner: Any, name: str, phase: str) -> None:
        """Calls of `owner.name` are `phase`; after one, the phase is again what it was."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self.enter(before)

        setattr(owner, name, watched)

    def steps(self, inner: Callable) -> Callable:
        """The step of the loop: the first one alone, since it compiles and finds out what fits."""

        @functools.wraps(inner)
        def step(run: Any, number: int) -> Any:
            self.enter("first step" if number == run.start else "steps")
            return inner(run, number)

        return step

    def summary(self) -> dict[str, Any]:
        self.enter("after")
        return {"seconds": self.seconds, "memory": self.memory, "calls": self.calls}


def cap_memory(gib: float, blind: bool) -> None:
    """Makes the card one of `gib` GiB."""
    total = torch.cuda.get_device_properties(0).total_memory
    limit = int(gib * GIB)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    if not blind:
        torch.cuda.mem_get_info = lambda device=None: (max(0, limit - torch.cuda.memory_reserved()), limit)


def watch(began: float) -> Watch:
    """A Watch over the functions of a training that take time."""
    from diffusekrona_train.models.sd import SD
    from diffusekrona_train.models.source import ModelSource
    from diffusekrona_train.training import loop, run, setup

    made = Watch(began)
    made.around(setup, "assemble", "set-up")
    made.around(setup, "build_training_set", "cache")
    made.around(ModelSource, "load_denoiser", "load")
    made.around(setup, "inject_factors", "adapters")
    made.around(loop, "validate", "validation")
    made.around(SD, "decode", "decode")
    made.around(loop, "save", "save")
    made.around(run, "finish", "end")
    for room in (loop, run):
        made.around(room, "refresh_report", "report")
    loop.training_step = made.steps(loop.training_step)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cap", type=float, help="GiB of the card that is played")
    parser.add_argument("--blind", action="store_true")
    given = parser.parse_args()

    from diffusekrona_train.config import load_config
    from diffusekrona_train.training import loop, train

    config = load_config(given.config, given.set)
    if given.cap:
        cap_memory(given.cap, given.blind)
    made = watch(BEGAN)
    level: list[str] = []
    save = loop.save

    def noting(state: Any, done: int) -> None:
        level[:] = [state.level.name]
        save(state, done)

    loop.save = noting
    made.enter("other")
    train(config, overwrite=True)
    found = {**made.summary(), "level": level[0], "steps": config.train.steps}
    if torch.cuda.is_available():
        found["total"] = torch.cuda.get_device_properties(0).total_memory / GIB
    given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
