"""Layer, and what all types of adapter share: fp32 parameters, two scales, the way to and from a file."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffusekrona_train.adapters.kron import Sides
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer
from diffusekrona_train.models.stored import StoredLinear

Options = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Partners = dict[str, tuple[str | None, float]]
"""Factor -> (partner, weight); see `Adapter.partners`."""


class Fp32Module(nn.Module):
    """Moves with the model but keeps its type: `model.to(torch.bfloat16)` would round the masters."""

    def _apply(self, fn, recurse: bool = True):
        def keep_type(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_type, recurse)


class Lane(Protocol):
    """One adapter's place among those that are computed together (see `grouped`)."""

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """Compute base(x) plus what the adapter adds, (..., out), for x (..., in)."""
        ...


class Adapter(Fp32Module):
    """What is added to one linear layer.

    `scale` is the config's and goes into files; `strength` is a runtime multiplier, and 0 leaves exactly the base
    layer. A type says the `shapes` of its file tensors (the first one carries the scale in a file) and what it adds.
    """

    lane: Lane | None = None
    """Where it is computed together with others while it trains."""
    grown: ClassVar[tuple[str, ...]] = ()
    """Factors that start at zero, or that alone are ΔW: how far they may move does not depend on their own size."""

    multiplier: float
    """What the product is multiplied by: scale, strength, and alpha / rank; follows `strength`."""
    off: bool
    """Whether the strength is 0."""

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self._strength, self.off = strength, strength == 0
        self.multiplier = self.scale * strength * self.alpha_scale()

    @property
    def sides(self) -> Sides | None:
        """Return the two products of this adapter, None if it is not two products."""
        return None

    def __init__(self, layer: Layer, options: Options, spec: AdapterConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.layer, self.options, self.scale = layer, dict(options), float(spec.scale)
        shapes = self.shapes(layer, options, spec)
        self.suffixes = [suffix for suffix in shapes if suffix != "alpha"]
        self.strength = 1.0
        for suffix in self.suffixes:
            self.register_parameter(self.parameter_name(suffix), nn.Parameter(torch.zeros(shapes[suffix])))
        with torch.no_grad():
            self.initialise(spec, generator)

    @classmethod
    def shapes(cls, layer: Layer, options: Options, spec: AdapterConfig) -> Shapes:
        """Return file suffix -> shape, without building anything."""
        raise NotImplementedError

    @staticmethod
    def macs(layer: Layer, options: Options) -> int:
        """Count multiplications per token beside the layer's own in * out."""
        raise NotImplementedError

    @staticmethod
    def parameter_name(suffix: str) -> str:
        """Return the name of the parameter behind the file tensor `suffix`."""
        return suffix.removesuffix(".weight")

    def initialise(self, spec: AdapterConfig, generator: torch.Generator | None) -> None:
        """Fill the parameters, which are zero, so that the layer's output does not change yet."""

    def attached(self, base: nn.Module) -> None:
        """Take notice of the frozen layer that this adapter was put around."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute what is added, (..., out), for x (..., in), all scales included, in the type of x (or autocast's)."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """Return the dense difference (out, in) in fp32 before any scale."""
        raise NotImplementedError

    def partners(self) -> Partners | None:
        """Return factor -> (partner, weight) where g² = weight * ‖partner‖² (weight alone for partner None), else None.

        g is the rms that the product changes by, before any scale, when the factor changes by independent numbers of
        rms 1: g² = ‖∂product/∂factor‖² / (out * in).
        """
        return None

    def squared_gains(self) -> dict[str, Tensor]:
        """Return factor -> g² as in `partners`, for types whose g² is not that simple; 0-dim fp32."""
        raise NotImplementedError

    def file_alpha(self) -> float | None:
        """Return the `.alpha` that is written; None where files of this type have no such tensor."""
        return None

    def alpha_scale(self, alpha: float | None = None) -> float:
        """Return alpha / rank for this alpha (none: the option's; 0: as if it were the rank); 1 for types without a
        rank."""
        if "alpha" not in self.options:
            return 1.0
        alpha = self.options["alpha"] if alpha is None else alpha
        return alpha / self.options["rank"] if alpha else 1.0

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the dense difference ΔW (out, in), fp32, all scales included."""
        return self.product() * self.multiplier

    @torch.no_grad()
    def file_tensors(self) -> dict[str, Tensor]:
        """Return suffix -> fp32 tensor on the CPU. The strength is left out; the scale is multiplied into the first
        tensor."""
        tensors = {suffix: to_file(self.parameter(suffix)) for suffix in self.suffixes}
        alpha = self.file_alpha()
        tensors[self.suffixes[0]] *= self._carried(alpha)
        return tensors if alpha is None else {**tensors, "alpha": torch.tensor(alpha)}

    @torch.no_grad()
    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of a file (suffix -> tensor of any float type, with whatever alpha).

        Raises ValueError naming layer and tensor where one is missing, unknown, of another shape, or not finite.
        """
        wanted: Shapes = {suffix: tuple(self.parameter(suffix).shape) for suffix in self.suffixes}
        if self.file_alpha() is not None:
            wanted["alpha"] = ()
        check_tensors(self.layer.name, tensors, wanted)
        carried = self._carried(float(tensors["alpha"]) if "alpha" in wanted else None)
        for i, suffix in enumerate(self.suffixes):
            value = tensors[suffix].float()
            self.parameter(suffix).copy_(value / carried if i == 0 and carried not in (0.0, 1.0) else value)

    def parameter(self, suffix: str) -> nn.Parameter:
        return getattr(self, self.parameter_name(suffix))

    def _carried(self, alpha: float | None) -> float:
        """Return the factor in the first tensor of a file with this alpha: all that readers do not see from alpha."""
        return self.scale * self.alpha_scale() / self.alpha_scale(alpha)


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return tensor * factor, saving the product where it changes nothing."""
    return tensor if factor == 1.0 else tensor * factor


def kaiming(tensor: Tensor, generator: torch.Generator | None) -> None:
    """U(±1/sqrt(fan in)): gain sqrt(1/3), fan in the number of columns; what torch does for a linear layer."""
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def to_file(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def check_tensors(name: str, tensors: dict[str, Tensor], wanted: Shapes) -> None:
    """Raise ValueError naming layer and tensor unless `tensors` are exactly the wanted ones, of these shapes,
    finite."""
    if missing := [suffix for suffix in wanted if suffix not in tensors]:
        raise ValueError(f"{name}: tensor {missing[0]} is missing")
    if extra := [suffix for suffix in tensors if suffix not in wanted]:
        raise ValueError(f"{name}: unknown tensor {extra[0]}; this layer has {', '.join(wanted)}")
    for suffix, shape in wanted.items():
        found = tuple(tensors[suffix].shape)
        if found != shape and not (suffix == "alpha" and tensors[suffix].numel() == 1):
            raise ValueError(f"{name}: tensor {suffix} has shape {found}, not {shape}")
        if not torch.isfinite(tensors[suffix].float()).all():
            raise ValueError(f"{name}: tensor {suffix} holds NaN or infinite values")


def check_plain(name: str, module: nn.Module, key: str = "weight") -> None:
    """Raise ValueError unless a parameter of a module can be changed."""
    tensor = getattr(module, key)
    if isinstance(module, StoredLinear) or not tensor.is_floating_point() or parametrize.is_parametrized(module, key):
        raise ValueError(
            f"{name} is {tensor.dtype} ({type(module).__name__}): it cannot be changed; load it unquantized"
        )
