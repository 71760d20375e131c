"""The paper's baselines, trained by the same loop: LoRA, LoKr, LoHa, and full fine-tuning of chosen projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusekrona_train.adapters.base import Adapter, Options, Partners, Shapes, kaiming, scaled
from diffusekrona_train.adapters.kron import Right, Sides, kron_delta, kron_linear, kron_sides
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.config.factors import factorization, pair_cost
from diffusekrona_train.models.layers import Layer


class LoRA(Adapter):
    """ΔW = alpha / rank * up @ down. down starts as U(±1/sqrt(in)), up as zero."""

    lora_up: nn.Parameter
    lora_down: nn.Parameter
    grown = ("lora_up",)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        rank = options["rank"]
        up, down = (layer.out_features, rank), (rank, layer.in_features)
        return {"lora_up.weight": up, "lora_down.weight": down, "alpha": ()}

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        return options["rank"] * (layer.in_features + layer.out_features)

    def initialise(self, spec: AdapterConfig, generator: torch.Generator | None) -> None:
        kaiming(self.lora_down, generator)

    @property
    def sides(self) -> Sides | None:
        return (Right, "lora_down"), (Right, "lora_up")

    def forward(self, x: Tensor) -> Tensor:
        up = scaled(self.lora_up, self.multiplier)
        return F.linear(F.linear(x, self.lora_down.to(x.dtype)), up.to(x.dtype))

    def product(self) -> Tensor:
        return self.lora_up @ self.lora_down

    def partners(self) -> Partners:
        return {
            "lora_up": ("lora_down", 1 / self.layer.in_features),
            "lora_down": ("lora_up", 1 / self.layer.out_features),
        }

    def file_alpha(self) -> float:
        return float(self.options["alpha"])


class LoKr(Adapter):
    """ΔW = w1 ⊗ w2 with both widths split by FACTORIZATION, the smaller parts in w1 (LyCORIS).

    w2 is w2_a @ w2_b of the given rank where rank < max(its shape) / 2, w1 too with `decompose_both`, neither with
    `full_matrix`. alpha / rank counts unless both are whole. Init as in LyCORIS: kaiming uniform, zero for w2 or w2_b.
    """

    grown = ("lokr_w2", "lokr_w2_b")

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        rank, shapes = options["rank"], Shapes()
        (in_small, in_large), (out_small, out_large) = _split(layer, options)
        for suffix, rows, columns, may_split in (
            ("lokr_w1", out_small, in_small, options["decompose_both"]),
            ("lokr_w2", out_large, in_large, True),
        ):
            if may_split and rank < max(rows, columns) / 2 and not options["full_matrix"]:
                shapes |= {f"{suffix}_a": (rows, rank), f"{suffix}_b": (rank, columns)}
            else:
                shapes[suffix] = (rows, columns)
        return shapes | {"alpha": ()}

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        (in_small, _), (out_small, _) = _split(layer, options)
        return pair_cost(layer.in_features, layer.out_features, in_small, out_small)

    def initialise(self, spec: AdapterConfig, generator: torch.Generator | None) -> None:
        for suffix in self.suffixes:
            if suffix not in ("lokr_w2", "lokr_w2_b"):
                kaiming(self.parameter(suffix), generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return w1 and w2, multiplied out where they are pairs."""
        return self._whole("lokr_w1"), self._whole("lokr_w2")

    @property
    def sides(self) -> Sides | None:
        if not {"lokr_w1", "lokr_w2"} <= set(self.suffixes):
            return None
        return kron_sides(self.get_parameter("lokr_w1"), self.get_parameter("lokr_w2"), "lokr_w1", "lokr_w2")

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self.factors()
        return kron_linear(x, scaled(w1, self.multiplier), w2)

    def product(self) -> Tensor:
        return kron_delta(*self.factors())

    def partners(self) -> Partners | None:
        if self.sides is None:
            return None
        pair = "lokr_w1", "lokr_w2"
        return {own: (other, 1 / self.parameter(other).numel()) for own, other in (pair, pair[::-1])}

    @torch.no_grad()
    def squared_gains(self) -> dict[str, Tensor]:
        wholes, gains = self.factors(), {}
        for suffix, own, other in zip(("lokr_w1", "lokr_w2"), wholes, wholes[::-1], strict=True):
            around = other.square().mean()
            if suffix in self.suffixes:
                gains[suffix] = around
            else:  # as a LoRA's up and down, inside the Kronecker product
                up, down = self.parameter(f"{suffix}_a"), self.parameter(f"{suffix}_b")
                gains[f"{suffix}_a"] = around * down.square().sum() / own.shape[1]
                gains[f"{suffix}_b"] = around * up.square().sum() / own.shape[0]
        return gains

    def file_alpha(self) -> float:
        return float(self.options["rank"])  # LyCORIS squares alpha / rank, other readers do not: at 1 all agree

    def alpha_scale(self, alpha: float | None = None) -> float:
        return 1.0 if {"lokr_w1", "lokr_w2"} <= set(self.suffixes) else super().alpha_scale(alpha)

    def _whole(self, suffix: str) -> Tensor:
        if suffix in self.suffixes:
            return self.parameter(suffix)
        return self.parameter(f"{suffix}_a") @ self.parameter(f"{suffix}_b")


def _split(layer: Layer, options: Options) -> tuple[tuple[int, int], tuple[int, int]]:
    factor = options["factor"]
    return factorization(layer.in_features, factor), factorization(layer.out_features, factor)


class LoHa(Adapter):
    """ΔW = alpha / rank * (w1_a @ w1_b) ⊙ (w2_a @ w2_b), of rank up to rank². Init as in LyCORIS: w2_a zero, others
    normal.

    Applied as the LoRA of rank² that it is (products of columns, products of rows) where that is cheaper than the
    dense ΔW.
    """

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    grown = ("hada_w2_a",)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        left, right = (layer.out_features, options["rank"]), (options["rank"], layer.in_features)
        return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right, "alpha": ()}

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        as_lora = options["rank"] ** 2 * (layer.in_features + layer.out_features)
        return min(as_lora, layer.in_features * layer.out_features)

    def initialise(self, spec: AdapterConfig, generator: torch.Generator | None) -> None:
        self.hada_w1_a.normal_(0.0, 0.1, generator=generator)
        self.hada_w1_b.normal_(0.0, 1.0, generator=generator)
        self.hada_w2_b.normal_(0.0, 1.0, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if self.macs(self.layer, self.options) == self.layer.in_features * self.layer.out_features:
            return F.linear(x, scaled(self.product(), self.multiplier).to(x.dtype))
        up = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None, :]).flatten(1)  # (out, rank²)
        down = (self.hada_w1_b[:, None, :] * self.hada_w2_b[None, :, :]).flatten(0, 1)  # (rank², in)
        return F.linear(F.linear(x, down.to(x.dtype)), scaled(up, self.multiplier).to(x.dtype))

    def product(self) -> Tensor:
        return (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)

    @torch.no_grad()
    def squared_gains(self) -> dict[str, Tensor]:
        left, right = (self.hada_w1_a, self.hada_w1_b), (self.hada_w2_a, self.hada_w2_b)
        count, gains = self.layer.in_features * self.layer.out_features, {}
        for name, (up, down), (other_up, other_down) in (("w1", left, right), ("w2", right, left)):
            # Σ over rows, and over columns, of the other matrix's squares, without building it
            of_columns = (other_down * ((other_up.mT @ other_up) @ other_down)).sum(0)
            of_rows = (other_up * (other_up @ (other_down @ other_down.mT))).sum(1)
            gains[f"hada_{name}_a"] = (down.square().sum(0) * of_columns).sum() / count
            gains[f"hada_{name}_b"] = (up.square().sum(1) * of_rows).sum() / count
        return gains

    def file_alpha(self) -> float:
        return float(self.options["rank"])  # as for LoKr


class Full(Adapter):
    """ΔW itself (out, in), from zero: full fine-tuning of the chosen projections, an fp32 difference over any base."""

    diff: nn.Parameter
    grown = ("diff",)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        return {"diff": (layer.out_features, layer.in_features)}

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        return layer.in_features * layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, scaled(self.diff, self.multiplier).to(x.dtype))

    def product(self) -> Tensor:
        return self.diff.clone()

    def partners(self) -> Partners:
        return {"diff": (None, 1.0)}
