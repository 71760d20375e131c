"""Train every parameter of a denoiser (`type: full, targets: all`): a difference on each, by parametrization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffusekrona_train.adapters.base import Fp32Module, check_plain, check_tensors, to_file


def whole_modules(model: nn.Module, names: list[str], scale: float) -> dict[str, WholeModule]:
    """Put a difference on every parameter of the modules `names` (dotted), or of all modules if there are none.

    Raises ValueError where a name has no parameters, or where the model already has adapters.
    """
    if any(isinstance(module, Fp32Module) for module in model.modules()):
        raise ValueError("targets: all needs a model without other adapters; eject them first")
    found = {
        name: module for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
    }
    if unknown := [name for name in names if name not in found]:
        raise ValueError(f"{unknown[0]} is not a module with parameters of this {type(model).__name__}")
    return {name: WholeModule(name, found[name], scale) for name in names or found}


class WholeModule:
    """All parameters of one module, trained as fp32 differences: `adapter` holds them, `original + difference` is what
    the module sees. The originals are never written (but by `fuse`, which keeps a copy)."""

    def __init__(self, name: str, module: nn.Module, scale: float):
        self.name, self.module = name, module
        self._slots = list(module._parameters)
        self._order = [key for key, value in module._parameters.items() if value is not None]
        for key in self._order:
            check_plain(f"{name}.{key}", module, key)
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
