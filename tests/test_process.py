"""Flow against diffusers' FlowMatchEulerDiscreteScheduler, and what a process refuses; Ddpm is in test_diffusion.py."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffusekrona_train.models.process import Ddpm, Flow, flow_mu

FLUX = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
QWEN = {**FLUX, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}


def test_noised_is_diffusers_scale_noise():
    scheduler = FlowMatchEulerDiscreteScheduler()
    x_0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    times = scheduler.timesteps[[100, 700]]
    flow = Flow()
    torch.testing.assert_close(flow.noised(x_0, eps, times / 1000), scheduler.scale_noise(x_0, times, eps))
    # the target leads back: x_0 = x_t - sigma v, eps = x_t + (1 - sigma) v
    sigma, v = (times / 1000).view(-1, 1, 1, 1), flow.target(x_0, eps, times / 1000)
    x_t = flow.noised(x_0, eps, times / 1000)
    torch.testing.assert_close(x_t - sigma * v, x_0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_t + (1 - sigma) * v, eps, rtol=1e-5, atol=1e-5)


def test_one_euler_step_over_the_target_ends_at_the_picture():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    x_0, eps = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    flow, x = Flow(3.0), eps
    for t in scheduler.timesteps:
        x = scheduler.step(flow.target(x_0, eps, t[None] / 1000), t, x).prev_sample
    torch.testing.assert_close(x, x_0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 6.0])
def test_a_static_shift_is_the_schedulers(shift):
    plain, shifted = (FlowMatchEulerDiscreteScheduler(shift=value).sigmas for value in (1.0, shift))
    flow = Flow.from_config({"shift": shift}, tokens=1024)
    torch.testing.assert_close(flow.shifted(plain), shifted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [FLUX, QWEN])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("side", [512, 1024, 1328])
def test_a_dynamic_shift_is_the_schedulers_at_the_resolution(config, kind, side):
    tokens = (side // 16) ** 2
    last, high = config.get("max_image_seq_len", 4096), config["max_shift"]
    mu = calculate_shift(tokens, 256, last, 0.5, high)
    assert flow_mu(config, tokens) == pytest.approx(mu)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    sigmas = torch.linspace(0.05, 1, 20)
    theirs = scheduler.time_shift(mu, 1.0, sigmas)
    flow = Flow.from_config({**config, "time_shift_type": kind}, tokens)
    torch.testing.assert_close(flow.shifted(sigmas), theirs, rtol=1e-5, atol=1e-6)


def test_times_are_a_shifted_logit_normal_and_quantiles_say_where_they_lie():
    flow = Flow(2.5)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([flow.draw_t(generator) for _ in range(4000)])
    assert drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() < 1
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        odds = math.exp(NormalDist().inv_cdf(q))  # sigma / (1 - sigma) of the unshifted one
        assert flow.quantile(q).item() == pytest.approx(2.5 * odds / (1 + 2.5 * odds), rel=1e-5)
        assert (drawn <= flow.quantile(q)).float().mean().item() == pytest.approx(q, abs=0.025)


def test_a_generator_alone_decides_a_time():
    one, other = (Flow(3.0).draw_t(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)


def test_weightings_by_signal_to_noise_are_refused_for_a_flow():
    flow, t = Flow(), torch.tensor([0.2, 0.9])
    assert flow.weight("none", t).tolist() == [1, 1]
    for name in ("min_snr", "debiased"):
        with pytest.raises(ValueError, match=rf"^train\.weighting: {name} .* set none$"):
            flow.weight(name, t)
    Ddpm(torch.linspace(0.9, 0.1, 5)).check_weighting("min_snr")


def test_what_no_process_can_follow_is_refused():
    with pytest.raises(ValueError, match="'flow' is not one of epsilon, v_prediction, sample"):
        Ddpm.from_config({"prediction_type": "flow"})
    with pytest.raises(ValueError, match="shift 0.0 is not a positive number"):
        Flow.from_config({"shift": 0.0}, 1024)
