"""The two forward processes: `Ddpm` of the UNets, with a scheduler's noise schedule, `Flow` of the transformers.

Both are held to contracts.Process. Times are drawn one a sample from that sample's own generator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusekrona_train.models.contracts import Config, Process

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


# ---- Ddpm as pure functions, one value a sample ---------------------------------------------------------------------


def noise_schedule(scheduler: object) -> Tensor:
    """Return alphas_cumprod (T,), fp32, from a scheduler's config (a mapping, or an object with `.config`)."""
    config: Mapping[str, Any] = getattr(scheduler, "config", scheduler)  # type: ignore[assignment]
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        betas = _rescale_zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0).float()


def _betas(config: Mapping[str, Any]) -> Tensor:
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


def _rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas whose last step has no signal (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bar = ((root - last) * first / (first - last)) ** 2
    return 1.0 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps; x_0 and eps (B, ...), t (B,)."""
    a = _per_sample(alphas_cumprod[t], x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def target(x_0: Tensor, eps: Tensor, t: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
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


# ---- how a time weighs -----------------------------------------------------------------------------------------------


def _min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Hang et al. 2023: min(SNR, gamma) on the error of the sample."""
    return snr.clamp(max=gamma)


def _debiased(snr: Tensor, gamma: float) -> Tensor:
    """Yu et al. 2023: 1 / sqrt(SNR) on the error of the noise, so sqrt(SNR) on the error of the sample."""
    return snr.sqrt()


WEIGHTINGS = {"none": None, "min_snr": _min_snr, "debiased": _debiased}
"""Weight on the error of the predicted *sample*; `weights` carries it over to what is predicted."""


def weights(name: str, t: Tensor, alphas_cumprod: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
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


# ---- the processes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ddpm:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps at T whole times; the denoiser predicts the noise, v or the sample."""

    alphas_cumprod: Tensor
    """(T,) fp32"""
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {self.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")

    @classmethod
    def from_config(cls, scheduler_config: Config) -> Ddpm:
        """Make the process of a scheduler's config; ValueError for an unknown prediction type or noise schedule."""
        kind = scheduler_config.get("prediction_type", "epsilon")
        return cls(noise_schedule(scheduler_config), kind)

    def draw_t(self, generator: torch.Generator) -> Tensor:
        """Draw a time in [0, T), uniformly: () int64."""
        return torch.randint(len(self.alphas_cumprod), (), generator=generator)

    def quantile(self, q: float) -> Tensor:
        """Return the time at the share q of the way from 0 to T - 1, rounded: () int64."""
        return torch.tensor(round(q * (len(self.alphas_cumprod) - 1)))

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B, C, h, w)."""
        return add_noise(x_0, eps, t, self.alphas_cumprod)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the noise, v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, or x_0."""
        return target(x_0, eps, t, self.alphas_cumprod, self.prediction_type)

    def weight(self, name: str, t: Tensor, gamma: float = 5.0) -> Tensor:
        """Return (B,) fp32, by the signal-to-noise ratio at t."""
        return weights(name, t, self.alphas_cumprod, self.prediction_type, gamma)

    def check_weighting(self, name: str) -> None:
        """Accept every row of WEIGHTINGS."""

    def to(self, device: torch.device) -> Ddpm:
        """Return the same with its schedule on `device`."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - sigma) x_0 + sigma eps; the denoiser predicts the velocity v = eps - x_0.

    sigma is sigmoid(N(0, 1)), then shifted towards noise: s sigma / (1 + (s - 1) sigma) with s = `shift`.
    """

    shift: float = 1.0
    prediction_type: str = "flow"

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"flow shift {self.shift} is not a positive number")

    @classmethod
    def from_config(cls, scheduler_config: Config, tokens: int) -> Flow:
        """Use the shift of FlowMatchEulerDiscreteScheduler's config for images of so many image tokens: its own
        `shift`, or with dynamic shifting that of mu, which grows along a line with the number of tokens."""
        if not scheduler_config.get("use_dynamic_shifting"):
            return cls(float(scheduler_config.get("shift", 1.0)))
        mu = flow_mu(scheduler_config, tokens)
        return cls(mu if scheduler_config.get("time_shift_type") == "linear" else math.exp(mu))

    def shifted(self, sigma: Tensor) -> Tensor:
        """Shift sigma in [0, 1], towards 1 if the shift is above 1."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def draw_t(self, generator: torch.Generator) -> Tensor:
        """Draw sigma, () fp32."""
        return self.shifted(torch.sigmoid(torch.randn((), generator=generator)))

    def quantile(self, q: float) -> Tensor:
        """Return the sigma below which the share q of drawn ones lies, () fp32."""
        normal = torch.special.ndtri(torch.tensor(q, dtype=torch.float64))
        return self.shifted(torch.sigmoid(normal)).float()

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B, C, h, w)."""
        sigma = t.view(-1, *[1] * (x_0.dim() - 1))
        return (1 - sigma) * x_0 + sigma * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return v = eps - x_0 at any time."""
        return eps - x_0

    def weight(self, name: str, t: Tensor, gamma: float = 5.0) -> Tensor:
        """Return (B,) ones. ValueError as `check_weighting`."""
        self.check_weighting(name)
        return torch.ones_like(t)

    def check_weighting(self, name: str) -> None:
        """Raise ValueError for all but none: the others need a UNet's signal-to-noise ratio."""
        if name != "none":
            raise ValueError(
                f"train.weighting: {name} is for models that predict noise or v; this one predicts a flow, so set none"
            )

    def to(self, device: torch.device) -> Flow:
        """Return the same: it has no table."""
        return self


def flow_mu(scheduler_config: Config, tokens: int) -> float:
    """Return mu of dynamic shifting at so many image tokens, on the line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift)."""
    first, last = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
    low, high = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - first) / (last - first)


PROCESSES: dict[str, type[Process]] = {"ddpm": Ddpm, "flow": Flow}
"""Held to contracts.Process by the type checker."""
