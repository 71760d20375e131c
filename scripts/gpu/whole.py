"""Point 4: a whole run from the command to the file, and where its seconds go."""

from __future__ import annotations

from scripts.gpu.peaks import watched
from scripts.gpu.rows import Values
from scripts.gpu.setting import ROOT, Setting

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
        setting.rows.attempt(4, f"configs/sdxl.yaml, {name}", lambda changes=changes: seconds(setting, changes))


def seconds(setting: Setting, changes: dict) -> Values:
    short = {"train.steps": 10, "validation.every": 5, "validation.steps": 2} if setting.small else {}
    found = watched(setting, ROOT / "configs" / "sdxl.yaml", {**short, **changes}, "whole")
    parts = found["seconds"]
    values: Values = {"s in all": sum(parts.values())}
    values |= {name: f"{parts[name]:.1f}" for name in ORDER if name in parts}
    values["the rest"] = f"{sum(value for name, value in parts.items() if name not in ORDER):.1f}"
    return {**values, "_parts": parts}
