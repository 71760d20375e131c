"""The two forward processes: `Ddpm` of the UNets, with a scheduler's noise schedule, `Flow` of the transformers.

Both are held to contracts.Process. Times are drawn one a sample from that sample's own generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusekrona_train.models import noise
from diffusekrona_train.models.contracts import Config, Process


@dataclass(frozen=True)
class Ddpm:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps at T whole times; the denoiser predicts the noise, v or the sample."""

    alphas_cumprod: Tensor
    """(T,) fp32"""
    prediction_type: str = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction_type not in noise.PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type {self.prediction_type!r} is not one of {', '.join(noise.PREDICTION_TYPES)}"
            )

    @classmethod
    def from_config(cls, scheduler_config: Config) -> Ddpm:
        """Make the process of a scheduler's config; ValueError for an unknown prediction type or noise schedule."""
        kind = scheduler_config.get("prediction_type", "epsilon")
        return cls(noise.noise_schedule(scheduler_config), kind)

    def draw_t(self, generator: torch.Generator) -> Tensor:
        """Draw a time in [0, T), uniformly: () int64."""
        return torch.randint(len(self.alphas_cumprod), (), generator=generator)

    def quantile(self, q: float) -> Tensor:
        """Return the time at the share q of the way from 0 to T - 1, rounded: () int64."""
        return torch.tensor(round(q * (len(self.alphas_cumprod) - 1)))

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B, C, h, w)."""
        return noise.add_noise(x_0, eps, t, self.alphas_cumprod)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the noise, v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, or x_0."""
        return noise.target(x_0, eps, t, self.alphas_cumprod, self.prediction_type)

    def weight(self, name: str, t: Tensor, gamma: float = 5.0) -> Tensor:
        """Return (B,) fp32, by the signal-to-noise ratio at t."""
        return noise.weights(name, t, self.alphas_cumprod, self.prediction_type, gamma)

    def check_weighting(self, name: str) -> None:
        """Accept every row of noise.WEIGHTINGS."""

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
