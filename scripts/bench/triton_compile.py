"""Compile the Triton kernels for real layers and several cards, without a GPU; print registers, memory and spills.

    python -m scripts.bench.triton_compile                        # the table of docs/performance.md
    python -m scripts.bench.triton_compile --archs 86 --models sdxl --factors 8x64,64x8 --type fp16
    python -m scripts.bench.triton_compile --json

Each kernel is compiled with the blocks that it is launched with (`triton_kernels.plan_product` and
`plan_factor_gradients`); registers and spills are what triton's own `ptxas -v` says of its PTX. Exit status 1 where a
kernel spills or needs more shared memory than the card has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from diffusekrona_train.adapters.triton_kernels import (
    Launch,
    Sizes,
    plan_factor_gradients,
    plan_product,
    plan_sum,
    supported,
)

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
    if not supported(sizes):
        return {}
    oriented = sizes if sizes.b_first else sizes.transposed
    factor, grid = plan_factor_gradients(oriented, tokens)
    return {
        "forward": plan_product(sizes, tokens),
        "grad_x": plan_product(sizes.transposed, tokens),
        "grad_A, grad_B": factor,
        "their sum": plan_sum(sizes, max(grid[:2]) * grid[2]),
    }


def compiled(launch: Launch, arch: int, x_type: str, factor_type: str) -> dict[str, int]:
    """Registers, spilled bytes and shared bytes of one kernel on one card."""
    pointers = {"A": factor_type, "B": factor_type, "out": x_type, "base": x_type, "x": x_type, "grad": x_type}
    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
        elif name in pointers or name.startswith(("sums_", "grad_")) and name not in ROW_STRIDES:
            signature[name] = "*" + pointers.get(name, "fp32")
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if name in ROW_STRIDES:
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attrs)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {**assembled(kernel.asm["ptx"], arch), "shared": kernel.metadata.shared}


def assembled(ptx: str, arch: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(source), "-o", str(source.with_suffix(".o"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the PTX for {target}: {done.stderr.strip()}")
    spills = sum(int(found) for found in re.findall(r"(\d+) bytes spill", done.stderr))
    return {
        "registers": max(int(found) for found in re.findall(r"Used (\d+) registers", done.stderr)),
        "spilled": spills,
    }


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
