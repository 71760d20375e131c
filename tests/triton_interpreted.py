"""Run the Triton kernels under Triton's interpreter and print how far they are from torch.kron, as JSON.

    TRITON_INTERPRET=1 python -m tests.triton_interpreted

A process of its own, since the switch counts when the kernels are defined. `test_triton.py` judges what is printed.
"""

from __future__ import annotations

import json

import torch
import triton
from torch import Tensor

from diffusekrona_train.adapters import operator, triton_kernels
from diffusekrona_train.adapters.blocks import Sizes

SHAPES = {
    "B first": [Sizes(1, 8, 20, 3), Sizes(3, 7, 150, 9), Sizes(6, 20, 30, 9), Sizes(4, 70, 9, 5)],
    "A first": [Sizes(20, 6, 9, 30), Sizes(70, 4, 5, 90)],
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CALLS = {"add_product": 0, "factor_gradients": 0}


def count(name: str) -> None:
    """Have each use of a kernel counted: a silent fall back to PyTorch would pass any comparison."""
    kernel = getattr(triton_kernels, name)

    def counted(*arguments) -> None:
        CALLS[name] += 1
        kernel(*arguments)

    setattr(triton_kernels, name, counted)


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def example(sizes: Sizes, n: int, dtype: torch.dtype, factor_type: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(n + sizes.a1)
    a1, a2, b1, b2 = sizes
    tensors = {"base": torch.randn(n, a2 * b2), "x": torch.randn(n, a1 * b1), "grad": torch.randn(n, a2 * b2)}
    factors = {"A": torch.randn(a2, a1), "B": torch.randn(b2, b1)}
    return {k: v.to(dtype) for k, v in tensors.items()} | {k: v.to(factor_type) for k, v in factors.items()}


def exact(made: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The result and all gradients by autograd through torch.kron in fp64, from the same rounded numbers."""
    base, x, A, B = (made[name].double().requires_grad_() for name in ("base", "x", "A", "B"))
    y = base + scale * x @ torch.kron(A, B).T
    gradients = torch.autograd.grad(y, (base, x, A, B), made["grad"].double())
    return {"y": y.detach(), **dict(zip(("base", "x", "A", "B"), gradients, strict=True))}


def against_kron(
    sizes: Sizes, n: int, dtype: torch.dtype, factor_type: torch.dtype, with_base: bool
) -> dict[str, float]:
    """Relative distances of y and of all gradients."""
    made = example(sizes, n, dtype, factor_type)
    wanted = exact(made, 0.7)
    ours = {name: made[name].clone().requires_grad_() for name in ("base", "x", "A", "B")}
    y = operator.kron_add(ours["base"] if with_base else None, ours["x"], ours["A"], ours["B"], 0.7)
    y.backward(made["grad"])
    names = ("base", "x", "A", "B") if with_base else ("x", "A", "B")
    errors = {f"grad_{name}": distance(ours[name].grad, wanted[name]) for name in names}  # type: ignore[arg-type]
    return {"y": distance(y.detach(), wanted["y"] - (0 if with_base else made["base"].double())), **errors}


def in_place(sizes: Sizes, n: int) -> dict[str, float | bool]:
    """Output and gradient buffers are slices of larger tensors full of ones: what lies between must stay one."""
    made = example(sizes, n, torch.float32, torch.float32)
    made["base"] = torch.ones_like(made["base"])
    wanted, width = exact(made, 0.7), sizes.a2 * sizes.b2
    wide = torch.ones(n, width + 24)
    out = wide[:, 8 : 8 + width]
    operator.kron_add_(out, made["x"], made["A"], made["B"], 0.7)
    parts = torch.ones(10 + made["A"].numel() + made["B"].numel()).split(
        (3, made["A"].numel(), 5, made["B"].numel(), 2)
    )
    grad_A, grad_B = parts[1].view_as(made["A"]), parts[3].view_as(made["B"])
    x = torch.zeros(n, made["x"].shape[1] + 16)[:, 16:].copy_(made["x"])  # rows with a stride of their own
    arguments = (x, made["grad"], made["A"], made["B"], 0.7)
    operator.kron_grads_(grad_A, grad_B, *arguments, accumulate=True)
    added = {"A added": distance(grad_A, wanted["A"] + 1), "B added": distance(grad_B, wanted["B"] + 1)}
    operator.kron_grads_(grad_A, grad_B, *arguments, accumulate=False)
    written = {"A written": distance(grad_A, wanted["A"]), "B written": distance(grad_B, wanted["B"])}
    between = (wide[:, :8], wide[:, 8 + width :], *parts[::2])
    untouched = all(bool((part == 1).all()) for part in between)
    return {"y": distance(out, wanted["y"]), **added, **written, "between is untouched": untouched}


def twice(sizes: Sizes, n: int) -> bool:
    """Equal bits in two runs, with all scratch memory full of NaN: nothing is read that was not written before."""
    made = example(sizes, n, torch.bfloat16, torch.float32)
    plain_empty, results = torch.empty, []
    for fill in (float("nan"), 1e30):
        torch.empty = lambda *size, fill=fill, **options: plain_empty(*size, **options).fill_(fill)  # type: ignore[assignment]
        results.append(operator.kron_grads(made["x"], made["grad"], made["A"], made["B"], 0.7))
    torch.empty = plain_empty
    return all(torch.equal(one, other) and bool(one.isfinite().all()) for one, other in zip(*results, strict=True))


def main() -> None:
    for name in CALLS:
        count(name)
    report: dict[str, object] = {"triton": triton.__version__, "cases": {}, "in place": {}, "twice": {}}
    for order, shapes in SHAPES.items():
        assert all(sizes.b_first == (order == "B first") for sizes in shapes)
        for i, sizes in enumerate(shapes):
            for j, n in enumerate((1, 2, 77, 100)):  # each count of tokens meets each type, and each type both factors'
                name = list(TYPES)[(i + j) % 3]
                factor_type = torch.float32 if j % 2 else TYPES[name]
                errors = against_kron(sizes, n, TYPES[name], factor_type, with_base=(i + j) % 4 > 0)
                report["cases"][f"{order} {tuple(sizes)} {n} {name} {factor_type}"] = errors  # type: ignore[index]
        report["in place"][order] = in_place(shapes[-1], 77)  # type: ignore[index]
        report["twice"][order] = twice(shapes[-1], 40)  # type: ignore[index]
    report["calls"] = CALLS
    print(json.dumps(report))


if __name__ == "__main__":
    main()
