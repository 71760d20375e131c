"""Time of a training step against the bare frozen UNet's forward and backward, LoRA and PEFT's LoKr (point 2).

    python -m scripts.bench.step                        # a small SDXL, one CPU thread, a few minutes
    python -m scripts.bench.step --device cuda --width 320 --latent 128

All contenders take turns, round by round, on one small SDXL with random weights, so that a busy machine slows all
alike; a ratio is the median of those within the rounds. `scripts/gpu/measure.sh --only 2` does it at real size, in each
way to run a step, and says where its time goes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffusekrona_train.models.sdxl import SDXL
from diffusekrona_train.training.base import compile_blocks
from scripts.bench.contender import Bench, Contender, load
from scripts.bench.setting import Setting, TimeIsUp, Values, free
from tests.tiny import make_unet

CASES = (("sdxl", 1), ("sdxl", 4), ("sd15", 1), ("sd15", 8))
CONTENDERS: dict[str, dict | None] = {
    "bare frozen UNet, forward and backward": None,
    "LoRA rank 4": {"type": "lora", "rank": 4},
    "KronA (4, 64)": {"a1": 4, "a2": 64},
}
BARE, RIVAL, KRONA = CONTENDERS
WAYS = ("eager", "checkpointing", "compiled blocks", "CUDA graph", "compiled blocks, CUDA graph")
NF4, PROFILE = "NF4, checkpointing", "profile"
STEPS_OF_THE_GOAL, SECONDS_OF_THE_GOAL = 500, 45


def measure(setting: Setting) -> None:
    for kind, batch in CASES[:1] if setting.small else CASES:
        bench: list[Bench] = []

        def ready(kind: str = kind, batch: int = batch, bench: list[Bench] = bench) -> Bench:
            if not bench:
                bench.append(Bench(load(setting, kind), setting.side(kind), batch))
            return bench[0]

        title = f"{kind} {setting.side(kind)}, batch {batch}"
        for way in ways(setting):
            for name in CONTENDERS:
                take = lambda name=name, way=way: time_steps(ready(), CONTENDERS[name], way, setting)  # noqa: E731
                setting.rows.attempt(2, f"{title}: {name}, {way}", take)
        if batch == 1:
            setting.rows.attempt(2, f"{title}: where the time goes, eager", lambda: shares(ready(), setting))
        summary(setting, title, kind, batch)
        bench.clear()
        free()


FIRST = (
    (BARE, "eager", 25),
    (KRONA, "eager", 15),
    (RIVAL, "eager", 15),
    (BARE, "checkpointing", 15),
    (KRONA, "checkpointing", 15),
    (PROFILE, "eager", 15),
    (BARE, "CUDA graph", 20),
    (KRONA, "CUDA graph", 20),
    (RIVAL, "CUDA graph", 20),
    (KRONA, NF4, 30),
)
"""(contender, way, seconds that the row takes on a fast card, with some to spare), the most valuable first."""
COMPILED = (
    (KRONA, "compiled blocks", 90),
    (BARE, "compiled blocks", 70),
    (KRONA, "compiled blocks, CUDA graph", 90),
    (BARE, "compiled blocks, CUDA graph", 70),
)


def measure_first(setting: Setting) -> None:
    """Rows of point 2 at batch 1 in one process with one UNet; those that do not fit the time left are passed over."""
    some = [row for row in FIRST if setting.device == "cuda" or "graph" not in row[1]]
    measure_rows(setting, some)


def measure_compiled(setting: Setting) -> None:
    """The same with compiled blocks, which take a minute each."""
    measure_rows(setting, COMPILED if setting.device == "cuda" else () if setting.small else COMPILED[:2])


def measure_rows(setting: Setting, wanted: Sequence[tuple[str, str, int]]) -> None:
    title, made = f"sdxl {setting.side('sdxl')}, batch 1", functools.cache(lambda: first_bench(setting))
    rounds, late = 3 if setting.small else 5, None
    for name, way, seconds in wanted:
        if name == PROFILE:
            what, take = f"{title}: where the time goes, eager", lambda: shares(made(), setting)
        else:
            what = f"{title}: {name}, {way}"
            take = lambda name=name, way=way: time_steps(made(), CONTENDERS[name], way, setting, rounds)  # noqa: E731
        try:
            setting.rows.attempt(2, what, take, needs=seconds)
        except TimeIsUp as error:
            late = error  # a shorter row may fit
    summary(setting, title, "sdxl", 1)
    if late:
        raise late


def first_bench(setting: Setting) -> Bench:
    return Bench(load(setting, "sdxl"), setting.side("sdxl"), 1)


def ways(setting: Setting) -> tuple[str, ...]:
    if setting.small and setting.device == "cpu":
        return WAYS[:2]
    return WAYS if setting.device == "cuda" else WAYS[:3]


def set_way(unet: Any, way: str) -> None:
    """Puts the UNet into one of WAYS, from whichever it was in."""
    torch._dynamo.reset()
    unet.disable_gradient_checkpointing()
    for module in unet.modules():
        module._compiled_call_impl = None
    if "checkpointing" in way:
        unet.enable_gradient_checkpointing()
    if "compiled" in way:
        compile_blocks(unet)


def quantize(unet: Any) -> None:
    """Turn the UNet's linears into NF4, for good: no other way can follow."""
    from diffusekrona_train.models.quantize import quantize_linears

    device = next(unet.parameters()).device
    quantize_linears(unet, "nf4", unet.dtype, SDXL().quantizes)
    unet.requires_grad_(False).to(device)


def time_steps(bench: Bench, adapter: dict | None, way: str, setting: Setting, rounds: int = 9) -> Values:
    """Seconds a step (median of rounds), memory at the peak, and what the first step took on top."""
    if way == NF4:
        quantize(bench.unet)
    contender = bench.contender(adapter)
    try:
        set_way(bench.unet, way)
        wait()
        began = time.perf_counter()
        contender.step(0)
        wait()
        first = time.perf_counter() - began
        step = contender.captured() if "CUDA graph" in way else contender.step
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        calls = 1 if setting.small else 5
        seconds = []
        for number in range(min(rounds, 4) if setting.small else rounds):
            began = time.perf_counter()
            for call in range(calls):
                step(number * calls + call + 1)
            wait()
            seconds.append((time.perf_counter() - began) / calls)
        median = statistics.median(seconds[1:])
        values: Values = {"ms a step": median * 1e3, "steps/s": 1 / median, "s more for the first": first - median}
        if torch.cuda.is_available():
            values["GiB at the peak"] = torch.cuda.max_memory_allocated() / 2**30
        return values
    finally:
        contender.leave()
        set_way(bench.unet, "eager")
        del contender
        free()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(setting: Setting, title: str, kind: str, batch: int) -> None:
    """The goals: the best way with the adapter against the best way without, and 500 steps of SDXL."""
    best = {}
    for name in (BARE, KRONA):
        found = [(setting.rows.find(2, f"{title}: {name}, {way}") or {}).get("ms a step") for way in WAYS]
        known = [value for value in found if value is not None]
        if not known:
            return
        best[name] = min(known)
    setting.rows.conclude(
        2,
        f"{title}: best KronA step against the best bare UNet",
        {"x": best[KRONA] / best[BARE]},
        ("at most 1.05 x", lambda values: values["x"] <= 1.05),
    )
    if (kind, batch) == ("sdxl", 1):
        goal = (f"{SECONDS_OF_THE_GOAL} s on an H100", lambda values: values["s"] <= SECONDS_OF_THE_GOAL)
        what = f"{title}: {STEPS_OF_THE_GOAL} of the best KronA steps"
        setting.rows.conclude(2, what, {"s": best[KRONA] * STEPS_OF_THE_GOAL / 1e3}, None if setting.small else goal)


def shares(bench: Bench, setting: Setting) -> Values:
    """Shares of an eager step: what the adapters add, the optimiser, and on a GPU the time in which no kernel runs."""
    title = f"{'sdxl' if bench.unet.config.addition_embed_type else 'sd15'} {bench.side}, batch {bench.batch}"
    known = [setting.rows.find(2, f"{title}: {name}, eager") for name in (BARE, KRONA)]
    contender = bench.contender(CONTENDERS[KRONA])
    try:
        calls = 3
        optimiser = whole = 0.0
        for number in range(calls + 2):
            wait()
            began = time.perf_counter()
            (batch,) = contender.objective.batches(number, 0)
            contender.passes(batch)
            wait()
            middle = time.perf_counter()
            contender.finish()
            wait()
            if number >= 2:
                optimiser += time.perf_counter() - middle
                whole += time.perf_counter() - began
        values: Values = {"% optimiser": 100 * optimiser / whole}
        if known[0] and known[1]:
            more = 100 * (1 - known[0]["ms a step"] / known[1]["ms a step"])
            values["% adapters"] = max(0.0, more - values["% optimiser"])
        return {**values, **profiled(lambda: contender.step(9), whole / calls)}
    finally:
        contender.leave()


def profiled(step: Callable[[], Any], seconds: float) -> Values:
    """Kernels of one step, the share of its `seconds` in which the device waits, the kernels that take longest.

    The time comes from outside: a profiler slows the launches down.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        wait()
    events = profiler.key_averages()
    if not on_gpu:
        return {"operators called": sum(event.count for event in events)}
    kernels = [event for event in events if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:20]
    return {
        "kernels launched": sum(event.count for event in kernels),
        "% of the time without a kernel": max(0.0, 100 * (1 - busy / seconds)),
        "_longest": [(event.key[:120], event.count, round(event.self_device_time_total / 1e3, 3)) for event in longest],
    }


# ---- on its own: a small model, all contenders in turns --------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=320, help="width of the first UNet block")
    parser.add_argument("--latent", type=int, default=16, help="side of the latents (times 8: pixels)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a contender in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    seconds = race(small_contenders(given), given.rounds, given.steps)
    print(f"\n{'a step of':46} {'seconds':>8} {'KronA takes':>12}")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[KRONA], values, strict=True))
        print(f"{name:46} {statistics.median(values):8.3f} {ratio:11.2f}x")
    print(f"median of {given.rounds} rounds of {given.steps} steps, batch {given.batch}, {given.threads} thread(s)")


def small_contenders(given: argparse.Namespace) -> dict[str, Contender]:
    """Name -> one training step. All share one UNet but PEFT's, whose wrapping cannot be taken out bit for bit."""
    torch.manual_seed(0)
    unet, other = (make_unet("sdxl", given.width).to(given.device).requires_grad_(False) for _ in range(2))
    print(f"UNet: {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters, latents {given.latent}, fp32")
    bench = Bench(unet, 8 * given.latent, given.batch)
    made = {}
    for name, adapter in CONTENDERS.items():
        made[name] = bench.contender(adapter)
        made[name].leave()
    return {**made, "PEFT LoKr, the same loop": Bench(other, 8 * given.latent, given.batch).peft_lokr()}


def race(contenders: dict[str, Contender], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step, for each contender and round; the order changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            contender = contenders[name]
            contender.enter()
            contender.step(0)  # the first step after a swap is not measured
            wait()
            began = time.perf_counter()
            for i in range(steps):
                contender.step(number * steps + i)
            wait()
            if number:  # nor is the first round, which makes the optimiser's state
                seconds[name].append((time.perf_counter() - began) / steps)
            contender.leave()
    return seconds


if __name__ == "__main__":
    main()
