"""Register base + scale * (A ⊗ B) x with torch as an operator: Triton kernels where they run, else PyTorch.

Four operators under `torch.ops.diffusekrona`, all with a fake implementation, so that `torch.compile` goes through them
without a graph break, also where triton is not installed:

- `kron_add(base?, x, A, B, scale) -> y` has autograd: gradients of base, x, A and B.
- `kron_grads(x, grad, A, B, scale) -> (grad_A, grad_B)`, both in fp32 at least.
- `kron_add_(out!, x, A, B, scale)` and `kron_grads_(grad_A!, grad_B!, x, grad, A, B, scale, accumulate)` write into
  what they are given and have no autograd. They are for a backward pass written by hand: the base product's output, its
  gradient with regard to x and a flat gradient buffer are added to where they lie, with no copy in between:

      y = base(x);             kron_add_(y, x, A, B, scale)
      grad_x = grad @ weight;  kron_add_(grad_x, grad, A.mT, B.mT, scale)
      kron_grads_(flat_A, flat_B, x, grad, A, B, scale, accumulate=True)

None of them synchronises or allocates by content, so all can be captured in a CUDA graph; run each shape once before,
as Triton compiles then. `use_operator` says where they are expected to be faster than `kron_linear`, which stays the
plain function and the reference. Shapes and types that the kernels do not take run in PyTorch, with the same result up
to rounding.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from diffusekrona_train.adapters import blocks
from diffusekrona_train.adapters.blocks import Sizes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then the kernels run on a CPU, slowly, as tests want it
KERNEL_TYPES = (torch.bfloat16, torch.float16)  # compiled for fp32 they spill; PyTorch's products are better there
LEAST_CAPABILITY = (8, 0)


def kron_add(base: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return base + scale * (A ⊗ B) x, with gradients of all four tensors.

    base (..., a2*b2) or None for zero, x (..., a1*b1), A (a2, a1), B (b2, b1). Products run in base's type (without a
    base: in x's), under autocast too, and sum in fp32; the result has that type. The factors may have any float type.
    The backward pass keeps x and the factors. Second derivatives are not supported; `kron_linear` has them.

    Raises ValueError where a shape does not fit.
    """
    _check_x(x, A, B)
    if base is None:
        return _without_autocast(KRON_ADD, x, base, x, A, B, scale)
    _check_like("base", base, x, A.shape[0] * B.shape[0])
    return _without_autocast(KRON_ADD, x, base, x.to(base.dtype), A, B, scale)


def kron_add_(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> None:
    """Add scale * (A ⊗ B) x to `out` (..., a2*b2) in place; no autograd. Products run in the type of `out`.

    `out` must have unit stride in its last dimension and be viewable as rows: a contiguous tensor, or a slice of the
    last dimension of one. Raises ValueError where a shape does not fit.
    """
    _check_x(x, A, B)
    _check_like("out", out, x, A.shape[0] * B.shape[0])
    _without_autocast(KRON_ADD_, x, out, x.to(out.dtype), A, B, scale)


def kron_grads(x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the gradients of A (a2, a1) and B (b2, b1) in fp32 (fp64 for fp64 factors), from grad (..., a2*b2).

    Raises ValueError where a shape does not fit.
    """
    _check_x(x, A, B)
    _check_like("grad", grad, x, A.shape[0] * B.shape[0])
    return _without_autocast(KRON_GRADS, x, x, grad.to(x.dtype), A, B, scale)


def kron_grads_(
    grad_A: Tensor, grad_B: Tensor, x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scale: float, accumulate: bool
) -> None:
    """Write the gradients of both factors into contiguous fp32 buffers of their shapes, or add them; no autograd.

    Raises ValueError where a shape, a buffer's type or its layout does not fit.
    """
    _check_x(x, A, B)
    _check_like("grad", grad, x, A.shape[0] * B.shape[0])
    for name, buffer, factor in (("grad_A", grad_A, A), ("grad_B", grad_B, B)):
        if buffer.shape != factor.shape or buffer.dtype != _grad_type(factor) or not buffer.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(buffer.shape)} {buffer.dtype}, but must be contiguous {tuple(factor.shape)} "
                f"{_grad_type(factor)}"
            )
    _without_autocast(KRON_GRADS_, x, grad_A, grad_B, x, grad.to(x.dtype), A, B, scale, accumulate)


def use_operator(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Return whether the operator should be taken instead of `kron_linear`: on CUDA, in 16 bits, where it pays.

    True for an NVIDIA card since Ampere with a working triton, x in bf16 or fp16 (or autocast to it), and factors that
    the kernels take without reading their input again and again (`blocks.worthwhile`: all factors of the configs up to
    a width of 3840). An estimate from bytes and launches; not measured on a GPU yet. Depends on devices, types and
    shapes alone, so `torch.compile` sees a constant.
    """
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return x.is_cuda and dtype in KERNEL_TYPES and blocks.worthwhile(_sizes(A, B)) and _card_runs(x.device.index)


def _without_autocast(operator, like: Tensor, *arguments):
    """Inside, types are already right: autocast would only change those of the plain products behind the operator."""
    if like.is_meta or not torch.is_autocast_enabled(like.device.type):  # meta knows no autocast
        return operator(*arguments)
    with torch.autocast(like.device.type, enabled=False):
        return operator(*arguments)


def _check_x(x: Tensor, A: Tensor, B: Tensor) -> None:
    a1, b1 = A.shape[1], B.shape[1]
    if x.shape[-1] != a1 * b1:
        raise ValueError(
            f"x has width {x.shape[-1]}, but A {tuple(A.shape)} and B {tuple(B.shape)} take {a1} * {b1} = {a1 * b1}"
        )


def _check_like(name: str, tensor: Tensor, x: Tensor, width: int) -> None:
    wanted = (*x.shape[:-1], width)
    if tensor.shape != wanted:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted)}")


def _sizes(A: Tensor, B: Tensor) -> Sizes:
    return Sizes(A.shape[1], A.shape[0], B.shape[1], B.shape[0])


def _grad_type(factor: Tensor) -> torch.dtype:
    return torch.promote_types(factor.dtype, torch.float32)


# --- where the kernels run ---------------------------------------------------------------------------------------


def _on_kernels(x: Tensor, A: Tensor, B: Tensor) -> bool:
    if not blocks.supported(_sizes(A, B)) or A.dtype == torch.float64 or B.dtype == torch.float64:
        return False
    if INTERPRETED:
        return x.dtype in (*KERNEL_TYPES, torch.float32) and importlib.util.find_spec("triton") is not None
    return x.is_cuda and x.dtype in KERNEL_TYPES and _card_runs(x.device.index)


@torch.compiler.assume_constant_result
def _card_runs(index: int | None) -> bool:
    return _card_runs_triton(torch.cuda.current_device() if index is None else index)


@functools.cache
def _card_runs_triton(index: int) -> bool:
    """Return whether a kernel compiles and runs on this GPU: Triton also needs a C compiler and Python's headers."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(index) < LEAST_CAPABILITY:
        return False
    from diffusekrona_train.adapters import triton_kernels

    x = torch.ones(1, 4, dtype=torch.bfloat16, device=f"cuda:{index}")
    factor = torch.ones(2, 2, device=x.device)
    try:
        triton_kernels.add_product(torch.empty_like(x), None, x, factor, factor, 1.0)
    except Exception as fault:  # a missing compiler, a driver that is too old: whatever it is, PyTorch's products run
        line = str(fault).strip().splitlines() or [""]
        warnings.warn(f"Triton does not work on cuda:{index}, PyTorch is used: {type(fault).__name__}: {line[0]}")  # noqa: B028
        return False
    return True


# --- the implementations -----------------------------------------------------------------------------------------


def _add(base: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    width = A.shape[0] * B.shape[0]
    tokens, before = _rows(x), None if base is None else _rows(base)
    if _on_kernels(x, A, B):
        from diffusekrona_train.adapters import triton_kernels

        y = x.new_empty(len(tokens), width)
        triton_kernels.add_product(y, before, tokens, A, B, scale)
    else:
        y = _add_in_torch(before, tokens, A, B, scale)
    return y.view(*x.shape[:-1], width)


def _add_(out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    rows, tokens = out.view(-1, out.shape[-1]), _rows(x)
    if not _on_kernels(x, A, B):
        rows.copy_(_add_in_torch(rows, tokens, A, B, scale))
        return
    if rows.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}, but must have stride 1 in its last dimension")
    from diffusekrona_train.adapters import triton_kernels

    triton_kernels.add_product(rows, rows, tokens, A, B, scale)


def _grads(x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    grad_A, grad_B = (torch.empty(factor.shape, dtype=_grad_type(factor), device=factor.device) for factor in (A, B))
    _grads_(grad_A, grad_B, x, grad, A, B, scale, False)
    return grad_A, grad_B


def _grads_(
    grad_A: Tensor, grad_B: Tensor, x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scale: float, accumulate: bool
) -> None:
    if _on_kernels(x, A, B):
        from diffusekrona_train.adapters import triton_kernels

        triton_kernels.factor_gradients(grad_A, grad_B, _rows(x), _rows(grad), A, B, scale, accumulate)
        return
    for buffer, value in zip((grad_A, grad_B), _grads_in_torch(_rows(x), _rows(grad), A, B), strict=True):
        if accumulate:
            buffer.add_(value, alpha=scale)
        else:
            buffer.copy_(value).mul_(scale)


def _rows(tensor: Tensor) -> Tensor:
    """Reshape (..., width) to (n, width) with unit stride along each row; a copy only where there is no such view."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _add_in_torch(base: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Compute the same in two products, the second added into the base; x (n, a1*b1) -> (n, a2*b2)."""
    (a1, a2, b1, b2), n = _sizes(A, B), len(x)
    left, right = A.to(x.dtype).expand(n, -1, -1), B.to(x.dtype).mT
    beta = 0 if base is None else 1  # with 0 the first argument is not read
    if _sizes(A, B).b_first:
        z = torch.mm(x.reshape(n * a1, b1), right).view(n, a1, b2)
        before = x.new_empty(1, 1, 1) if base is None else base.reshape(n, a2, b2)
        y = torch.baddbmm(before, left, z, beta=beta, alpha=scale)
    else:
        w = torch.bmm(left, x.reshape(n, a1, b1)).view(n * a2, b1)
        before = x.new_empty(1, 1) if base is None else base.reshape(n * a2, b2)
        y = torch.addmm(before, w, right, beta=beta, alpha=scale)
    return y.reshape(n, a2 * b2)


def _grads_in_torch(x: Tensor, grad: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gradients of both factors in the type of x; x (n, a1*b1), grad (n, a2*b2)."""
    (a1, a2, b1, b2), n = _sizes(A, B), len(x)
    A, B = A.to(x.dtype).expand(n, -1, -1), B.to(x.dtype)
    x, grad = x.reshape(n, a1, b1), grad.reshape(n, a2, b2)
    if Sizes(a1, a2, b1, b2).b_first:
        z = torch.mm(x.reshape(n * a1, b1), B.mT).view(n, a1, b2)
        grad_z = torch.bmm(A.mT, grad)
        return torch.einsum("nat,npt->ap", grad, z), torch.mm(grad_z.view(n * a1, b2).mT, x.reshape(n * a1, b1))
    w = torch.bmm(A, x)
    grad_w = torch.mm(grad.reshape(n * a2, b2), B).view(n, a2, b1)
    return torch.einsum("nat,npt->ap", grad_w, x), torch.mm(grad.reshape(n * a2, b2).mT, w.view(n * a2, b1))


# --- registration ------------------------------------------------------------------------------------------------


def _keep(ctx, inputs, output) -> None:
    _, x, A, B, ctx.scale = inputs
    ctx.save_for_backward(x, A, B)


def _backward(ctx, grad: Tensor):
    x, A, B = ctx.saved_tensors
    needs_base, needs_x, needs_A, needs_B, _ = ctx.needs_input_grad
    grad_x = KRON_ADD(None, grad, A.mT, B.mT, ctx.scale) if needs_x else None
    grad_A = grad_B = None
    if needs_A or needs_B:
        grad_A, grad_B = KRON_GRADS(x, grad, A, B, ctx.scale)
        grad_A, grad_B = grad_A.to(A.dtype), grad_B.to(B.dtype)
    return grad if needs_base else None, grad_x, grad_A, grad_B, None


LIBRARY = torch.library.Library("diffusekrona", "DEF")  # not a `custom_op`: that adds its own Python to each call
_PRODUCT = "Tensor x, Tensor A, Tensor B, float scale"
_GRADS = "Tensor x, Tensor grad, Tensor A, Tensor B, float scale"
OPERATORS = {
    f"kron_add(Tensor? base, {_PRODUCT}) -> Tensor": (
        _add,
        lambda base, x, A, B, scale: x.new_empty(*x.shape[:-1], A.shape[0] * B.shape[0]),
    ),
    f"kron_add_(Tensor(a!) out, {_PRODUCT}) -> ()": (_add_, lambda *arguments: None),
    f"kron_grads({_GRADS}) -> (Tensor, Tensor)": (
        _grads,
        lambda x, grad, A, B, scale: tuple(torch.empty_like(f, dtype=_grad_type(f)).contiguous() for f in (A, B)),
    ),
    f"kron_grads_(Tensor(a!) grad_A, Tensor(b!) grad_B, {_GRADS}, bool accumulate) -> ()": (
        _grads_,
        lambda *arguments: None,
    ),
}
for schema, (implementation, fake) in OPERATORS.items():
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"diffusekrona::{name}", fake, lib=LIBRARY)
torch.library.register_autograd("diffusekrona::kron_add", _backward, setup_context=_keep, lib=LIBRARY)

KRON_ADD = torch.ops.diffusekrona.kron_add.default
KRON_ADD_ = torch.ops.diffusekrona.kron_add_.default
KRON_GRADS = torch.ops.diffusekrona.kron_grads.default
KRON_GRADS_ = torch.ops.diffusekrona.kron_grads_.default
