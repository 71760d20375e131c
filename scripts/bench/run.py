"""One training run, watched: where its seconds go and how much memory each phase needs at most (point 4).

    python -m scripts.bench.run --config dog.yaml [--set train.steps=6] [--json FILE] [--cap 8]

`--cap` is a card of so many GiB: the allocator gives 0.8 GiB less, which the driver and the desktop take, and what is
free is reported accordingly. `--blind` leaves the latter as it is, so that a run has to notice by itself that it does
not fit. On a machine without a GPU only the seconds are there.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import pkgutil  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from scripts.bench.rows import Values  # noqa: E402
from scripts.bench.setting import Setting, run_json  # noqa: E402

GIB = 2**30
TAKEN = 0.8
"""GiB of a card that the CUDA context and a desktop hold."""
ROOT = Path(__file__).resolve().parents[2]


class Watch:
    """The phase a run is in. A phase that is left gets the time since it was entered, and the peak of that time."""

    def __init__(self, began: float, clock: Callable[[], float] = time.perf_counter):
        self.phase, self.since, self.clock = "import", began, clock
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, tuple[float, float]] = {}
        self.calls: dict[str, int] = {}
        self.level = ""
        """The memory level of the latest step."""

    def enter(self, phase: str) -> str:
        """Goes over to `phase`; returns the one before."""
        before = self.phase
        if phase == before:
            return before
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        now = self.clock()
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
            wish = inner(run, number)
            self.level = run.level.name
            return wish

        return step

    def summary(self) -> dict[str, Any]:
        self.enter("after")
        return {"seconds": self.seconds, "memory": self.memory, "calls": self.calls}


def cap_memory(gib: float, blind: bool) -> None:
    """Make the card one of `gib` GiB."""
    total = torch.cuda.get_device_properties(0).total_memory
    limit = int((gib - TAKEN) * GIB)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    if not blind:
        torch.cuda.mem_get_info = lambda device=None: (max(0, limit - torch.cuda.memory_reserved()), limit)


WATCHED = (
    ("training.setup", "assemble", "set-up"),
    ("training.setup", "build_training_set", "cache"),
    ("models.source.ModelSource", "load_denoiser", "load"),
    ("training.setup", "inject_factors", "adapters"),
    ("training.loop", "validate", "validation"),
    ("models.sd.SD", "decode", "decode"),
    ("training.loop", "save", "save"),
    ("training.loop", "refresh_report", "report"),
    ("training.run", "finish", "end"),
)
"""(module or class of the package, function, phase): while the function runs, the run is in that phase."""


@contextlib.contextmanager
def watching(began: float) -> Iterator[Watch]:
    """Watch the run that is trained inside; afterwards the package is as it was."""
    from diffusekrona_train.training import loop

    made = Watch(began)
    kept = [(loop, "training_step", loop.training_step)]
    for place, name, phase in WATCHED:
        owner = pkgutil.resolve_name(f"diffusekrona_train.{place}")
        kept.append((owner, name, getattr(owner, name)))
        made.around(owner, name, phase)
    loop.training_step = made.steps(loop.training_step)
    made.enter("other")
    try:
        yield made
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


# ---- point 4: whole runs ---------------------------------------------------------------------------------------------

ORDER = ("import", "set-up", "cache", "load", "adapters", "first step", "steps", "validation", "decode", "save")
CASES = {
    "a first run": {},
    "again, latents and texts cached": {},
    "again, no validation": {"validation.every": 0},
    "again, no validation, compiled": {"validation.every": 0, "train.compile": "true"},
}


def measure(setting: Setting) -> None:
    for name, changes in CASES.items():
        if setting.small and "compiled" in name:
            continue
        setting.rows.attempt(4, f"configs/sdxl.yaml, {name}", lambda changes=changes: parts(setting, changes))


def parts(setting: Setting, changes: dict[str, Any]) -> Values:
    short = {"train.steps": 10, "validation.every": 5, "validation.steps": 2} if setting.small else {}
    found = watched(setting, ROOT / "configs" / "sdxl.yaml", {**short, **changes}, "whole")["seconds"]
    values: Values = {"s in all": sum(found.values())}
    values |= {name: f"{found[name]:.1f}" for name in ORDER if name in found}
    values["the rest"] = f"{sum(value for name, value in found.items() if name not in ORDER):.1f}"
    return {**values, "_parts": found}


def watched(setting: Setting, path: Path, changes: dict[str, Any], name: str, *flags: str) -> dict[str, Any]:
    """One run in a process of its own, watched, on the random model and photos."""
    result = setting.out / f"{name}.json"
    words = [
        word for key, value in settings(setting, path, changes, name).items() for word in ("--set", f"{key}={value}")
    ]
    command = [sys.executable, "-m", "scripts.bench.run", "--config", str(path), *words, "--json", str(result), *flags]
    return run_json(command, result)


def settings(setting: Setting, path: Path, changes: dict[str, Any], name: str) -> dict[str, Any]:
    """What a run of a config changes to use the random model and photos, by dotted key."""
    from diffusekrona_train.config import load_config

    config = load_config(path)
    kind = {"sd14": "sd15"}.get(config.model, config.model)
    return {
        "model": setting.model(kind),
        "subject.images": setting.photos(),
        "data.resolution": setting.side(kind),
        "data.cache_dir": setting.out / "cache",
        "output": setting.out / "runs" / name,
        **changes,
    }


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write to this file instead of the terminal")
    parser.add_argument("--cap", type=float, help="GiB of the card that is played")
    parser.add_argument("--blind", action="store_true")
    given = parser.parse_args()

    from diffusekrona_train.config import load_config
    from diffusekrona_train.training import train

    config = load_config(given.config, given.set)
    if given.cap:
        cap_memory(given.cap, given.blind)
    with watching(BEGAN) as made:
        train(config, overwrite=True)
    found = {**made.summary(), "level": made.level, "steps": config.train.steps}
    if torch.cuda.is_available():
        found["total"] = torch.cuda.get_device_properties(0).total_memory / GIB
    if given.json:
        given.json.write_text(json.dumps(found))
        return
    for phase, value in found["seconds"].items():
        peak = found["memory"].get(phase)
        print(f"{phase:12} {value:8.2f} s" + (f" {peak[0]:8.2f} / {peak[1]:.2f} GiB" if peak else ""))


if __name__ == "__main__":
    main()
