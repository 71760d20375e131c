"""Adapters that are compared in studies: sums of Kronecker products, and two baselines that change the weight itself.

They train in the same loop and have files of this project alone; what they cannot be exported to is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusekrona_train.adapters.base import Adapter, Options, Partners, Shapes, kaiming, scaled
from diffusekrona_train.adapters.kron import kron_delta
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer

TERMS_STD = 0.125
"""Standard deviation of A at the start of Terms."""


class Terms(Adapter):
    """ΔW = Σ_k A_k ⊗ B_k with A_k (rho, in/rho) and B_k (out/rho, rho), for `rank` terms.

    There are rank * (in + out) parameters for every rho; rho 1 is a LoRA, and in general the rank is rank * rho². A
    starts as N(0, 0.125), B as zero.
    """

    terms_a: nn.Parameter
    terms_b: nn.Parameter
    grown = ("terms_b",)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        rank, rho = options["rank"], options["rho"]
        return {
            "terms_a": (rank, rho, layer.in_features // rho),
            "terms_b": (rank, layer.out_features // rho, rho),
        }

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        return options["rank"] * options["rho"] * (layer.in_features + layer.out_features)

    def initialise(self, spec: AdapterConfig, generator: torch.Generator | None) -> None:
        self.terms_a.normal_(0.0, TERMS_STD, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        rank, rho, width = self.terms_a.shape
        tokens = x.reshape(-1, width, rho)
        first = scaled(self.terms_a, self.multiplier).to(x.dtype).flatten(0, 1)  # (rank * rho, width)
        z = (tokens.mT @ first.mT).view(-1, rho, rank, rho).permute(0, 3, 2, 1)  # (n, rows of A, terms, columns of B)
        second = self.terms_b.to(x.dtype).transpose(1, 2).flatten(0, 1)  # (terms * columns of B, rows of B)
        return (z.flatten(2) @ second).reshape(*x.shape[:-1], -1)

    def product(self) -> Tensor:
        return torch.stack([kron_delta(A, B) for A, B in zip(self.terms_a, self.terms_b, strict=True)]).sum(0)

    def partners(self) -> Partners:
        rank, pair = len(self.terms_a), ("terms_a", "terms_b")
        return {own: (other, rank / self.parameter(other).numel()) for own, other in (pair, pair[::-1])}


class OverBase(Adapter):
    """An adapter that needs its layer's own weight W (out, in), unquantised: it has one once it is `attached`."""

    _base: list[nn.Module] | None = None

    def attached(self, base: nn.Module) -> None:
        weight = base.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(
                f"adapter.type: {self.kind} needs the weights of {self.layer.name} unquantised; "
                "set train.quantize: none and train.memory: plain or checkpointing"
            )
        self._base = [base]  # in a list, so that it is no part of this module
        with torch.no_grad():
            self.begin()

    kind = ""
    """The type's name in a config."""

    def begin(self) -> None:
        """Fill what depends on W."""

    @property
    def weight(self) -> Tensor:
        """Return W, fp32; ValueError where the adapter is in no model."""
        if self._base is None:
            raise ValueError(f"what a {self.kind} adapter adds depends on its base model, so it cannot be exported")
        base = self._base[0]
        weight = base.__dict__.get("_unfused_weight", base.weight)  # other adapters may be fused into it
        return weight.detach().flatten(1).float()


class DoRA(OverBase):
    """W' = m * (W + up @ down * alpha / rank) / ‖its rows‖, m (out,) starting as the norms of W's rows.

    The norm is a constant in the backward pass, as in the paper and in PEFT.
    """

    kind = "dora"
    dora_up: nn.Parameter
    dora_down: nn.Parameter
    dora_magnitude: nn.Parameter
    grown = ("dora_up",)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        rank, out = options["rank"], layer.out_features
        return {"dora_up": (out, rank), "dora_down": (rank, layer.in_features), "dora_magnitude": (out,), "alpha": ()}

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        return options["rank"] * (layer.in_features + layer.out_features) + layer.in_features * layer.out_features

    def initialise(self, spec: AdapterConfig, generator: torch.Generator | None) -> None:
        kaiming(self.dora_down, generator)

    def begin(self) -> None:
        self.dora_magnitude.copy_(self.weight.norm(dim=1))

    def _inner(self) -> float:
        return self.scale * self.alpha_scale()

    def _share(self) -> Tensor:
        """Return m / ‖rows of W + ΔW‖, (out,)."""
        inside = self.weight + self._inner() * (self.dora_up.detach() @ self.dora_down.detach())
        return self.dora_magnitude / inside.norm(dim=1)

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.product() * self.strength  # the scale is inside the norm

    def forward(self, x: Tensor) -> Tensor:
        share, low = self._share(), F.linear(x, self.dora_down.to(x.dtype))
        base = F.linear(x, self.weight.to(x.dtype)) * (share - 1).to(x.dtype)
        up = scaled(self.dora_up * share[:, None], self._inner())
        return scaled(base + F.linear(low, up.to(x.dtype)), self.strength)

    def product(self) -> Tensor:
        weight = self.weight
        return self._share()[:, None] * (weight + self._inner() * (self.dora_up @ self.dora_down)) - weight

    def file_alpha(self) -> float:
        return float(self.options["alpha"])


class OFT(OverBase):
    """W' = W Rᵀ with R (in, in) of orthogonal blocks: y = base(x R). R = (I - Q)(I + Q)⁻¹ with Q skew-symmetric.

    `rotation` (in / b, b (b - 1) / 2) holds the upper triangles of Q, row by row, as in PEFT (exact Cayley transform).
    """

    kind = "oft"
    rotation: nn.Parameter
    grown = ("rotation",)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        side = options["block_size"]
        return {"rotation": (layer.in_features // side, side * (side - 1) // 2)}

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        return layer.in_features * (options["block_size"] + layer.out_features)

    def rotations(self) -> Tensor:
        """Return R - I of each block, (in / b, b, b), fp32: -2 Q (I + Q)⁻¹."""
        side = self.options["block_size"]
        upper = self.rotation.new_zeros(len(self.rotation), side, side)
        rows, columns = torch.triu_indices(side, side, 1, device=upper.device)
        upper[:, rows, columns] = self.rotation
        skew = upper - upper.mT
        return torch.linalg.solve(torch.eye(side, device=skew.device) + skew, -2 * skew, left=False)

    def forward(self, x: Tensor) -> Tensor:
        side = self.options["block_size"]
        moved = torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (-1, side)), self.rotations().to(x.dtype)).flatten(-2)
        return F.linear(moved, scaled(self.weight, self.multiplier).to(x.dtype))

    def product(self) -> Tensor:
        return self.weight @ torch.block_diag(*self.rotations()).mT

    def _carried(self, alpha: float | None) -> float:
        return 1.0  # a rotation is not scaled by a factor in its tensor; the scale is the spec's
