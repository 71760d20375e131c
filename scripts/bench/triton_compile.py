"""Compile the Triton kernels for real layers and several cards, without a GPU; print registers, memory and spills.

    python -m scripts.bench.triton_compile                        # the table of docs/performance.md
    python -m scripts.bench.triton_compile --archs 86 --models sdxl --factors 8x64,64x8 --type fp16
    python -m scripts.bench.triton_compile --json

Each kernel is compiled with the blocks that it is launched with (`adapters/blocks.py`); registers and spills are what
`ptxas -v` says when triton runs it. Exit status 1 where a kernel spills or needs more shared memory than the card has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns that it leaves the choice to the reader

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffusekrona_train.adapters import blocks
from diffusekrona_train.adapters.blocks import Launch, Sizes
from diffusekrona_train.adapters.triton_kernels import KERNELS

# (in, out, tokens) of the layers that are adapted, and the factors (a1, a2) that the project's configs use on them
LAYERS = {
    "sdxl": [(640, 640, 4096), (1280, 1280, 1024), (2048, 1280, 77), (2048, 640, 77)],
    "sd15": [(320, 320, 4096), (640, 640, 1024), (1280, 1280, 256), (768, 320, 77), (768, 640, 77), (768, 1280, 77)],
    "dit": [(3072, 3072, 4096), (3840, 3840, 4096), (6144, 6144, 4096)],
}
FACTORS = {"sdxl": "4x64,8x64,16x64,64x8", "sd15": "4x64,8x64,64x8", "dit": "4x128"}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # of one program
TYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
ROW_STRIDES = {"out_row", "base_row", "x_row", "grad_row"}
FLOATS = {"scale"}


def launches(layer: tuple[int, int, int], factors: str) -> dict[str, Launch]:
    """Name -> kernel with blocks, of a layer's forward and backward pass; empty where the kernels do not take it."""
    width_in, width_out, tokens = layer
    a1, a2 = (int(side) for side in factors.split("x"))
    if width_in % a1 or width_out % a2:
        return {}
    sizes = Sizes(a1, a2, width_in // a1, width_out // a2)
    if not blocks.supported(sizes):
        return {}
    factors_of = blocks.factor_gradients(sizes.oriented, tokens)
    return {
        "forward": blocks.product(sizes, tokens),
        "grad_x": blocks.product(sizes.transposed, tokens),
        "grad_A, grad_B": factors_of,
        "their sum": blocks.total(sizes, max(factors_of.grid[:2]) * factors_of.grid[2]),
    }


def compiled(launch: Launch, arch: int, x_type: str, factor_type: str) -> dict[str, int]:
    """Registers, spilled bytes and shared bytes of one kernel on one card."""
    pointers = {"A": factor_type, "B": factor_type, "out": x_type, "base": x_type, "x": x_type, "grad": x_type}
    kernel, signature, constants, attrs = KERNELS[launch.kernel], {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
        elif name in pointers or name.startswith(("sums_", "grad_")) and name not in ROW_STRIDES:
            signature[name] = "*" + pointers.get(name, "fp32")
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if name in ROW_STRIDES:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True  # printed by triton itself, so of the very command that it runs
        triton.knobs.compilation.always_compile = True  # a kernel from the cache has no log
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    spilled = sum(int(found) for found in re.findall(r"(\d+) bytes spill", log.getvalue()))
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log.getvalue())]
    if not registers:
        raise RuntimeError(f"ptxas -v reported no registers: {log.getvalue().strip() or 'no output'}")
    return {"registers": max(registers), "spilled": spilled, "shared": done.metadata.shared}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(map(str, SHARED_KIB)), help="compute capabilities, such as 80,120")
    parser.add_argument("--models", default=",".join(LAYERS), help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--factors", help="a1xa2, separated by commas; default: a list for each model")
    parser.add_argument("--type", default="bf16", choices=TYPES, help="of the layer's input")
    parser.add_argument("--factor-type", default="fp32", choices=TYPES)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of the table")
    arguments = parser.parse_args()
    archs, bad = [int(arch) for arch in arguments.archs.split(",")], 0
    if not arguments.json:
        print(f"triton {triton.__version__}, x {arguments.type}, factors {arguments.factor_type}")
        print("registers a thread / shared KiB a program, and what is spilled\n")
        print("| layer | factors | kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |")
        print("|---" * (3 + len(archs)) + "|")
    for model in arguments.models.split(","):
        for layer in LAYERS[model]:
            for factors in (arguments.factors or FACTORS[model]).split(","):
                for name, launch in launches(layer, factors).items():
                    found = {arch: compiled(launch, arch, arguments.type, arguments.factor_type) for arch in archs}
                    bad += sum(is_bad(arch, figures) for arch, figures in found.items())
                    report(arguments.json, (model, layer, factors, name), found)
    return 1 if bad else 0


def is_bad(arch: int, figures: dict[str, int]) -> bool:
    return figures["spilled"] > 0 or figures["shared"] > SHARED_KIB[arch] * 1024


def report(as_json: bool, row: tuple, found: dict[int, dict[str, int]]) -> None:
    model, (width_in, width_out, tokens), factors, kernel = row
    if as_json:
        print(json.dumps({"model": model, "in": width_in, "out": width_out, "tokens": tokens, "factors": factors,
                          "kernel": kernel, "archs": found}), flush=True)  # fmt: skip
        return
    cells = [
        f"{f['registers']} / {f['shared'] / 1024:.0f}" + (f" **spills {f['spilled']} bytes**" if f["spilled"] else "")
        for f in found.values()
    ]
    layer = f"{width_in} -> {width_out} x {tokens}"
    print(f"| {layer} | {factors.replace('x', ', ')} | {kernel} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
