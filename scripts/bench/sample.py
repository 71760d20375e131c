"""What an adapter costs at sampling time: seconds an image for base, fused adapter and adapter apart (point 5).

    python -m scripts.bench.sample                 # toybox on one CPU thread
    python -m scripts.bench.sample --model sdxl --steps 50 --dtype fp16

The variants take turns in changing order, so that a slow minute of the machine hits all alike; the median of the rounds
is printed. On a CPU the clock counts the process' own time, on a GPU the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.common.device import DTYPES, pick_device
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling.render import SampleSettings, render
from diffusekrona_train.sampling.session import encode_texts
from scripts.bench.setting import Setting, Values

PROMPT = "a dog on the grass"
BASE, FUSED, APART = "bare base", "fused adapter", "adapter apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--device", help="the one that krona-sample would choose, if omitted")
    parser.add_argument("--a1", type=int, default=4)
    parser.add_argument("--a2", type=int, default=4, help="64 is the paper's choice for SDXL")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, help="pixels; the model's own size without")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    given = parser.parse_args()
    device = torch.device(given.device) if given.device else pick_device()
    how = (given.steps, given.rounds, given.dtype, device, given.side)
    seconds = compare(given.model, AdapterConfig(a1=given.a1, a2=given.a2), *how)
    base = statistics.median(seconds[BASE])
    print(f"{given.model}, {given.steps} steps, {given.dtype}, {device}, median of {given.rounds}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:14} {median:7.3f} s  {median / base:5.3f}x  ({min(values):.3f} to {max(values):.3f})")


def compare(
    model: str, adapter: AdapterConfig, steps: int, rounds: int, dtype: str, device: torch.device, side: int | None
) -> dict[str, list[float]]:
    """Return seconds an image of `side` pixels (None: the model's own), by variant and round."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    source = open_model(model)
    texts = encode_texts(source, [PROMPT, ""], device)
    parts = source.load("vae", "scheduler", device=device)
    parts["denoiser"] = source.load_denoiser(DTYPES[dtype], device)
    pipe = source.family.pipeline(parts)
    settings = SampleSettings(steps, 4.0, height=side, width=side)

    def draw() -> float:
        start = clock()
        render(pipe, source.family, [(PROMPT, 0)], settings, conditioning_of=texts.__getitem__)
        return clock() - start

    seconds: dict[str, list[float]] = {BASE: [], FUSED: [], APART: []}
    for round_number in range(rounds + 1):  # the first one warms up
        names = list(seconds)
        turn = round_number % 3
        for name in names[turn:] + names[:turn]:
            injection = None if name == BASE else inject(parts["denoiser"], adapter)
            if injection is not None and name == FUSED:
                injection.fuse()
            value = draw()
            seconds[name].extend([value] if round_number else [])
            if injection is not None:
                injection.eject()
    return seconds


def measure(setting: Setting) -> None:
    for kind in ("sdxl",) if setting.small else ("sdxl", "sd15"):
        steps = 2 if setting.small else 50
        what = f"{kind} {setting.side(kind)}, {steps} steps"
        goal = ("fused within 1 % of the base", lambda values: abs(values["x fused"] - 1) <= 0.01)
        setting.rows.attempt(5, what, lambda kind=kind, steps=steps: timings(setting, kind, steps), goal)


def timings(setting: Setting, kind: str, steps: int) -> Values:
    dtype, rounds = "bf16" if setting.device == "cuda" else "fp32", 3 if setting.small else 5
    how = (steps, rounds, dtype, torch.device(setting.device), setting.side(kind))
    seconds = compare(str(setting.model(kind)), AdapterConfig(a1=4, a2=64), *how)
    base = statistics.median(seconds[BASE])
    others = {name: statistics.median(values) / base for name, values in seconds.items() if name != BASE}
    return {"s an image": base, "x fused": others.pop(FUSED), **{f"x {name}": value for name, value in others.items()}}


if __name__ == "__main__":
    main()
