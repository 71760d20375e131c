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
        """The process of a scheduler's config; ValueError for a prediction type or a noise schedule not known."""
        kind = scheduler_config.get("prediction_type", "epsilon")
        return cls(noise.noise_schedule(scheduler_config), kind)

    def draw_t(self, generator: torch.Generator) -> Tensor:
        """A time in [0, T), each as likely as the others: () int64."""
        return torch.randint(len(self.alphas_cumprod), (), generator=generator)

    def quantile(self, q: float) -> Tensor:
        """The share q of the way from 0 to T - 1, rounded: () int64."""
        return torch.tensor(round(q * (len(self.alphas_cumprod) - 1)))

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, h, w)."""
        return noise.add_noise(x_0, eps, t, self.alphas_cumprod)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noise, v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, or x_0."""
        return noise.target(x_0, eps, t, self.alphas_cumprod, self.prediction_type)

    def weight(self, name: str, t: Tensor, gamma: float = 5.0) -> Tensor:
        """(B,) fp32, by the ratio of signal to noise at t."""
        return noise.weights(name, t, self.alphas_cumprod, self.prediction_type, gamma)

    def check_weighting(self, name: str) -> None:
        """Every row of noise.WEIGHTINGS means something here."""

    def to(self, device: torch.device) -> Ddpm:
        """The same with its schedule on `device`."""
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
        """The shift of FlowMatchEulerDiscreteScheduler's config for pictures of so many image tokens: its own `shift`,
        or with dynamic shifting that of mu, which grows along a line with the number of tokens."""
        if not scheduler_config.get("use_dynamic_shifting"):
            return cls(float(scheduler_config.get("shift", 1.0)))
        mu = flow_mu(scheduler_config, tokens)
        return cls(mu if scheduler_config.get("time_shift_type") == "linear" else math.exp(mu))

    def shifted(self, sigma: Tensor) -> Tensor:
        """sigma in [0, 1] moved towards 1 where the shift is above 1."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def draw_t(self, generator: torch.Generator) -> Tensor:
        """sigma, () fp32."""
        return self.shifted(torch.sigmoid(torch.randn((), generator=generator)))

    def quantile(self, q: float) -> Tensor:
        """The sigma below which the share q of the drawn ones lies, () fp32."""
        normal = torch.special.ndtri(torch.tensor(q, dtype=torch.float64))
        return self.shifted(torch.sigmoid(normal)).float()

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, h, w)."""
        sigma = t.view(-1, *[1] * (x_0.dim() - 1))
        return (1 - sigma) * x_0 + sigma * eps

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = eps - x_0, whatever the time."""
        return eps - x_0

    def weight(self, name: str, t: Tensor, gamma: float = 5.0) -> Tensor:
        """(B,) ones. ValueError as `check_weighting`."""
        self.check_weighting(name)
        return torch.ones_like(t)

    def check_weighting(self, name: str) -> None:
        """ValueError for all but none: the others weigh by a ratio of signal to noise that a UNet's losses have."""
        if name != "none":
            raise ValueError(
                f"train.weighting: {name} is for models that predict noise or v; this one predicts a flow, so set none"
            )

    def to(self, device: torch.device) -> Flow:
        """The same: it has no table."""
        return self


def flow_mu(scheduler_config: Config, tokens: int) -> float:
    """mu of dynamic shifting at so many image tokens, on the line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift)."""
    first, last = scheduler_config.get("base_image_seq_len", 256), scheduler_config.get("max_image_seq_len", 4096)
    low, high = scheduler_config.get("base_shift", 0.5), scheduler_config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - first) / (last - first)


PROCESSES: dict[str, type[Process]] = {"ddpm": Ddpm, "flow": Flow}
"""Held to contracts.Process by the type checker."""
