"""The operator base + scale * (A ⊗ B) x: its PyTorch form, its Triton kernels under the interpreter and compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from diffusekrona_train.adapters import blocks, operator
from diffusekrona_train.adapters.blocks import Sizes
from diffusekrona_train.adapters.kron import kron_linear
from diffusekrona_train.adapters.operator import kron_add, kron_add_, kron_grads, kron_grads_, use_operator

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ORDERS = {"B first": Sizes(3, 4, 5, 2), "A first": Sizes(4, 3, 2, 5)}
TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}  # the interpreter cuts off bf16 where a GPU rounds


def example(sizes: Sizes, *tokens: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> tuple[Tensor, ...]:
    """base, x, A and B."""
    torch.manual_seed(0)
    a1, a2, b1, b2 = sizes
    shapes = (*tokens, a2 * b2), (*tokens, a1 * b1), (a2, a1), (b2, b1)
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes)


@pytest.mark.parametrize("sizes", ORDERS.values(), ids=ORDERS)
def test_the_pytorch_form_equals_torch_kron_with_its_gradients(sizes):
    assert sizes.b_first == (sizes == ORDERS["B first"])
    base, x, A, B = example(sizes, 2, 3, grad=True)
    wanted = base + 0.7 * x @ torch.kron(A, B).T
    torch.testing.assert_close(kron_add(base, x, A, B, 0.7), wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(kron_add(None, x, A, B, 0.7), wanted - base, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *all: kron_add(*all, 0.7), (base, x, A, B))
    assert torch.autograd.gradcheck(lambda *all: kron_add(None, *all, 0.7), (x, A, B))


@pytest.mark.parametrize("sizes", ORDERS.values(), ids=ORDERS)
def test_a_backward_pass_by_hand_writes_where_it_is_told(sizes):
    """Output, grad_x and a flat buffer of gradients are added to where they lie."""
    base, x, A, B = example(sizes, 6, grad=True)
    grad = torch.randn_like(base)
    wanted = torch.autograd.grad(base + 0.7 * kron_linear(x, A, B), (x, A, B), grad)
    base, x, A, B = (tensor.detach() for tensor in (base, x, A, B))
    wide = torch.zeros(6, base.shape[1] + 4, dtype=base.dtype)
    out = wide[:, 2:-2].copy_(base)
    kron_add_(out, x, A, B, 0.7)
    torch.testing.assert_close(out, base + 0.7 * kron_linear(x, A, B), rtol=0, atol=1e-13)
    assert not wide[:, :2].any() and not wide[:, -2:].any()
    grad_x = torch.ones_like(x)
    kron_add_(grad_x, grad, A.mT, B.mT, 0.7)
    torch.testing.assert_close(grad_x - 1, wanted[0], rtol=0, atol=1e-12)
    flat = torch.ones(A.numel() + B.numel(), dtype=A.dtype)
    grad_A, grad_B = flat[: A.numel()].view_as(A), flat[A.numel() :].view_as(B)
    kron_grads_(grad_A, grad_B, x, grad, A, B, 0.7, accumulate=True)
    torch.testing.assert_close((grad_A - 1, grad_B - 1), wanted[1:], rtol=0, atol=1e-12)
    kron_grads_(grad_A, grad_B, x, grad, A, B, 0.7, accumulate=False)
    torch.testing.assert_close((grad_A, grad_B), wanted[1:], rtol=0, atol=1e-12)
    torch.testing.assert_close(kron_grads(x, grad, A, B, 0.7), wanted[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", ORDERS.values(), ids=ORDERS)
def test_the_operators_are_registered_as_torch_wants_it(sizes):
    base, x, A, B = example(sizes, 6, grad=True)
    torch.library.opcheck(operator.KRON_ADD, (base, x, A, B, 0.7))
    torch.library.opcheck(operator.KRON_ADD, (None, x, A, B, 0.7))
    base, x, A, B = (tensor.detach() for tensor in (base, x, A, B))
    torch.library.opcheck(operator.KRON_GRADS, (x, base, A, B, 0.7))
    torch.library.opcheck(operator.KRON_ADD_, (base, x, A, B, 0.7))
    torch.library.opcheck(operator.KRON_GRADS_, (A.clone(), B.clone(), x, base, A, B, 0.7, True))


def test_it_compiles_without_a_graph_break_and_stays_one_operator():
    base, x, A, B = example(ORDERS["B first"], 6, grad=True)
    graphs: list[list[str]] = []

    def layer(base, x, A, B):
        y = kron_linear(x, A, B) if use_operator(x, A, B) else kron_add(base * 2, x, A, B, 0.7)
        kept = y.detach().clone()
        kron_add_(kept, x.detach(), A.detach(), B.detach(), 0.7)
        return y * kept

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch.compile(layer, backend=backend, fullgraph=True)(base, x, A, B)
    assert sum("kron_add." in target or target.endswith("kron_add") for target in graphs[0]) == 1
    assert not any("bmm" in target for target in graphs[0])
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(base, x, A, B)
    grad = torch.randn_like(base)
    wanted = torch.autograd.grad(layer(base, x, A, B), (base, x, A, B), grad)
    torch.testing.assert_close(torch.autograd.grad(compiled, (base, x, A, B), grad), wanted, rtol=0, atol=1e-12)


def test_autocast_and_mixed_types_follow_the_base():
    base, x, A, B = example(Sizes(4, 6, 10, 5), 6, dtype=torch.float32, grad=True)
    half = base.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = kron_add(half, x, A, B)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), half + x @ torch.kron(A, B).T, rtol=0.05, atol=0.1)
    y.sum().backward()
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.float32,) * 3  # type: ignore[union-attr]
    x = x.detach().bfloat16()
    assert [grad.dtype for grad in kron_grads(x, half, A.half(), B)] == [torch.float32] * 2


def test_no_tokens_are_no_fault():
    base, x, A, B = example(ORDERS["B first"], 0, grad=True)
    kron_add(base, x, A, B).sum().backward()
    assert not A.grad.any() and not B.grad.any()  # type: ignore[union-attr]


def test_what_does_not_fit_is_said():
    base, x, A, B = example(ORDERS["B first"], 6)
    with pytest.raises(ValueError, match=r"x has width 14, but A \(4, 3\) and B \(2, 5\) take 3 \* 5 = 15"):
        kron_add(base, x[:, 1:], A, B)
    with pytest.raises(ValueError, match=r"base has shape \(5, 8\), not \(6, 8\)"):
        kron_add(base[1:], x, A, B)
    with pytest.raises(ValueError, match=r"out has shape \(6, 7\), not \(6, 8\)"):
        kron_add_(base[:, 1:], x, A, B)
    with pytest.raises(
        ValueError, match=r"grad_B is \(2, 5\) torch.float32, but must be contiguous \(2, 5\) torch.float64"
    ):
        kron_grads_(A.clone(), B.float(), x, base, A, B, 1.0, True)


def test_it_is_chosen_on_cuda_in_16_bits_for_shapes_that_the_kernels_take(monkeypatch):
    base, x, A, B = example(Sizes(4, 64, 320, 20), 2, dtype=torch.bfloat16)
    assert not use_operator(x, A, B), "not on a CPU"
    cards: list[int] = []
    monkeypatch.setattr(operator, "_card_runs_triton", lambda index: cards.append(index) or True)
    with FakeTensorMode():
        for sizes, dtype, wanted in (
            (Sizes(4, 64, 320, 20), torch.bfloat16, True),
            (Sizes(64, 8, 20, 160), torch.float16, True),
            (Sizes(4, 128, 960, 30), torch.bfloat16, True),
            (Sizes(4, 64, 320, 20), torch.float32, False),
            (Sizes(4, 128, 1536, 48), torch.bfloat16, False),  # would read the gradient 12 times
            (Sizes(8, 8, 160, 160), torch.bfloat16, False),
        ):
            a1, a2, b1, b2 = sizes
            x, A, B = (torch.empty(shape, device="cuda:0") for shape in ((2, a1 * b1), (a2, a1), (b2, b1)))
            assert use_operator(x.to(dtype), A, B) == wanted, sizes
            with monkeypatch.context() as patch:
                patch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")  # off where there is no card
                patch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
                assert use_operator(x, A, B) == blocks.worthwhile(sizes)
    assert set(cards) == {0}


@pytest.mark.parametrize(
    "sizes", [Sizes(4, 64, 320, 20), Sizes(64, 8, 20, 160), Sizes(3, 7, 150, 9), Sizes(1, 1, 1, 1)]
)
@pytest.mark.parametrize("n", [1, 77, 4096, 65536])
def test_blocks_cover_every_token_and_every_column(sizes, n):
    for oriented in (sizes, sizes.transposed):
        launch = blocks.product(oriented, n)
        assert launch.grid[0] * launch.constants["TOKENS"] >= n
    oriented, launch = sizes.oriented, blocks.factor_gradients(sizes.oriented, n)
    c = launch.constants
    assert launch.grid[0] * c["INNER"] >= oriented.b1 and launch.grid[1] * c["OUTER"] >= oriented.a2
    assert launch.grid[2] * c["STEPS"] * c["TOKENS"] >= n
    assert c["P"] >= oriented.a1 and c["T"] >= oriented.b2
    assert c["TOKENS"] * c["P"] >= blocks.LEAST_DOT and c["P"] * c["COPIES"] >= blocks.LEAST_DOT
    rows = max(launch.grid[:2]) * launch.grid[2]
    total = blocks.total(sizes, rows).constants
    assert total["ROUNDS"] * total["ROWS"] >= rows


def test_without_triton_everything_is_registered_and_pytorch_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from diffusekrona_train.adapters.operator import kron_add, use_operator\n"
        "x, A, B = torch.randn(5, 12), torch.randn(2, 4), torch.randn(5, 3)\n"
        "y = torch.ops.diffusekrona.kron_add(None, x, A, B, 0.5)\n"
        "fake = torch.ops.diffusekrona.kron_add(None, x.to('meta'), A.to('meta'), B.to('meta'), 0.5)\n"
        "print((y - 0.5 * x @ torch.kron(A, B).T).abs().max().item() < 1e-5, tuple(fake.shape), use_operator(x, A, B))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.split("\n")[0] == "True (5, 10) False", done.stdout + done.stderr


@pytest.fixture(scope="module")
def interpreted() -> dict:
    command = [sys.executable, "-m", "tests.triton_interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
def test_the_kernels_equal_torch_kron_over_ragged_shapes(interpreted):
    assert len(interpreted["cases"]) == 24
    for case, errors in interpreted["cases"].items():
        tolerance = next(value for name, value in TOLERANCE.items() if f" {name} " in case)
        assert {"y", "grad_x", "grad_A", "grad_B"} <= set(errors)
        assert max(errors.values()) < tolerance, (case, errors)


@needs_triton
def test_the_comparison_was_made_with_the_kernels(interpreted):
    """Two products a case, forward and grad_x, and one call for the factors' gradients; more for the other tests."""
    assert interpreted["calls"]["add_product"] >= 48
    assert interpreted["calls"]["factor_gradients"] >= 24


@needs_triton
def test_the_kernels_write_into_slices_and_nowhere_else(interpreted):
    assert set(interpreted["in place"]) == {"A first", "B first"}
    for order, found in interpreted["in place"].items():
        assert found.pop("between is untouched") is True, order
        assert max(found.values()) < TOLERANCE["fp32"], (order, found)


@needs_triton
def test_the_factors_gradients_are_equal_bit_for_bit_whatever_was_in_scratch_memory(interpreted):
    assert interpreted["twice"] == {"A first": True, "B first": True}


@needs_triton
@pytest.mark.parametrize("arch", [86, 90])
def test_the_kernels_compile_without_a_gpu_and_spill_nothing(arch, monkeypatch):
    from scripts.bench import triton_compile

    for name, launch in triton_compile.launches((1280, 1280, 1024), "4x64").items():
        figures = triton_compile.compiled(launch, arch, "bf16", "fp32")
        assert not triton_compile.is_bad(arch, figures), (name, figures)
        assert 16 <= figures["registers"] <= 255 and figures["shared"] > 0
