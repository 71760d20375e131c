"""Point 5: seconds a picture with the adapter fused, against the bare base."""

from __future__ import annotations

import statistics

from scripts.bench_sample import BASE, FUSED, compare
from scripts.gpu.rows import Values
from scripts.gpu.setting import Setting


def measure(setting: Setting) -> None:
    for kind in ("sdxl",) if setting.small else ("sdxl", "sd15"):
        steps = 2 if setting.small else 50
        what = f"{kind} {setting.side(kind)}, {steps} steps"
        goal = ("fused within 1 % of the base", lambda values: abs(values["x fused"] - 1) <= 0.01)
        setting.rows.attempt(5, what, lambda kind=kind, steps=steps: timings(setting, kind, steps), goal)


def timings(setting: Setting, kind: str, steps: int) -> Values:
    dtype = "bf16" if setting.device == "cuda" else "fp32"
    side = setting.side(kind)
    seconds = compare(str(setting.model(kind)), 4, 64, steps, 3 if setting.small else 5, dtype, side)
    base = statistics.median(seconds[BASE])
    others = {name: statistics.median(values) / base for name, values in seconds.items() if name != BASE}
    return {"s a picture": base, "x fused": others.pop(FUSED), **{f"x {name}": value for name, value in others.items()}}
