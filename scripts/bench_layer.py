"""What an adapter costs: forward and backward of one layer, on one thread, against the frozen layer alone.

    python scripts/bench_layer.py [--tokens 1024] [--widths 640 1280] [--rounds 15] [--json]
    python scripts/bench_layer.py --device cuda --dtype bfloat16 --mode compiled --calls 20

All variants take turns in every round, so a busy machine slows all of them: a ratio is the median of those within the
rounds; on a CPU processor time counts. "saved" is what autograd keeps for the backward pass beside parameters.
The peers are there where peft and lycoris-lora are (`pip install -e '.[test]'`).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters import KronA, build_adapter, plan
from diffusekrona_train.adapters.grouped import flatten
from diffusekrona_train.adapters.kron import kron_delta
from diffusekrona_train.adapters.wrappers import AdaptedLinear
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer

GOALS = {
    "KronA (4, 64) / frozen layer": (("KronA (4, 64)", "frozen layer"), 1.15),
    "KronA (4, 64) / LoRA rank 4": (("KronA (4, 64)", "LoRA rank 4"), 1.05),
    "KronA (4, 64) / PEFT LoKr": (("KronA (4, 64)", "PEFT LoKr (factor 8)"), 0.5),
}
"""Name -> (two variants, the largest ratio hoped for) at 1280 wide and 1024 tokens, fp32 on a CPU."""


def ours(base: nn.Module, width: int, **spec: Any) -> nn.Module:
    layer = Layer("layer", width, width, "q", "self")
    config = AdapterConfig(**spec)
    return AdaptedLinear(base, build_adapter(config, layer, plan(config, [layer])["layer"]))


def trained(module: nn.Module) -> None:
    """Lay the factors of an adapter of ours flat, as a run does."""
    if isinstance(module, AdaptedLinear):
        flatten([{"layer": module.adapter}])


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


def peft_lokr(base: nn.Module, width: int) -> nn.Module:
    from peft import LoKrConfig, inject_adapter_in_model

    config = LoKrConfig(r=width, decompose_factor=8, target_modules=["layer"])
    return inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]  # type: ignore[index]


def lycoris_lokr(base: nn.Module, bypass: bool) -> nn.Module:
    from lycoris.modules.lokr import LokrModule

    module = LokrModule("layer", base, 1.0, full_matrix=True, factor=8, bypass_mode=bypass)
    module.apply_to()
    return base


def makers(width: int) -> dict[str, Callable[[], nn.Module]]:
    """Name -> what builds one layer of `width` with an adapter, in fp32 on the CPU."""

    def base() -> nn.Linear:
        return nn.Linear(width, width, bias=False).requires_grad_(False)

    def naive(dense: bool) -> nn.Module:
        krona = build_adapter(AdapterConfig(), Layer("a", width, width, "q", "self"), {"a1": 4, "a2": 64})
        assert isinstance(krona, KronA)
        return Naive(base(), krona, dense)

    return {
        "frozen layer": base,
        "LoRA rank 4": lambda: ours(base(), width, type="lora", rank=4),
        "KronA (4, 64)": lambda: ours(base(), width, a1=4, a2=64),
        "KronA (8, 64)": lambda: ours(base(), width, a1=8, a2=64),
        "KronA (64, 8)": lambda: ours(base(), width, a1=64, a2=8),
        "KronA (4, 64), other order": lambda: naive(dense=False),
        "KronA (4, 64), dense difference": lambda: naive(dense=True),
        "PEFT LoKr (factor 8)": lambda: peft_lokr(base(), width),
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


def variants(width: int, device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All layers whose library is installed; the others are named on stderr."""
    made = {}
    for name, make in makers(width).items():
        try:
            made[name] = build(make, device, dtype)
        except ImportError as error:
            print(f"left out: {name} ({error})", file=sys.stderr)
    return made


def stepper(module: nn.Module, x: Tensor, upstream: Tensor, mode: str) -> Callable[[], Any]:
    """What runs one forward and backward pass: 'eager', 'compiled', or as a CUDA 'graph'."""
    called = torch.compile(module, dynamic=False) if mode == "compiled" else module

    def step() -> None:
        called(x).backward(upstream)
        x.grad = None
        module.zero_grad(set_to_none=True)

    if mode != "graph":
        return step
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        called(x).backward(upstream)
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


def tensors(width: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(what goes in, the gradient that comes back)."""
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    return x, torch.randn(tokens, width, device=device, dtype=dtype)


def measure(
    width: int, tokens: int, rounds: int, device: str, dtype: torch.dtype, mode: str = "eager", calls: int = 1
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round and saved bytes, by variant."""
    modules = variants(width, device, dtype)
    x, upstream = tensors(width, tokens, device, dtype)
    steps = {name: stepper(module, x, upstream, mode) for name, module in modules.items()}
    seconds = race(steps, rounds, device, calls)
    return seconds, {name: saved_bytes(lambda module=module: module(x), module) for name, module in modules.items()}


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def table(seconds: dict[str, list[float]], saved: dict[str, int]) -> dict[str, dict[str, float]]:
    return {
        name: {"ms": min(times) * 1e3, "ratio": ratio(seconds, name, "frozen layer"), "saved_mib": saved[name] / 2**20}
        for name, times in seconds.items()
    }


def show(width: int, tokens: int, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{width} wide, {tokens} tokens: x itself is {tokens * width * 4 / 2**20:.2f} MiB in fp32")
    print(f"{'':34} {'best ms':>8} {'x frozen':>9} {'saved MiB':>10}")
    for name, row in rows.items():
        print(f"{name:34} {row['ms']:8.2f} {row['ratio']:9.2f} {row['saved_mib']:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--widths", type=int, nargs="+", default=[640, 1280])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--mode", default="eager", choices=["eager", "compiled", "graph"], help="graph needs CUDA")
    parser.add_argument("--calls", type=int, default=1, help="passes a measurement: more on a GPU, to keep it busy")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    dtype = getattr(torch, arguments.dtype)
    tables = {}
    goals = {}
    for width in arguments.widths:
        given = (arguments.tokens, arguments.rounds, arguments.device, dtype, arguments.mode, arguments.calls)
        seconds, saved = measure(width, *given)
        tables[width] = table(seconds, saved)
        if not arguments.json:
            show(width, arguments.tokens, tables[width])
        if width == 1280 and arguments.tokens == 1024:
            known = {name: goal for name, goal in GOALS.items() if set(goal[0]) <= set(seconds)}
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
