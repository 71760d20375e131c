"""What an adapter costs: forward and backward of one layer against the frozen layer alone (point 1 of the GPU table).

    python -m scripts.bench.layer [--tokens 1024] [--widths 640 1280] [--rounds 15] [--json]      # one CPU thread
    python -m scripts.bench.layer --host               # a layer's host time: 2 tokens, 256 wide, bf16
    python -m scripts.bench.layer --device cuda --dtype bfloat16 --mode graph --calls 20 --widths 2048x1280 --tokens 77

All variants take turns in every round, so a busy machine slows all of them: a ratio is the median of those within the
rounds; on a CPU processor time counts. "saved" is what autograd keeps for the backward pass beside parameters.
Gradients accumulate into tensors that exist already, as they do in training. The peers are there where peft and
lycoris-lora are (`pip install -e '.[test]'`).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters import KronA, build_adapter, plan
from diffusekrona_train.adapters.grouped import AdaptedLinear, GroupLane, flatten
from diffusekrona_train.adapters.kron import kron_delta
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer
from scripts.bench.setting import Setting, Values, free, reason

GOALS = {
    "KronA (4, 64) / frozen layer": (("KronA (4, 64)", "frozen layer"), 1.15),
    "KronA (4, 64) / LoRA rank 4": (("KronA (4, 64)", "LoRA rank 4"), 1.05),
    "KronA (4, 64) / PEFT LoKr": (("KronA (4, 64)", "PEFT LoKr (factor 8)"), 0.5),
}
"""Name -> (two variants, the largest ratio hoped for) at 1280 wide and 1024 tokens, fp32 on a CPU."""

HOST = (256, 256, 2)
"""A layer so small that its time is Python's and the dispatcher's: width in, width out, tokens; in bf16."""
HOST_GOALS = {"KronA (4, 64) / LoRA rank 4": (("KronA (4, 64)", "LoRA rank 4"), 1.4)}


SHAPES = ((640, 640, 4096), (1280, 1280, 1024), (1280, 1280, 4096), (2048, 1280, 77))
"""SDXL's layers at 1024 pixels, batch 1 and 4: width in, width out, tokens. The last is cross-attention's k and v."""
MODES = ("eager", "compiled", "graph")
LEFT_OUT = ("KronA (4, 64), other order", "KronA (4, 64), dense difference")
"""What nobody would use: only the CPU table has them, for the explanation."""
RIVAL, BARE, PLAIN = "LoRA rank 4", "frozen layer", "KronA (4, 64), without Triton"
FIRST = (BARE, RIVAL, "KronA (4, 64)", PLAIN)
"""What is measured first where time is short, at every shape but the one of batch 4."""


class WithoutTriton(AdaptedLinear):
    """A layer of ours whose products with A ⊗ B run in PyTorch, also where the Triton kernels would be taken."""


def ours(base: nn.Linear, wrapper: type[AdaptedLinear] = AdaptedLinear, **spec: Any) -> nn.Module:
    layer = Layer("layer", base.in_features, base.out_features, "q", "self")
    config = AdapterConfig(**spec)
    return wrapper(base, build_adapter(config, layer, plan(config, [layer])["layer"]))


def trained(module: nn.Module) -> None:
    """Lay the factors of an adapter of ours flat, as a run does."""
    if isinstance(module, AdaptedLinear):
        never = (lambda *_: False) if isinstance(module, WithoutTriton) else None
        flatten([{"layer": module.adapter}], by_operator=never)


class Naive(nn.Module):
    """KronA by autograd alone: the dense difference, or two products in the dearer order."""

    def __init__(self, base: nn.Module, adapter: KronA, dense: bool):
        super().__init__()
        self.base, self.A, self.B, self.dense = base, adapter.A, adapter.B, dense

    def forward(self, x: Tensor) -> Tensor:
        if self.dense:
            return self.base(x) + x @ kron_delta(self.A, self.B).T
        tokens = x.reshape(-1, self.A.shape[1], self.B.shape[1])
        return self.base(x) + (torch.matmul(self.A, tokens) @ self.B.T).reshape(*x.shape[:-1], -1)


def peft_lokr(base: nn.Linear) -> nn.Module:
    from peft import LoKrConfig, inject_adapter_in_model

    config = LoKrConfig(r=base.in_features, decompose_factor=8, target_modules=["layer"])
    return inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]  # type: ignore[index]


def lycoris_lokr(base: nn.Module, bypass: bool) -> nn.Module:
    from lycoris.modules.lokr import LokrModule

    module = LokrModule("layer", base, 1.0, full_matrix=True, factor=8, bypass_mode=bypass)
    module.apply_to()
    return base


def makers(d_in: int, d_out: int) -> dict[str, Callable[[], nn.Module]]:
    """Name -> what builds one layer d_in -> d_out with an adapter, in fp32 on the CPU."""

    def base() -> nn.Linear:
        return nn.Linear(d_in, d_out, bias=False).requires_grad_(False)

    def naive(dense: bool) -> nn.Module:
        krona = build_adapter(AdapterConfig(), Layer("a", d_in, d_out, "q", "self"), {"a1": 4, "a2": 64})
        assert isinstance(krona, KronA)
        return Naive(base(), krona, dense)

    return {
        BARE: base,
        RIVAL: lambda: ours(base(), type="lora", rank=4),
        "KronA (4, 64)": lambda: ours(base(), a1=4, a2=64),
        PLAIN: lambda: ours(base(), WithoutTriton, a1=4, a2=64),
        "KronA (8, 64)": lambda: ours(base(), a1=8, a2=64),
        "KronA (64, 8)": lambda: ours(base(), a1=64, a2=8),
        "KronA (4, 64), other order": lambda: naive(dense=False),
        "KronA (4, 64), dense difference": lambda: naive(dense=True),
        "PEFT LoKr (factor 8)": lambda: peft_lokr(base()),
        "LyCORIS LoKr (factor 8), default": lambda: lycoris_lokr(base(), bypass=False),
        "LyCORIS LoKr (factor 8), bypass": lambda: lycoris_lokr(base(), bypass=True),
    }


def build(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """A layer whose frozen weight has `dtype`, its adapter fp32 and not zero."""
    module = make().to(device)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
        else:
            parameter.data = parameter.data.to(dtype)
    trained(module)
    return module


def stepper(module: nn.Module, x: Tensor, upstream: Tensor, mode: str) -> Callable[[], Any]:
    """What runs one forward and backward pass: 'eager', 'compiled', or as a CUDA 'graph'."""
    lane = module.adapter.lane if isinstance(module, AdaptedLinear) else None
    flat = lane.group.flat if isinstance(lane, GroupLane) else None
    called = torch.compile(module, dynamic=False) if mode == "compiled" else module
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        x.grad = None
        called(x).backward(upstream)
        if flat is not None:
            flat.flush()  # as after each backward pass of a run, there for all layers at once

    if mode != "graph":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def saved_bytes(step: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes of distinct memory that autograd keeps for the backward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = step()
    del output
    return sum(size for pointer, size in kept.items() if pointer not in own)


def race(steps: dict[str, Callable[[], Any]], rounds: int, device: str, calls: int = 1) -> dict[str, list[float]]:
    """Seconds a call, by name and round; all take turns in a round."""
    on_gpu = device.startswith("cuda")
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if on_gpu else (lambda: None, time.process_time)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):  # two to warm up
        for name, step in steps.items():
            wait()
            start = clock()
            for _ in range(calls):
                step()
            wait()
            if round_ >= 2:
                seconds[name].append((clock() - start) / calls)
    return seconds


def time_all(
    shape: tuple[int, int, int],
    names: Sequence[str],
    mode: str,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    calls: int = 1,
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, str]]:
    """(seconds of every round, saved bytes, reason of what could not run), by variant; shape: width in, out, tokens."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # all wrappers share one forward: more than eight compilations of it would end in eager
    d_in, d_out, tokens = shape
    x = torch.randn(tokens, d_in, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, d_out, device=device, dtype=dtype)
    steps, saved, failed = {}, {}, {}
    for name in names:
        try:
            module = build(makers(d_in, d_out)[name], device, dtype)
            saved[name] = saved_bytes(lambda module=module: module(x), module)
            step = stepper(module, x, upstream, mode)
            step()
            steps[name] = step
        except Exception as error:
            failed[name] = reason(error)
    seconds = race(steps, rounds, device, calls)
    return seconds, saved, failed


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def table(seconds: dict[str, list[float]], saved: dict[str, int]) -> dict[str, dict[str, float]]:
    return {
        name: {"ms": min(times) * 1e3, "ratio": ratio(seconds, name, BARE), "saved_mib": saved[name] / 2**20}
        for name, times in seconds.items()
    }


def measure(setting: Setting) -> None:
    """Rows of point 1, one for each adapter; all of a shape are timed in turns, in one go."""
    shapes = ((256, 256, 64),) if setting.small else SHAPES
    modes = MODES if setting.device == "cuda" else MODES[: 1 if setting.small else 2]
    for shape in shapes:
        for mode in modes:
            measure_shape(setting, shape, mode)


def measure_first(setting: Setting) -> None:
    """Rows of point 1 that matter most: eager, and as a CUDA graph on a GPU."""
    for shape in ((256, 256, 64),) if setting.small else (SHAPES[0], SHAPES[1], SHAPES[3]):
        for mode in ("eager", "graph") if setting.device == "cuda" else ("eager",):
            measure_shape(setting, shape, mode, FIRST, 10, needs=12)


def measure_shape(
    setting: Setting,
    shape: tuple[int, int, int],
    mode: str,
    names: Sequence[str] = (),
    rounds: int = 30,
    needs: float = 0,
) -> None:
    """Rows of one shape in one mode: of `names`, all that the table has where none is given."""
    rows, title = setting.rows, f"{shape[0]} -> {shape[1]} x {shape[2]}, {mode}"
    names = names or [name for name in makers(*shape[:2]) if name not in LEFT_OUT]
    if all(rows.find(1, f"{title}: {name}") for name in names):
        return
    rows.check_time(needs)
    rounds, calls = 5 if setting.small else rounds, 20 if setting.device == "cuda" else 1
    seconds, _, failed = time_all(shape, names, mode, setting.device, setting.dtype, rounds, calls)
    free()
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


def show(shape: tuple[int, int, int], rows: dict[str, dict[str, float]], failed: dict[str, str]) -> None:
    d_in, d_out, tokens = shape
    print(f"\n{d_in} -> {d_out}, {tokens} tokens: x itself is {tokens * d_in * 4 / 2**20:.2f} MiB in fp32")
    print(f"{'':34} {'best ms':>8} {'x frozen':>9} {'saved MiB':>10}")
    for name, row in rows.items():
        print(f"{name:34} {row['ms']:8.2f} {row['ratio']:9.2f} {row['saved_mib']:10.2f}")
    for name, why in failed.items():
        print(f"{name:34} not measured: {why}")


def widths(text: str) -> tuple[int, int]:
    """'1280' -> (1280, 1280), '2048x1280' -> (2048, 1280)."""
    d_in, _, d_out = text.partition("x")
    return int(d_in), int(d_out or d_in)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--widths", type=widths, nargs="+", default=[(640, 640), (1280, 1280)])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--mode", default="eager", choices=MODES, help="graph needs CUDA")
    parser.add_argument("--calls", type=int, default=1, help="passes a measurement: more on a GPU, to keep it busy")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--host", action="store_true", help="the host's time: 256 wide, 2 tokens, bf16")
    arguments = parser.parse_args()
    if arguments.host:
        arguments.widths, arguments.tokens, arguments.dtype, arguments.calls = [HOST[:2]], HOST[2], "bfloat16", 50
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    tables, goals = {}, {}
    for d_in, d_out in arguments.widths:
        shape, dtype = (d_in, d_out, arguments.tokens), getattr(torch, arguments.dtype)
        how = (arguments.mode, arguments.device, dtype, arguments.rounds, arguments.calls)
        seconds, saved, failed = time_all(shape, list(makers(d_in, d_out)), *how)
        tables[f"{d_in}x{d_out}"] = rows = table(seconds, saved)
        if not arguments.json:
            show(shape, rows, failed)
        if bars := {(1280, 1280, 1024): GOALS, HOST: HOST_GOALS}.get(shape):
            known = {name: goal for name, goal in bars.items() if set(goal[0]) <= set(seconds)}
            goals = {name: (ratio(seconds, *pair), limit) for name, (pair, limit) in known.items()}
    if arguments.json:
        head = {"torch": torch.__version__, "machine": platform.machine(), "tokens": arguments.tokens}
        head |= {"dtype": arguments.dtype, "device": arguments.device, "mode": arguments.mode}
        print(
            json.dumps({**head, "widths": tables, "goals": {name: measured for name, (measured, _) in goals.items()}})
        )
        return
    print()
    for name, (measured, limit) in goals.items():
        print(f"{name}: {measured:.2f}, hoped for at most {limit}: {'yes' if measured <= limit else 'NO'}")


if __name__ == "__main__":
    main()
