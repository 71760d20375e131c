"""Compute the diffusion process: pure functions, one value per sample. Needs only torch.

`draw` is why a run can be stopped, resumed and spread over processes: everything random about a sample is a function of
(seed, step, index in the global batch), never of a generator that somebody else has advanced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


# ---- the forward process -------------------------------------------------------------------------------------------


def noise_schedule(scheduler: object) -> torch.Tensor:
    """Return alphas_cumprod (T,), fp32, from a scheduler's config (a mapping, or an object with `.config`)."""
    config: Mapping[str, Any] = getattr(scheduler, "config", scheduler)  # type: ignore[assignment]
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        betas = _rescale_zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0).float()


def _betas(config: Mapping[str, Any]) -> torch.Tensor:
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 2e-2))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise ValueError(f"scheduler beta_schedule {kind!r} is not known; linear, scaled_linear or squaredcos_cap_v2")


def _rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Return betas whose last step has no signal (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * first / (first - last)) ** 2
    return 1.0 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def _per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def add_noise(x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps; x_0 and eps (B, ...), t (B,)."""
    a = _per_sample(alphas_cumprod[t], x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def target(
    x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """Return what the denoiser should predict at x_t: the noise, v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, or the
    sample."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        a = _per_sample(alphas_cumprod[t], x_0)
        return a.sqrt() * eps - (1 - a).sqrt() * x_0
    if prediction_type == "sample":
        return x_0
    raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


# ---- losses and weightings -----------------------------------------------------------------------------------------


def _min_snr(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Hang et al. 2023: min(SNR, gamma) on the error of the sample."""
    return snr.clamp(max=gamma)


def _debiased(snr: torch.Tensor, gamma: float) -> torch.Tensor:
    """Yu et al. 2023: 1 / sqrt(SNR) on the error of the noise, so sqrt(SNR) on the error of the sample."""
    return snr.sqrt()


WEIGHTINGS = {"none": None, "min_snr": _min_snr, "debiased": _debiased}
"""Weight on the error of the predicted *sample*; `weights` carries it over to what is predicted."""


def weights(
    name: str, t: torch.Tensor, alphas_cumprod: torch.Tensor, prediction_type: str, gamma: float = 5.0
) -> torch.Tensor:
    """Return the weight of each sample's loss, (B,). Errors of noise, v and sample relate as SNR : SNR + 1 : 1
    (Salimans & Ho)."""
    weighting = WEIGHTINGS[name]
    if weighting is None:
        return torch.ones_like(alphas_cumprod[t])
    a = alphas_cumprod[t].to(torch.float32 if alphas_cumprod.device.type == "mps" else torch.float64)  # mps has no fp64
    # A schedule with zero terminal SNR would give 0 / 0 for the noise.
    snr = (a / (1 - a)).clamp(1e-8, 1e8)
    per_error = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return (weighting(snr, gamma) / per_error).float()


# ---- learning rate -------------------------------------------------------------------------------------------------


# ---- the random choices of a step ----------------------------------------------------------------------------------
