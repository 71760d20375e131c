"""Peak memory of every config for a real model, by phase, and what `memory: auto` does on small cards (point 3).

It is measured by `scripts/gpu/measure.sh --only 3`; for one config of your own, `python -m scripts.bench.run`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusekrona_train.config import load_config
from scripts.bench.rows import Goal, Values
from scripts.bench.run import watched
from scripts.bench.setting import ROOT, Setting

STEPS = 6
ALWAYS = {
    "train.steps": STEPS,
    "train.checkpoint_every": STEPS // 2,
    "train.log_every": 1,
    "validation.every": STEPS // 2,
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


def measure(setting: Setting) -> None:
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
            setting.rows.attempt(3, what, take, ("chooses what fits", lambda values: values["steps done"] == STEPS))


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
