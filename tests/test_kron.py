"""kron.py against torch.kron and autograd, over random shapes, types and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusekrona_train.adapters.kron import (
    kron_delta,
    kron_linear,
    kron_macs,
    lora_truncate,
)
from diffusekrona_train.adapters.spectra import lora_pair

width = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13])
shapes = st.tuples(width, width, width, width)
leading = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# a1, a2, b1, b2: the paper's, its transpose, columns and rows, primes, cheap order with the larger intermediate
SHAPES = [(4, 8, 6, 3), (8, 4, 3, 6), (1, 5, 7, 1), (6, 1, 1, 4), (3, 5, 7, 11), (8, 1, 13, 8), (1, 1, 1, 1)]


def draw(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(a1: int, a2: int, b1: int, b2: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(1, a2, a1, dtype=dtype), draw(2, b2, b1, dtype=dtype)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, lead=leading, dtype=st.sampled_from(list(TOLERANCE)))
def test_equals_torch_kron(shape, lead, dtype):
    A, B = factors(*shape)
    x = draw(3, *lead, shape[0] * shape[2]).to(dtype)
    y = kron_linear(x, A.to(dtype), B.to(dtype))
    expected = x.double() @ torch.kron(A.to(dtype).double(), B.to(dtype).double()).T
    assert y.dtype == dtype and y.shape == (*lead, shape[1] * shape[3])
    assert y.numel() == 0 or relative(y, expected) < TOLERANCE[dtype]


@settings(max_examples=30, deadline=None)
@given(shape=shapes, tokens=st.integers(0, 5))
def test_gradients_equal_those_of_the_dense_product(shape, tokens):
    inputs = [draw(3, tokens, 2, shape[0] * shape[2]), *factors(*shape)]
    upstream = draw(4, tokens, 2, shape[1] * shape[3])
    mine = [tensor.clone().requires_grad_() for tensor in inputs]
    dense = [tensor.clone().requires_grad_() for tensor in inputs]
    kron_linear(*mine).backward(upstream)
    (dense[0] @ torch.kron(dense[1], dense[2]).T).backward(upstream)
    for a, b in zip(mine, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_first_and_second_order(shape):
    inputs = [tensor.requires_grad_() for tensor in (draw(3, 2, shape[0] * shape[2]), *factors(*shape))]
    assert torch.autograd.gradcheck(kron_linear, inputs)
    assert torch.autograd.gradgradcheck(kron_linear, inputs)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients_with_some_inputs_frozen(shape, frozen):
    inputs = [
        tensor.requires_grad_(i not in frozen)
        for i, tensor in enumerate((draw(3, 2, shape[0] * shape[2]), *factors(*shape)))
    ]
    assert torch.autograd.gradcheck(kron_linear, inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_non_contiguous_inputs(shape):
    a1, a2, b1, b2 = shape
    x, A, B = draw(3, a1 * b1, 5).T, draw(1, a1, a2).T, draw(2, b2, 2 * b1)[:, ::2]
    expected = x @ torch.kron(A.clone(memory_format=torch.contiguous_format), B.contiguous()).T
    torch.testing.assert_close(kron_linear(x, A, B), expected)
    torch.testing.assert_close(kron_delta(A, B) @ x.T, expected.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_keeps_x_and_the_factors_alone(shape):
    a1, _, b1, _ = shape
    A, B = (tensor.requires_grad_() for tensor in factors(*shape))
    x = draw(3, 32, a1 * b1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        kron_linear(x, A, B)
    own = {A.data_ptr(), B.data_ptr(), x.data_ptr()}
    assert {tensor.data_ptr() for tensor in saved} <= own


@pytest.mark.parametrize("shape", SHAPES)
def test_no_dense_matrix_and_the_order_with_fewer_multiplications(shape):
    a1, a2, b1, b2 = shape
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        kron_linear(draw(3, 10, a1 * b1), *factors(*shape))
    assert counter.get_total_flops() == 2 * 10 * min(kron_macs(a1, a2, b1, b2))


def test_counted_multiplications_of_the_design():
    assert kron_macs(4, 64, 320, 20) == (30_720, 491_520)
    assert kron_macs(64, 4, 20, 320) == (491_520, 30_720)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    A, B = (tensor.requires_grad_() for tensor in factors(4, 8, 6, 3, torch.float32))
    x = draw(3, 5, 24, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = kron_linear(x, A, B)
        reference = torch.nn.functional.linear(x, torch.kron(A.detach(), B.detach()))
    assert y.dtype == reference.dtype == dtype
    assert relative(y.detach(), reference.detach()) < 2e-2
    y.float().sum().backward()
    assert A.grad is not None and A.grad.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.float32
    double = draw(3, 5, 24)
    with torch.autocast("cpu", dtype=dtype):
        assert kron_linear(double, A, B).dtype == torch.float64


def test_factors_in_fp32_take_the_type_of_x_and_get_fp32_gradients():
    A, B = (tensor.requires_grad_() for tensor in factors(4, 8, 6, 3, torch.float32))
    y = kron_linear(draw(3, 5, 24, dtype=torch.bfloat16), A, B)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and A.grad.dtype == B.grad.dtype == torch.float32


def test_compiles_to_one_graph_with_the_same_gradients():
    x, A, B = draw(3, 5, 24), *factors(4, 8, 6, 3)
    compiled = torch.compile(kron_linear, backend="aot_eager", fullgraph=True)
    results = []
    for function in (kron_linear, compiled):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
        function(*inputs).square().sum().backward()
        results.append([tensor.grad for tensor in inputs])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"x has width 23.*4 \* 6 = 24"):
        kron_linear(draw(3, 23), *factors(4, 8, 6, 3))


@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_the_lora_pair_is_exact_and_of_least_width(shape):
    A, B = factors(*shape)
    pair = lora_pair({"lokr_w1": A, "lokr_w2": B})
    assert pair is not None
    up, down = pair
    torch.testing.assert_close(up @ down, torch.kron(A, B))
    assert up.shape[1] == down.shape[0] == min(A.shape) * min(B.shape)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, share=st.floats(0, 1))
def test_truncation_is_the_dense_optimum(shape, share):
    A, B = factors(*shape)
    dense = torch.kron(A, B)
    rank = max(1, round(share * min(A.shape) * min(B.shape)))
    up, down, error = lora_truncate(A, B, rank)
    best = math.sqrt(float(torch.linalg.svdvals(dense)[rank:].square().sum()))
    assert up.shape == (dense.shape[0], rank) and down.shape == (rank, dense.shape[1])
    assert error == pytest.approx(best, abs=1e-9)
    assert float((dense - up @ down).norm()) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("rank", [0, 13])
def test_truncation_refuses_an_impossible_rank(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and 12"):
        lora_truncate(*factors(4, 8, 6, 3), rank)
