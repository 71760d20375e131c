"""KronA: the Kronecker adapter of DiffuseKronA, ΔW = scale * A ⊗ B."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters.base import Adapter, Options, Partners, Shapes, kaiming, scaled
from diffusekrona_train.adapters.kron import Sides, kron_delta, kron_linear, kron_sides
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.config.factors import pair_cost
from diffusekrona_train.models.layers import Layer


class KronA(Adapter):
    """A (a2, a1), B (b2, b1): a1 splits the input width, a2 the output width, as in the paper.

    Init of A, by `init_a`: `normal` N(0, std 1/a2), as the authors' code; `normal_dim` std sqrt(min(in, out)), as the
    paper prints it; `normal_dim_reciprocal` std 1/sqrt(min(in, out)), its likely intent; `kaiming_uniform`
    U(±1/sqrt(a1)), that is gain sqrt(1/3) with fan in a1; `xavier_uniform` U(±sqrt(6/(a1 + a2))), that is gain 1 with
    fan in a1 and fan out a2; `aligned` begins as `normal`, and a run then turns A towards the gradient
    (`training.align`). B is zero, or with `init_b: same` drawn by the same rule (fans b1 and b2), the ablation
    that the paper reports as failing.

    With the option `row_permutation` (the authors' own checkpoints) the rows of ΔW are those of A ⊗ B with α and β
    exchanged: row β*a2+α is row α*b2+β of the product.
    """

    A: nn.Parameter
    B: nn.Parameter
    grown = ("B",)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        a1, a2 = options["a1"], options["a2"]
        return {"lokr_w1": (a2, a1), "lokr_w2": (layer.out_features // a2, layer.in_features // a1), "alpha": ()}

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        return pair_cost(layer.in_features, layer.out_features, options["a1"], options["a2"])

    @staticmethod
    def parameter_name(suffix: str) -> str:
        return {"lokr_w1": "A", "lokr_w2": "B"}[suffix]

    def initialise(self, spec: AdapterConfig, generator: torch.Generator | None) -> None:
        self.row_permutation = bool(self.options.get("row_permutation", False))
        least = min(self.layer.in_features, self.layer.out_features)
        std = {"normal": 1 / len(self.A), "normal_dim": math.sqrt(least), "normal_dim_reciprocal": 1 / math.sqrt(least)}
        for factor in (self.A, self.B) if spec.init_b == "same" else (self.A,):
            if spec.init_a == "kaiming_uniform":
                kaiming(factor, generator)
            elif spec.init_a == "xavier_uniform":
                nn.init.xavier_uniform_(factor, generator=generator)
            else:
                factor.normal_(0.0, std.get(spec.init_a, std["normal"]), generator=generator)

    @property
    def sides(self) -> Sides | None:
        if self.row_permutation:
            return None
        return kron_sides(self.A, self.B, "A", "B")

    def forward(self, x: Tensor) -> Tensor:
        y = kron_linear(x, scaled(self.A, self.multiplier), self.B)
        if not self.row_permutation:
            return y
        return y.reshape(*y.shape[:-1], len(self.A), len(self.B)).mT.reshape(y.shape)

    def product(self) -> Tensor:
        dense = kron_delta(self.A, self.B)
        if not self.row_permutation:
            return dense
        return dense.reshape(len(self.A), len(self.B), -1).transpose(0, 1).reshape(dense.shape)

    def partners(self) -> Partners:
        return {"A": ("B", 1 / self.B.numel()), "B": ("A", 1 / self.A.numel())}

    def file_alpha(self) -> float:
        return 1.0  # readers ignore it beside two full matrices, yet LyCORIS wants it and a ComfyUI path divides by it
