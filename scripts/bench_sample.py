"""What an adapter costs at sampling time: seconds a picture for the bare base, the fused adapter and the adapter apart.

    python scripts/bench_sample.py                 # toybox on one CPU thread
    python scripts/bench_sample.py --model sdxl --steps 50 --dtype fp16

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

PROMPT = "a dog on the grass"
BASE, FUSED, APART = "bare base", "fused adapter", "adapter apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--a1", type=int, default=4)
    parser.add_argument("--a2", type=int, default=4, help="64 is the paper's choice for SDXL")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, help="pixels; the model's own size without")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    given = parser.parse_args()
    seconds = compare(given.model, given.a1, given.a2, given.steps, given.rounds, given.dtype, given.side)
    base = statistics.median(seconds[BASE])
    print(f"{given.model}, {given.steps} steps, {given.dtype}, {pick_device()}, median of {given.rounds}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:14} {median:7.3f} s  {median / base:5.3f}x  ({min(values):.3f} to {max(values):.3f})")


def compare(
    model: str, a1: int, a2: int, steps: int, rounds: int, dtype: str, side: int | None = None
) -> dict[str, list[float]]:
    """Seconds a picture of `side` pixels (None: the model's own), by variant and round."""
    device = pick_device()
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
            injection = None if name == BASE else inject(parts["denoiser"], AdapterConfig(a1=a1, a2=a2))
            if injection is not None and name == FUSED:
                injection.fuse()
            value = draw()
            seconds[name].extend([value] if round_number else [])
            if injection is not None:
                injection.eject()
    return seconds


if __name__ == "__main__":
    main()
