"""Losses of 50 steps in fp16 with gradient scaling, bf16, NF4 and int8, each beside fp32's (point 6)."""

from __future__ import annotations

import json
import sys
from typing import Any

from scripts.bench.rows import Values
from scripts.bench.run import settings
from scripts.bench.setting import ROOT, Setting, run

WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "fp16 with gradient scaling": ({"train.mixed_precision": "fp16"}, 0.01),
    "bf16": ({"train.mixed_precision": "bf16"}, 0.02),
    "NF4, bf16": ({"train.mixed_precision": "bf16", "train.quantize": "nf4"}, 0.1),
    "int8, bf16": ({"train.mixed_precision": "bf16", "train.quantize": "int8"}, 0.05),
}
"""Way -> (what the config says, how far the mean loss may lie off fp32's, as a share; each step's three times)."""
FP32 = {"train.mixed_precision": "no", "train.tf32": "false"}


def measure(setting: Setting) -> None:
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
