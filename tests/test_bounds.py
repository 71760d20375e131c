"""The cap on ΔW's norm against dense singular values of torch.kron, on tiny models, NF4 too."""

from __future__ import annotations

import pytest
import torch

from diffusekrona_train.adapters import KronA
from diffusekrona_train.adapters.bounds import NormCap, sigma_bound, sigma_of
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig, make_config
from tests.tiny import make_unet

GENERATOR = torch.Generator().manual_seed(0)


def sigma(matrix) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), ord=2))


@pytest.mark.parametrize("side", [1, 4, 20, 80])
@pytest.mark.parametrize("kind", ["random", "sign", "rank one", "orthogonal", "tiny", "huge"])
def test_the_bound_is_above_the_largest_singular_value_and_near_it(side, kind):
    matrix = torch.randn(3, side, 96, generator=GENERATOR)
    if kind == "sign":
        matrix = matrix.sign()
    elif kind == "rank one":
        matrix = matrix[:, :, :1] * matrix[:, :1]
    elif kind == "orthogonal":  # all singular values equal: the worst case
        matrix = torch.linalg.qr(matrix.mT).Q.mT
    matrix = matrix * {"tiny": 1e-12, "huge": 1e12}.get(kind, 1.0)
    bound = sigma_bound(matrix @ matrix.mT)
    for found, one in zip(bound.tolist(), matrix, strict=True):
        assert sigma(one) * (1 - 1e-5) <= found <= sigma(one) * side ** (1 / 128) * (1 + 1e-5)


def test_the_bound_of_nothing_is_finite_and_tiny():
    assert 0 < sigma_bound(torch.zeros(2, 5, 5)).max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_sigma_of_a_layer(dtype, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 160, bias=bias).to(dtype)
    assert sigma_of(linear, 96) == pytest.approx(sigma(linear.weight.detach()), rel=0.02)
    conv = torch.nn.Conv2d(32, 48, 1, bias=bias).to(dtype)
    assert sigma_of(conv, 32) == pytest.approx(sigma(conv.weight.detach().flatten(1)), rel=0.02)
    linear.weight.data.zero_()
    assert sigma_of(linear, 96) == 0.0


def test_sigma_of_a_quantised_layer_is_that_of_what_it_computes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = torch.nn.Linear(128, 192)
    packed = bitsandbytes.nn.Linear4bit(128, 192, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(linear.state_dict())
    packed.to("cpu")
    with torch.no_grad():
        dense = packed(torch.eye(128)) - packed.bias
    assert packed.weight.dtype == torch.uint8 and sigma_of(packed, 128) == pytest.approx(sigma(dense), rel=0.01)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_after_the_cap_no_delta_is_larger_and_those_below_it_are_untouched(scale):
    injection = inject(make_unet("sd15"), AdapterConfig(a1=4, a2=8, scale=scale, norm_cap=0.3))
    flat, sigmas = injection.flatten(), injection.base_sigmas()
    adapters = {name: adapter for name, adapter in injection.adapters.items() if isinstance(adapter, KronA)}
    for number, adapter in enumerate(adapters.values()):
        adapter.B.data.normal_(0, 10.0 ** (number % 5 - 3), generator=GENERATOR)
    before = {name: value.clone() for name, value in injection.state_dict().items()}
    sizes = {name: sigma(torch.kron(a.A.detach(), a.B.detach())) * abs(scale) for name, a in adapters.items()}
    cap = NormCap(flat, sigmas, 0.3)
    cap.apply()
    shortened = 0
    for name, adapter in adapters.items():
        weight = injection.model.get_parameter(f"{name}.base.weight").detach()
        assert 0.95 * sigma(weight) < sigmas[name] < 1.001 * sigma(weight)
        limit, now = 0.3 * sigmas[name], sigma(torch.kron(adapter.A.detach(), adapter.B.detach())) * abs(scale)
        assert torch.equal(adapter.A, before[f"{name}|A"]) and now <= limit * (1 + 2e-5)
        if sizes[name] < 0.95 * limit:
            assert torch.equal(adapter.B, before[f"{name}|B"])
        elif sizes[name] > limit:
            shortened += 1
            assert now > 0.95 * limit
            factor = adapter.B.detach().norm() / before[f"{name}|B"].norm()
            torch.testing.assert_close(adapter.B.detach(), before[f"{name}|B"] * factor, rtol=1e-5, atol=1e-7)
    assert 0 < shortened < len(sizes)
    once = flat.master.detach().clone()
    cap.apply()  # a step that is skipped changes nothing
    assert torch.equal(once, flat.master.detach())


def test_a_layer_whose_weights_are_zero_is_left_alone():
    injection = inject(make_unet("sd15"), AdapterConfig(a1=4, a2=8))
    flat = injection.flatten()
    flat.master.data.normal_(generator=GENERATOR)
    before = flat.master.detach().clone()
    NormCap(flat, dict.fromkeys(injection.adapters, 0.0), 0.3).apply()
    assert torch.equal(before, flat.master.detach())


@pytest.mark.parametrize(
    ("adapter", "line"),
    [
        ({"type": "lora", "norm_cap": 0.3}, "norm_cap is for type: krona, and type is lora"),
        ({"norm_cap": 0.0}, "adapter.norm_cap: 0.0 should be greater than 0"),
        ({"norm_cap": 0.3, "scale": 0.0}, "adapter.norm_cap bounds nothing, since adapter.scale is 0"),
    ],
)
def test_a_cap_that_cannot_be_is_one_line(adapter, line):
    with pytest.raises(ValueError, match=line):
        make_config({"subject": {"images": "x", "class": "dog"}, "output": "runs/x", "adapter": adapter})
