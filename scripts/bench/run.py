"""Whole training runs, watched: where the seconds go, how much memory each phase needs at most, losses by precision.

    python -m scripts.bench.run --config dog.yaml [--set train.steps=6] [--json FILE] [--cap 8] [--resume]

`--cap` is a card of so many GiB: the allocator gives 0.8 GiB less, which the driver and the desktop take, and what is
free is reported accordingly. `--blind` leaves the latter as it is, so that a run has to notice by itself that it does
not fit. On a machine without a GPU only the seconds are there. `scripts/gpu/measure.sh` has three points of it: the
peaks of every config and what `memory: auto` does on small cards (3), 500 steps (4), and the losses of 50 steps in fp16
with gradient scaling, bf16, NF4 and int8 beside fp32's (6).
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

from diffusekrona_train.config import load_config  # noqa: E402
from scripts.bench.setting import GIB, ROOT, Goal, Setting, Values, run, run_json  # noqa: E402

TAKEN = 0.8
"""GiB of a card that the CUDA context and a desktop hold."""


class Watch:
    """The phase a run is in. A phase that is left gets the time since it was entered, and the peak of that time."""

    def __init__(self, began: float, clock: Callable[[], float] = time.perf_counter):
        self.phase, self.since, self.clock = "import", began, clock
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, tuple[float, float]] = {}
        self.calls: dict[str, int] = {}
        self.timed = 0
        """Steps in the phase `steps`: all but the first."""
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
            self.timed += number > run.start
            wish = inner(run, number)
            self.level = run.level.name
            return wish

        return step

    def summary(self) -> dict[str, Any]:
        self.enter("after")
        return {"seconds": self.seconds, "memory": self.memory, "calls": self.calls, "timed": self.timed}


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
    ("training.base", "inject_factors", "adapters"),
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


def parts(setting: Setting, changes: dict[str, Any], *flags: str) -> Values:
    short = {"train.steps": 10, "validation.every": 5, "validation.steps": 2} if setting.small else {}
    whole = watched(setting, ROOT / "configs" / "sdxl.yaml", {**short, **changes}, "whole", *flags)
    found = whole["seconds"]
    values: Values = {"s in all": sum(found.values()), "level": whole["level"]}
    if whole["timed"]:
        values["ms a step"] = 1e3 * found["steps"] / whole["timed"]
    values |= {name: f"{found[name]:.1f}" for name in ORDER if name in found}
    values["the rest"] = f"{sum(value for name, value in found.items() if name not in ORDER):.1f}"
    if whole["memory"]:
        values["GiB reserved at most"] = max(both[1] for both in whole["memory"].values())
    return {**values, "_parts": found, "_memory": whole["memory"]}


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


# ---- point 3: peaks --------------------------------------------------------------------------------------------------

FEW_STEPS = 6
ALWAYS = {
    "train.steps": FEW_STEPS,
    "train.checkpoint_every": FEW_STEPS // 2,
    "train.log_every": 1,
    "validation.every": FEW_STEPS // 2,
    "validation.steps": 2,
    "data.variants": 1,
}
"""What makes a run short and leaves its memory as it is."""
GOALS = {"sdxl-8gb": 8.0, "sdxl-12gb": 10.0}
"""GiB reserved at most, decode included, of configs that promise a card: 8 GB, and bf16 with checkpointing in 10 GB."""
NF4_GOAL = 6.0
"""GiB reserved at most while NF4 with checkpointing trains, decode apart."""
CARDS = (24, 16, 12, 8, 6)
"""GiB of the cards that are played."""
SMALL_CONFIGS = ("sdxl", "sdxl-8gb", "sd15", "prior-images")


def measure_peaks(setting: Setting) -> None:
    configs = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.endswith(".accelerate.yaml"))
    for path in configs:
        if path.stem == "toybox" or (setting.small and path.stem not in SMALL_CONFIGS):
            continue
        setting.rows.attempt(3, f"configs/{path.name}", lambda path=path: peaks(setting, path), goal_of(path.stem))
    if setting.device == "cuda":
        auto_on_small_cards(setting)


def auto_on_small_cards(setting: Setting) -> None:
    for card in CARDS:
        for blind in (False, True):
            what = f"sdxl.yaml, memory: auto, a card of {card} GiB" + (", estimates off" if blind else "")
            flags = ["--cap", str(card), *(["--blind"] if blind else [])]
            take = lambda flags=flags: peaks(setting, ROOT / "configs" / "sdxl.yaml", *flags)  # noqa: E731
            setting.rows.attempt(3, what, take, ("chooses what fits", lambda values: values["steps done"] == FEW_STEPS))


def goal_of(name: str) -> Goal | None:
    if name not in GOALS:
        return None
    limit = GOALS[name]

    def holds(values: Values) -> bool:
        most = values.get("_reserved", {})
        trained = max((most.get(phase, 0.0) for phase in ("first step", "steps")), default=0.0)
        return bool(most) and max(most.values()) < limit and (name != "sdxl-8gb" or trained < NF4_GOAL)

    apart = f", {NF4_GOAL:g} while training" if name == "sdxl-8gb" else ""
    return f"under {limit:g} GiB{apart}", holds


def peaks(setting: Setting, path: Path, *flags: str) -> Values:
    """A short run of the config with the random model of its kind; peaks by phase."""
    found = watched(setting, path, ALWAYS | class_images(path), f"peaks-{path.stem}", *flags)
    allocated = {phase: both[0] for phase, both in found["memory"].items()}
    reserved = {phase: both[1] for phase, both in found["memory"].items()}
    values: Values = {"level": found["level"], "steps done": found["calls"].get("steps", 0) and found["steps"]}
    for name, phases in GROUPS.items():
        if known := [phase for phase in phases if phase in reserved]:
            values[name] = f"{max(allocated[p] for p in known):.2f} / {max(reserved[p] for p in known):.2f}"
    if reserved:
        training = max(reserved.get("first step", 0.0), reserved.get("steps", 0.0))
        others = max((value for phase, value in reserved.items() if phase in ("validation", "save", "end")), default=0)
        values["nothing above training but the decode"] = "yes" if others <= training + 0.05 else "NO"
    return {**values, "_allocated": allocated, "_reserved": reserved}


GROUPS = {
    "cache": ("cache",),
    "training": ("first step", "steps"),
    "validation": ("validation",),
    "decode": ("decode",),
    "save": ("save",),
    "end": ("end",),
}


def class_images(path: Path) -> dict[str, Any]:
    return {"prior.count": 1} if load_config(path).prior.kind == "images" else {}


# ---- point 6: precision ----------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "fp16 with gradient scaling": ({"train.mixed_precision": "fp16"}, 0.01),
    "bf16": ({"train.mixed_precision": "bf16"}, 0.02),
    "NF4, bf16": ({"train.mixed_precision": "bf16", "train.quantize": "nf4"}, 0.1),
    "int8, bf16": ({"train.mixed_precision": "bf16", "train.quantize": "int8"}, 0.05),
}
"""Way -> (what the config says, how far the mean loss may lie off fp32's, as a share; each step's three times)."""
FP32 = {"train.mixed_precision": "no", "train.tf32": "false"}


def measure_precision(setting: Setting) -> None:
    for kind in ("sd15",) if setting.small else ("sd15", "sdxl"):
        steps = 4 if setting.small else 50
        title = f"{kind} {setting.side(kind)}, {steps} steps"
        exact = setting.rows.attempt(6, f"{title}: fp32", lambda kind=kind, n=steps: losses(setting, kind, n, FP32))
        if exact is None:
            continue
        for name, (changes, tolerance) in WAYS.items():
            if setting.device != "cuda" and "fp16" in name:
                continue

            def compared(kind: str = kind, n: int = steps, changes: dict = changes, exact: Values = exact) -> Values:
                return compare(losses(setting, kind, n, changes), exact)

            goal = (f"within {tolerance:.0%}, no NaN", lambda found, limit=tolerance: within(found, limit))
            setting.rows.attempt(6, f"{title}: {name}", compared, goal)


def within(found: Values, limit: float) -> bool:
    """The mean loss within `limit`, that of each step within three times as much."""
    close = found["% off at the mean"] <= 100 * limit and found["% off at most"] <= 300 * limit
    return close and found["not finite"] == 0


def losses(setting: Setting, kind: str, steps: int, changes: dict[str, Any]) -> Values:
    """The losses and gradient norms that a run with these settings logged."""
    output = setting.out / "runs" / "precision"
    config = ROOT / "configs" / f"{kind}.yaml"
    sets = {
        "train.steps": steps,
        "train.log_every": 1,
        "train.memory": "nf4" if changes.get("train.quantize") == "nf4" else "checkpointing",
        "validation.every": 0,
        **changes,
    }
    whole = settings(setting, config, sets, output.name).items()
    words = [word for key, value in whole for word in ("--set", f"{key}={value}")]
    run([sys.executable, "-m", "diffusekrona_train", "--config", str(config), *words, "--overwrite"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "lr" in line]
    taken = [line["loss"] for line in lines]
    known = [value for value in taken if value is not None]
    return {
        "mean loss": sum(known) / len(known),
        "not finite": len(taken) - len(known),
        "_losses": taken,
        "_norms": [line["grad_norm"] for line in lines],
    }


def compare(found: Values, exact: Values) -> Values:
    """`found` with its distance from the losses in fp32, in percent."""
    pairs = [(a, b) for a, b in zip(found["_losses"], exact["_losses"], strict=True) if a is not None and b is not None]
    most = max(abs(a - b) / b for a, b in pairs)
    mean = abs(sum(a for a, _ in pairs) - sum(b for _, b in pairs)) / sum(b for _, b in pairs)
    return {**found, "% off at the mean": 100 * mean, "% off at most": 100 * most}


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write to this file instead of the terminal")
    parser.add_argument("--cap", type=float, help="GiB of the card that is played")
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--resume", action="store_true", help="as in krona-train; without it the run starts anew")
    given = parser.parse_args()

    from diffusekrona_train.training import train

    config = load_config(given.config, given.set)
    if given.cap:
        cap_memory(given.cap, given.blind)
    with watching(BEGAN) as made:
        train(config, resume=given.resume, overwrite=not given.resume)
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
