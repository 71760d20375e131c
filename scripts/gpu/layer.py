"""Point 1: forward and backward of one layer with each adapter, eager, compiled and as a CUDA graph."""

from __future__ import annotations

import torch

from scripts.bench_layer import build, makers, race, ratio, stepper, tensors
from scripts.gpu.rows import Values, reason
from scripts.gpu.setting import Setting, free

SHAPES = ((640, 4096), (1280, 1024), (1280, 4096))
MODES = ("eager", "compiled", "graph")
LEFT_OUT = ("KronA (4, 64), other order", "KronA (4, 64), dense difference")
"""What nobody would use; the CPU benchmark has them for the explanation."""
RIVAL, BARE = "LoRA rank 4", "frozen layer"


def measure(setting: Setting) -> None:
    shapes = ((256, 64),) if setting.small else SHAPES
    modes = MODES if setting.device == "cuda" else MODES[: 1 if setting.small else 2]
    for width, tokens in shapes:
        for mode in modes:
            measure_shape(setting, width, tokens, mode)


def measure_shape(setting: Setting, width: int, tokens: int, mode: str) -> None:
    """One row for each adapter; all of them are timed in turns, in one go."""
    rows, title = setting.rows, f"{width} x {tokens}, {mode}"
    names = [name for name in makers(width) if name not in LEFT_OUT]
    if all(rows.find(1, f"{title}: {name}") for name in names):
        return
    rows.check_time()
    seconds, failed = time_all(setting, width, tokens, mode, names)
    for name in names:
        what = f"{title}: {name}"
        if name in failed or BARE in failed:
            rows.put(1, what, error=failed.get(name, f"{BARE}: {failed.get(BARE)}"))
            continue
        values: Values = {"ms": min(seconds[name]) * 1e3, "x the frozen layer": ratio(seconds, name, BARE)}
        goal = None
        if name.startswith("KronA") and RIVAL in seconds:
            values["x LoRA rank 4"] = ratio(seconds, name, RIVAL)
            goal = ("never slower than LoRA rank 4", lambda found: found["x LoRA rank 4"] <= 1.0)
        rows.conclude(1, what, values, goal)


def time_all(
    setting: Setting, width: int, tokens: int, mode: str, names: list[str]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds by name and round, reason by name that could not run)."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # all wrappers share one forward: more than eight compilations of it would end in eager
    x, upstream = tensors(width, tokens, setting.device, setting.dtype)
    steps, failed = {}, {}
    for name in names:
        try:
            steps[name] = stepper(build(makers(width)[name], setting.device, setting.dtype), x, upstream, mode)
            steps[name]()
        except Exception as error:
            steps.pop(name, None)
            failed[name] = reason(error)
    calls = 20 if setting.device == "cuda" else 1
    seconds = race(steps, 5 if setting.small else 30, setting.device, calls)
    steps.clear()
    free()
    return seconds, failed
