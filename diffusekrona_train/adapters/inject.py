"""Inject adapters into a model and eject them: which layers (by role, never by substring), strength, fuse, eject.

    injection = inject(unet, AdapterConfig(a1=4, a2=64), seed=0)
    injection.parameters()      # fp32, all that trains
    injection.set_strength(0)   # exactly the base
    injection.eject()           # bit for bit the model as it was

Several injections may sit on one model; each sees only its own adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters import Fp32Module, Options, build_adapter, plan
from diffusekrona_train.adapters.bounds import sigma_of
from diffusekrona_train.adapters.flat import FlatFactors
from diffusekrona_train.adapters.grouped import AdaptedLinear, Chooser, flatten
from diffusekrona_train.adapters.texts import Texts
from diffusekrona_train.adapters.whole import WholeModule, whole_modules
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import find_layers, find_others, select_layers

__all__ = ["AdaptedLinear", "Injection", "find_layers", "inject", "select_layers"]


def inject(
    model: nn.Module, spec: AdapterConfig, *, seed: int = 0, options: dict[str, Options] | None = None
) -> Injection:
    """Wrap the layers that `spec` chooses (or those named in `options`, from a file); everything else is frozen.

    A layer's start depends on (seed, its name) alone. Raises ValueError where a target is not there.
    """
    return Injection(model, spec, seed, options)


class Injection:
    """The adapters of one subject in one model. `adapters` maps dotted layer names to modules, in the model's order."""

    def __init__(
        self,
        model: nn.Module,
        spec: AdapterConfig,
        seed: int = 0,
        options: dict[str, Options] | None = None,
        placed: bool = True,
    ):
        """Build the adapters and put them into the model; not `placed`, the model stays as it is (see `packed`)."""
        self.model, self.spec, self.seed, self._placed = model, spec, seed, placed
        self._sites: dict[str, AdaptedLinear | WholeModule] = {}
        self.flat: FlatFactors | None = None
        self.texts = Texts()
        self._thawed = [parameter for parameter in _foreign_parameters(model) if parameter.requires_grad]
        if spec.is_whole:
            assert placed, "full fine-tuning is a part of the model"
            self._sites.update(whole_modules(model, list(options or {}), spec.scale))
            self.options = {name: {} for name in self._sites}
        else:
            self._inject_linears(options)
        for parameter in self._thawed:
            parameter.requires_grad_(False)
        self.adapters = {name: site.adapter for name, site in self._sites.items()}

    def _inject_linears(self, options: dict[str, Options] | None) -> None:
        if options is None:
            layers = find_layers(self.model, self.spec)
            self.options = plan(self.spec, layers)
        else:
            everything = {layer.name: layer for layer in [*find_layers(self.model, None), *find_others(self.model)]}
            if unknown := [name for name in options if name not in everything]:
                raise ValueError(f"{unknown[0]} is not a layer of this {type(self.model).__name__} that can be adapted")
            layers = [everything[name] for name in options]
            self.options = {name: dict(value) for name, value in options.items()}
        for layer in layers:
            base = self.model.get_submodule(layer.name)
            adapter = build_adapter(self.spec, layer, self.options[layer.name], _generator(self.seed, layer.name))
            adapter.to(next(base.parameters()).device)
            self._sites[layer.name] = AdaptedLinear(base, adapter)
        for name, site in self._sites.items() if self._placed else ():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, site)

    # --- what trains

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Yield ("layer|parameter", fp32 parameter) in a fixed order."""
        return [(f"{n}|{p}", value) for n, adapter in self.adapters.items() for p, value in adapter.named_parameters()]

    def flatten(self, by_operator: Chooser | None = None) -> FlatFactors:
        """Move parameters and gradients into flat buffers (see `grouped.flatten`), for an optimiser."""
        sites = {name: site for name, site in self._sites.items() if isinstance(site, AdaptedLinear)}
        self.texts = Texts()
        self.flat = flatten([self.adapters], by_operator, sites, self.texts)
        return self.flat

    def base_sigmas(self) -> dict[str, float]:
        """Return layer name -> largest singular value of its own weight (see `bounds.sigma_of`)."""
        sites = {name: self.model.get_submodule(name) for name in self.adapters}
        linears = {name: site for name, site in sites.items() if isinstance(site, AdaptedLinear)}
        return {name: sigma_of(site.innermost(), site.in_features) for name, site in linears.items()}

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    @property
    def count(self) -> int:
        """Count trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, mode: bool = True) -> Injection:
        for adapter in self.adapters.values():
            adapter.train(mode)
        return self

    def assert_fp32(self) -> None:
        """Check that the masters are fp32 and trainable; gradients of fp16 ones could not be unscaled."""
        for name, parameter in self.named_parameters():
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}, not fp32"
            assert parameter.requires_grad, f"{name} is frozen"

    def state_dict(self) -> dict[str, Tensor]:
        """ "layer|parameter" -> fp32 tensor, detached and not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state_dict; ValueError, with nothing changed, names what is missing, unknown or of another shape."""
        own = dict(self.named_parameters())
        for word, names in (("missing", own.keys() - state.keys()), ("unknown", state.keys() - own.keys())):
            if names:
                raise ValueError(f"adapter state: {min(names)} is {word} ({len(names)} such in all)")
        for name, parameter in own.items():
            if state[name].shape != parameter.shape:
                raise ValueError(
                    f"adapter state: {name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}"
                )
        for name, parameter in own.items():
            parameter.copy_(state[name])
        if self.flat is not None:
            self.flat.refresh()
        self.assert_fp32()

    # --- how strongly it acts

    def set_strength(self, strength: float) -> None:
        """Multiply what the adapters add; 0 is exactly the base model."""
        if self.fused:
            raise ValueError("the adapter is fused into the weights; unfuse before its strength changes")
        for adapter in self.adapters.values():
            adapter.strength = float(strength)

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Make the model the base model inside the block (a teacher, an image without the subject); strengths return
        after."""
        before = [adapter.strength for adapter in self.adapters.values()]
        self.set_strength(0.0)
        try:
            yield
        finally:
            for adapter, strength in zip(self.adapters.values(), before, strict=True):
                adapter.strength = strength

    @property
    def fused(self) -> bool:
        return any(site.fused for site in self._sites.values())

    def fuse(self, keep: bool = True) -> None:
        """Add ΔW to the weights themselves: summed in fp32, rounded once.

        The originals are kept for `unfuse`, as large again as the adapted layers (SDXL in fp16: 1.7 GB). With `keep`
        False they are not, and `unfuse` and `eject` raise ValueError.
        """
        if keep:
            self._each("fuse")
            return
        for site in self._sites.values():
            site.check_fusable()
        for site in self._sites.values():
            if not site.fused:
                site.fuse_for_good()

    def unfuse(self) -> None:
        """Put the kept weights back (never by subtraction, which loses most of a small delta in bf16)."""
        self._each("unfuse")

    def _each(self, step: str) -> None:
        done: list[Callable[[], None]] = []
        try:
            for site in self._sites.values():
                if site.fused != (step == "fuse"):
                    getattr(site, step)()
                    done.append(getattr(site, "unfuse" if step == "fuse" else "fuse"))
        except ValueError:
            for undo in done:
                undo()
            raise

    def eject(self) -> nn.Module:
        """Remove the adapters: the model is bit-identical to before, and is returned."""
        self.unfuse()
        for name, site in self._sites.items():
            site.take_out(self.model, name)
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        self._thawed = []
        self._sites = {}
        self.texts.ahead.clear()
        return self.model


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _foreign_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the model's own parameters: not those of adapters that are in it already."""
    adapters = (module for module in model.modules() if isinstance(module, Fp32Module))
    own = {id(parameter) for adapter in adapters for parameter in adapter.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]
