"""How many kernels a training step launches, counted without a GPU: real sizes, tensors with shapes and no content.

    python -m scripts.bench.kernels [--json] [--again]

Counted is what PyTorch's dispatcher is asked for in a forward and a backward pass of batch size 1, in bf16, from the
gathering of the batch to the gradients in the flat buffer: one for each operation that is no view and allocates not
only. Attention itself is left out (one kernel forward and some backward, the same for all). `krona_operator` counts the
product with A ⊗ B as the one operator that it is on NVIDIA cards. `--again` counts a second step with the same caption,
which finds what the first one kept (see adapters.texts).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.bench.contender import Bench
from scripts.bench.trace import DENOISERS, SIDES, fused_attention
from tests.tiny import real_part

ADAPTERS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "lora": {"type": "lora", "rank": 4},
    "krona": {"a1": 4, "a2": 64},
    "krona_operator": {"a1": 4, "a2": 64},
}
KINDS = ("sdxl", "sd15", "z-image")
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "promote_types")


class Kernels(TorchDispatchMode):
    """Count operations by name."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2]
        if not (func.is_view or name.startswith(NO_KERNEL)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """Attention as one fused kernel."""
    functional = torch.nn.functional
    with mock.patch.object(functional, "scaled_dot_product_attention", fused_attention):
        yield


def kernels(kind: str, name: str, again: bool = False) -> Counter[str]:
    """Count the operations of the first step or the one `again`, by name. `kind`: of SIDES, `name`: of ADAPTERS."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            unet = real_part(kind, DENOISERS.get(kind, "unet")).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    with as_on_a_card():
        # the operator as where Triton runs
        contender = Bench(unet, SIDES[kind], 1).contender(ADAPTERS[name], lambda *_: name == "krona_operator")
        if again:
            contender.passes(*contender.objective.batches(0, 0))
        with Kernels() as counted:
            (batch,) = contender.objective.batches(int(again), 0)
            contender.passes(batch)
    return counted.found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--again", action="store_true", help="count a second step with the same caption")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="also list the N commonest operations of each")
    given = parser.parse_args()
    counts = {kind: {name: kernels(kind, name, given.again) for name in ADAPTERS} for kind in KINDS}
    totals = {kind: {name: found.total() for name, found in row.items()} for kind, row in counts.items()}
    if given.json:
        print(json.dumps(totals))
        return
    for kind, row in totals.items():
        print(kind, ", ".join(f"{name} {total:,}" for name, total in row.items()))
        for name in row if given.most else ():
            print(f"  {name}:", ", ".join(f"{op} {n}" for op, n in counts[kind][name].most_common(given.most)))


if __name__ == "__main__":
    main()
