"""Pipelines of real size with random weights, to measure speed and memory where no checkpoint is at hand.

    python -m tests.tiny --size sdxl models/random-sdxl          # 7 GB in fp16
    python -m tests.tiny --size small models/small               # some MB, for a CPU

The folder is one that `krona-train` (`model: models/random-sdxl`) and diffusers' `from_pretrained` read. Configs are
those of the published models, the tokenizers CLIP's own; the small ones have the same blocks, a few channels and a few
words. Speed and memory do not depend on the values of weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.tiny import make_pipeline, make_real_pipeline

REAL = ("sdxl", "sd15", "sd21")
SMALL = {"small": "sdxl", "small-sdxl": "sdxl", "small-sd15": "sd15", "small-sd21": "sd21"}
SMALL_WIDTH = 64
"""Channels of the first block: the narrowest that the factors (4, 64) of SDXL's configs fit."""


def make(size: str, folder: Path, dtype: str = "float16", seed: int = 0, device: str = "cpu") -> Path:
    """Writes a pipeline of `size` to `folder`; small ones are fp32 whatever the dtype."""
    if size in SMALL:
        return make_pipeline(SMALL[size], folder, seed=seed, width=SMALL_WIDTH)
    return make_real_pipeline(size, folder, dtype=dtype, seed=seed, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--size", required=True, choices=[*REAL, *SMALL])
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn: cuda is faster")
    given = parser.parse_args()
    if given.folder.exists() and any(given.folder.iterdir()):
        sys.exit(f"error: {given.folder} is not empty; name a new folder")
    began = time.perf_counter()
    make(given.size, given.folder, given.dtype, given.seed, given.device)
    size = sum(file.stat().st_size for file in given.folder.rglob("*") if file.is_file())
    print(f"{given.folder}: {given.size}, {size / 2**30:.2f} GiB, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
