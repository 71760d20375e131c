"""How an adapter sits in a model: around a linear layer, or as a difference on every parameter (full fine-tuning)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffusekrona_train.adapters import Adapter, Fp32Module, check_tensors, to_file
from diffusekrona_train.adapters.kron import computes_in_own_type


class AdaptedLinear(nn.Module):
    """A frozen layer and what is added to it, in the layer's output type. The base may be adapted itself.

    The layer is linear, or a 1x1 convolution, which is the same on channels (proj_in and proj_out of SD 1).
    """

    def __init__(self, base: nn.Module, adapter: Adapter):
        super().__init__()
        self.base, self.adapter, self.fused = base, adapter, False
        self.channels_first = isinstance(self.innermost(), nn.Conv2d)
        adapter.attached(self.innermost())

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        lane = self.adapter.lane
        if self.fused or self.adapter.off:
            return self.base(x, *args, **kwargs)
        plain = not (args or kwargs or self.channels_first or torch.compiler.is_compiling())
        if lane is not None and plain and computes_in_own_type(x):
            return lane.forward(self.base, x)
        y = self.base(x, *args, **kwargs)
        if self.channels_first:
            return y + self.adapter(x.movedim(1, -1)).movedim(-1, 1).to(y.dtype)
        return y + self.adapter(x).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.base.in_channels if self.channels_first else self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base.out_channels if self.channels_first else self.base.out_features  # type: ignore[return-value]

    def check_fusable(self) -> None:
        """Raise ValueError if the weights cannot be changed."""
        _check_plain(self.adapter.layer.name, self.innermost())

    def fuse_for_good(self) -> None:
        """Fuse without the copy that `unfuse` needs; for a layer with one adapter, so that it is rounded once."""
        linear = self.innermost()
        with torch.no_grad():
            difference = self.adapter.delta().view_as(linear.weight)  # type: ignore[arg-type]
            linear.weight.copy_(linear.weight.float() + difference)  # type: ignore[operator,union-attr]
        self.fused = True

    def fuse(self) -> None:
        linear = self.innermost()
        self.check_fusable()
        fused: list[Adapter] = linear.__dict__.setdefault("_fused_adapters", [])
        if not fused:
            linear.__dict__["_unfused_weight"] = linear.weight.detach().clone()  # type: ignore[operator]
        fused.append(self.adapter)
        _sum_into(linear)
        self.fused = True

    def unfuse(self) -> None:
        linear = self.innermost()
        if self.adapter not in linear.__dict__.get("_fused_adapters", []):
            raise ValueError(f"{self.adapter.layer.name} was fused permanently; load the model again to remove it")
        linear.__dict__["_fused_adapters"].remove(self.adapter)
        _sum_into(linear)
        self.fused = False

    def take_out(self, model: nn.Module, name: str) -> None:
        """Put the base in this wrapper's place, wherever it is in a stack."""
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        while getattr(holder, child) is not self:
            holder, child = getattr(holder, child), "base"
        setattr(holder, child, self.base)

    def innermost(self) -> nn.Module:
        """Return the frozen layer itself, beneath all adapters."""
        linear = self.base
        while isinstance(linear, AdaptedLinear):
            linear = linear.base
        return linear


class WholeModule:
    """All parameters of one module, trained as fp32 differences: `adapter` holds them, `original + difference` is what
    the module sees. The originals are never written (but by `fuse`, which keeps a copy)."""

    def __init__(self, name: str, module: nn.Module, scale: float):
        self.name, self.module = name, module
        self._slots = list(module._parameters)
        self._order = [key for key, value in module._parameters.items() if value is not None]
        for key in self._order:
            _check_plain(f"{name}.{key}", module, key)
        self.adapter = WholeAdapter(name, {key: module._parameters[key] for key in self._order}, scale)  # type: ignore[misc]
        self._kept: dict[str, Tensor] = {}
        for key in self._order:
            parametrize.register_parametrization(module, key, AddDifference(self.adapter, key))

    @property
    def fused(self) -> bool:
        return self.adapter.fused

    def check_fusable(self) -> None:
        """Do nothing: already checked in `__init__`."""

    @torch.no_grad()
    def fuse_for_good(self) -> None:
        for key, difference in self.adapter.deltas().items():
            original = self._original(key)
            original.copy_(original.float() + difference)
        self.adapter.fused = True

    @torch.no_grad()
    def fuse(self) -> None:
        self._kept = {key: self._original(key).detach().clone() for key in self._order}
        self.fuse_for_good()

    @torch.no_grad()
    def unfuse(self) -> None:
        if self.fused and not self._kept:
            raise ValueError(f"{self.name} was fused permanently; load the model again to remove it")
        for key, kept in self._kept.items():
            self._original(key).copy_(kept)
        self._kept, self.adapter.fused = {}, False

    def take_out(self, model: nn.Module, name: str) -> None:
        for key in self._order:
            parametrize.remove_parametrizations(self.module, key, leave_parametrized=False)
        own = self.module._parameters
        for key in self._slots:  # taken out and put back, a weight would come after its bias
            own[key] = own.pop(key)

    def _original(self, key: str) -> nn.Parameter:
        return self.module.parametrizations[key].original  # type: ignore[index,return-value]


class WholeAdapter(Fp32Module):
    """The differences of one module's parameters, fp32, from zero; in files `diff` (weight), `diff_b` (bias)."""

    SUFFIXES = {"weight": "diff", "bias": "diff_b"}

    def __init__(self, name: str, originals: dict[str, nn.Parameter], scale: float):
        super().__init__()
        self.name, self.scale, self.strength, self.fused = name, float(scale), 1.0, False
        self.suffixes = {key: self.SUFFIXES.get(key, f"diff_{key}") for key in originals}
        for key, original in originals.items():
            difference = torch.zeros(original.shape, dtype=torch.float32, device=original.device)
            self.register_parameter(self.suffixes[key], nn.Parameter(difference))

    def difference(self, key: str) -> nn.Parameter:
        return getattr(self, self.suffixes[key])

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """Return parameter name -> what is added to it, fp32, scale and strength included."""
        return {key: self.difference(key) * (self.scale * self.strength) for key in self.suffixes}

    def delta(self) -> Tensor:
        """Return what is added to the weight."""
        return self.deltas()["weight"]

    def file_tensors(self) -> dict[str, Tensor]:
        return {suffix: to_file(self.difference(key)) * self.scale for key, suffix in self.suffixes.items()}

    @torch.no_grad()
    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of a file; ValueError as Adapter.load_file_tensors."""
        wanted = {suffix: tuple(self.difference(key).shape) for key, suffix in self.suffixes.items()}
        check_tensors(self.name, tensors, wanted)
        for key, suffix in self.suffixes.items():
            self.difference(key).copy_(tensors[suffix].float() / (self.scale or 1.0))


class AddDifference(Fp32Module):
    """original -> original + difference, summed in fp32, in the original's type."""

    def __init__(self, adapter: WholeAdapter, key: str):
        super().__init__()
        self.difference = adapter.difference(key)
        self._adapter = [adapter]  # in a list, so that its parameters are not this module's

    def forward(self, original: Tensor) -> Tensor:
        adapter = self._adapter[0]
        if adapter.fused or adapter.strength == 0:
            return original
        return (original.float() + self.difference * (adapter.scale * adapter.strength)).to(original.dtype)


def owners_of_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Return dotted name -> module with parameters of its own. ValueError if the model already has adapters."""
    if any(isinstance(module, Fp32Module) for module in model.modules()):
        raise ValueError("targets: all needs a model without other adapters; eject them first")
    return {
        name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
    }


def _check_plain(name: str, module: nn.Module, key: str = "weight") -> None:
    tensor = getattr(module, key)
    if not tensor.is_floating_point() or parametrize.is_parametrized(module, key):
        raise ValueError(
            f"{name} is {tensor.dtype} ({type(module).__name__}): it cannot be changed; load it unquantized"
        )


@torch.no_grad()
def _sum_into(linear: nn.Module) -> None:
    """weight = original + all fused differences, in fp32, rounded once; with none left the original itself."""
    kept, fused = linear.__dict__["_unfused_weight"], linear.__dict__["_fused_adapters"]
    total = kept
    for adapter in fused:
        total = total.float() + adapter.delta().view_as(kept)
    linear.weight.copy_(total)  # type: ignore[operator]
    if not fused:
        del linear.__dict__["_unfused_weight"], linear.__dict__["_fused_adapters"]
