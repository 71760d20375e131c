"""Point 2: one training step against the bare frozen UNet, in each way to run it, and where its time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from diffusekrona_train.cache import Bucket, TrainingSet
from diffusekrona_train.config import make_config
from diffusekrona_train.descent import Descent
from diffusekrona_train.diffusion import noise_schedule
from diffusekrona_train.families import family_of
from diffusekrona_train.inject import inject
from diffusekrona_train.objective import Objective
from scripts.gpu.rows import Values
from scripts.gpu.setting import Setting, free
from tests.tiny import make_unet, packaged, real_part

CASES = (("sdxl", 1), ("sdxl", 4), ("sd15", 1), ("sd15", 8))
CONTENDERS: dict[str, dict | None] = {
    "bare frozen UNet, forward and backward": None,
    "LoRA rank 4": {"type": "lora", "rank": 4},
    "KronA (4, 64)": {"a1": 4, "a2": 64},
}
BARE, RIVAL, KRONA = CONTENDERS
WAYS = ("eager", "checkpointing", "compiled blocks", "compiled", "CUDA graphs")
"""The last three need minutes to compile at real size, so they come last."""
STEPS_OF_THE_GOAL, SECONDS_OF_THE_GOAL = 500, 45

OneProcess = SimpleNamespace(num_processes=1, scaler=None, backward=lambda loss: loss.backward())


@dataclass
class Bench:
    """A frozen UNet on the device, and a set of random latents of its size."""

    unet: Any
    side: int
    batch: int

    def objective(self, injection: Any) -> Objective:
        config = self.unet.config
        family = family_of({"_class_name": "UNet2DConditionModel", **config}, "random")
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(5, 1, 4, self.side // 8, self.side // 8, generator=generator)
        conditioning = {"prompt_embeds": torch.randn(1, 77, config.cross_attention_dim, generator=generator)}
        ids = torch.zeros(5, 1, 0)
        if family.name == "sdxl":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            conditioning["pooled"] = torch.randn(1, width, generator=generator)
            ids = torch.tensor([float(self.side), self.side, 0, 0, self.side, self.side]).expand(5, 1, 6).clone()
        data = TrainingSet(
            [Bucket(latents, ids, torch.zeros(5, dtype=torch.long), list("abcde"))], [], [""], conditioning
        )
        alphas = noise_schedule({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
        device = next(self.unet.parameters()).device
        return Objective(
            self.config(), family, self.unet, injection, data, alphas, "epsilon", self.unet.dtype, device
        )  # fmt: skip

    def config(self, adapter: dict | None = None) -> Any:
        tree = {"subject": {"images": "x", "class": "dog"}, "adapter": adapter or {}, "output": "x"}
        return make_config({**tree, "train": {"batch_size": self.batch}})

    def stepper(self, adapter: dict | None) -> tuple[Callable[[int], Any], Callable[[], Any]]:
        """(what runs step i, what takes the adapter out again)."""
        if adapter is None:
            objective = self.objective(None)

            def bare(number: int) -> None:
                (batch,) = objective.batches(number, 0)
                objective._predicted(batch.x_0.requires_grad_(), batch).square().mean().backward()

            return bare, lambda: None
        config = self.config(adapter)
        injection = inject(self.unet, config.adapter)
        objective, descent = self.objective(injection), Descent(injection.parameters(), config.train, OneProcess)

        def step(number: int) -> None:
            descent.backward(objective.loss(number, 0))
            descent.step(5e-4)

        return step, injection.eject


def measure(setting: Setting) -> None:
    for kind, batch in CASES[:1] if setting.small else CASES:
        bench: list[Bench] = []

        def ready(kind: str = kind, batch: int = batch, bench: list[Bench] = bench) -> Bench:
            if not bench:
                bench.append(Bench(load(setting, kind), setting.side(kind), batch))
            return bench[0]

        title = f"{kind} {setting.side(kind)}, batch {batch}"
        for way in ways(setting, batch):
            for name in CONTENDERS:
                if name == RIVAL and way not in ("eager", "checkpointing"):
                    continue
                take = lambda name=name, way=way: time_steps(ready(), CONTENDERS[name], way, setting)  # noqa: E731
                setting.rows.attempt(2, f"{title}: {name}, {way}", take)
        if batch == 1:
            setting.rows.attempt(2, f"{title}: where the time goes, eager", lambda: shares(ready(), setting))
        summary(setting, title, kind, batch)
        bench.clear()
        free()


def ways(setting: Setting, batch: int) -> tuple[str, ...]:
    if setting.small:
        return WAYS[:2]
    if setting.device != "cuda":
        return WAYS[:4]
    return WAYS if batch == 1 else WAYS[:3]


def load(setting: Setting, kind: str) -> Any:
    """A random UNet of the real configuration on the device, or the small one."""
    torch.manual_seed(0)
    if setting.small:
        return make_unet(kind, 64).requires_grad_(False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        assert "unet" in packaged(kind)
        with torch.device(setting.device):
            return real_part(kind, "unet").requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def set_way(unet: Any, way: str) -> None:
    """Puts the UNet into one of WAYS, from whichever it was in."""
    torch._dynamo.reset()
    unet.disable_gradient_checkpointing()
    for module in unet.modules():
        module._compiled_call_impl = None
    if way == "checkpointing":
        unet.enable_gradient_checkpointing()
    elif way == "compiled blocks":
        unet.compile_repeated_blocks()
    elif way == "compiled":
        unet.compile()
    elif way == "CUDA graphs":
        unet.compile(mode="reduce-overhead")


def time_steps(bench: Bench, adapter: dict | None, way: str, setting: Setting) -> Values:
    """Seconds a step (median of rounds), memory at the peak, and what the first step took on top."""
    step, take_out = bench.stepper(adapter)
    try:
        set_way(bench.unet, way)
        wait()
        began = time.perf_counter()
        step(0)
        wait()
        first = time.perf_counter() - began
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        calls = 1 if setting.small else 5
        seconds = []
        for number in range(4 if setting.small else 9):
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
        take_out()
        set_way(bench.unet, "eager")
        del step, take_out
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
    config = bench.config(CONTENDERS[KRONA])
    injection = inject(bench.unet, config.adapter)
    try:
        objective, descent = bench.objective(injection), Descent(injection.parameters(), config.train, OneProcess)
        calls = 3
        optimiser = whole = 0.0
        for number in range(calls + 2):
            wait()
            began = time.perf_counter()
            descent.backward(objective.loss(number, 0))
            wait()
            middle = time.perf_counter()
            descent.step(5e-4)
            wait()
            if number >= 2:
                optimiser += time.perf_counter() - middle
                whole += time.perf_counter() - began
        values: Values = {"% optimiser": 100 * optimiser / whole}
        if all(known):
            values["% adapters"] = 100 * (1 - known[0]["ms a step"] / known[1]["ms a step"]) - values["% optimiser"]  # type: ignore[index]
        return {
            **values,
            **profiled(lambda: (descent.backward(objective.loss(9, 0)), descent.step(5e-4)), whole / calls),
        }
    finally:
        injection.eject()


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
