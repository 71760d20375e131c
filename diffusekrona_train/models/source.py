"""A model that is found but not loaded: its parts on request, its layers and identity.

`place` is where it lies: local.py has the folder, hub.py the hub repository, singlefile.py the single file. Each has
`config(part)` and `load_part(part, cls, dtype)`; diffusers and transformers are imported when a part is loaded.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffusekrona_train.common.device import DTYPES
from diffusekrona_train.config import EMBEDDED
from diffusekrona_train.models import layers as tables
from diffusekrona_train.models.checkpointfile import CheckpointFile
from diffusekrona_train.models.checks import check_latents, check_numbers
from diffusekrona_train.models.contracts import Config, Denoiser, Family, Layer, Part, Place, Process
from diffusekrona_train.models.hub import HubModel
from diffusekrona_train.models.partfile import PartFile, assigned

PARTS = ("denoiser", "vae", "text_encoders", "tokenizers", "scheduler")
Device = torch.device | str
Module = TypeVar("Module", bound=nn.Module)


@dataclass
class ModelSource:
    """A found model. `family` knows how to use it, `place` where its parts lie; nothing is loaded until `load`."""

    model: str
    place: Place
    family: Family
    vae: str | None = None
    predicts: str | None = None
    """The user's prediction_type, for models whose files do not have one."""
    text_encoders: Sequence[str] = ()
    """Files of text encoders instead of the model's own, in any order."""
    text_precision: str = "auto"
    """How text encoders are held: auto, fp32, bf16, or int8 (by bitsandbytes, computed in bf16)."""
    _layers: list[Layer] = field(default_factory=list, repr=False)
    _whole: set[str] = field(default_factory=set, repr=False)

    @property
    def identity(self) -> str:
        """Return what an adapter file may record about its base: hub name, `toybox`, or base name and hash; never a
        path."""
        return self.place.identity

    @property
    def alias(self) -> str | None:
        """Return the short name if the package knows the model: sdxl, toybox, z-image, …"""
        return self.place.alias

    @property
    def like(self) -> str:
        """Return the name that the package may know the model by: its own, or for a single transformer's file that of
        the repository which has its other parts."""
        base = getattr(self.place, "base", None)
        return base.name if isinstance(base, HubModel) else self.identity

    @functools.cached_property
    def denoiser_config(self) -> Config:
        """Return the denoiser's own config."""
        return self.place.config(self.family.parts.denoiser.folder)

    @functools.cached_property
    def vae_config(self) -> Config:
        """Return the config of the model's own VAE."""
        return self.place.config(self.family.parts.vae.folder)

    @functools.cached_property
    def scheduler_config(self) -> Config:
        """Return the scheduler's config, with the prediction type that was asked for."""
        return self.place.config("scheduler") | ({"prediction_type": self.predicts} if self.predicts else {})

    def process(self, side: int | None = None) -> Process:
        """Return the process for images with `side` pixels a side, the model's own size without one. ValueError names
        the model where its scheduler's config cannot be followed."""
        try:
            return self.family.process(self.scheduler_config, side or self.default_resolution)
        except ValueError as error:
            raise ValueError(f"model {self.model!r}: {error}") from None

    @functools.cached_property
    def prediction_type(self) -> str:
        """Return 'epsilon', 'v_prediction' or 'sample', by the user or the scheduler's config; 'flow' for flow
        models."""
        return self.process().prediction_type

    @functools.cached_property
    def default_resolution(self) -> int:
        """Return the side in pixels that the model was trained for."""
        return self.family.default_resolution(self.denoiser_config, self.vae_config)

    def layers(self) -> list[Layer]:
        """Return all layers that can be adapted, without loading a weight."""
        if not self._layers:
            known = self.alias if self.alias in tables.TABLES and self.alias not in EMBEDDED else None
            linears = tables.linears_of_shapes(self._meta_shapes) if known is None else {}
            self._layers = tables.layer_table(known) if known else self.family.layers(linears)
        return list(self._layers)

    def others(self) -> list[Layer]:
        """Return the layers that only files of other tools adapt, without loading a weight."""
        known = self.alias in tables.TABLES and self.alias not in EMBEDDED
        return [] if known else tables.others(self.family, tables.linears_of_shapes(self._meta_shapes))

    def base_parameters(self) -> int:
        """Count the parameters of the denoiser."""
        if self.alias in tables.TABLES and self.alias not in EMBEDDED:
            return tables.base_parameters(self.alias)
        return sum(shape.numel() for shape in self._meta_shapes.values())

    def parameters_of(self, part: Part) -> int:
        """Count the parameters of a part, without loading a weight."""
        return sum(value.numel() for value in self._meta_model(part).parameters())

    @functools.cached_property
    def _meta_shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._meta_model(self.family.parts.denoiser).named_parameters()}

    def _meta_model(self, part: Part) -> nn.Module:
        """Build a part without weights, from its config."""
        cls, config = class_of(part), self.place.config(part.folder)
        with torch.device("meta"):
            return cls.from_config(config) if part.library == "diffusers" else cls(cls.config_class(**config))

    def check(self) -> None:
        """Raise ValueError if this is not a base to train or sample with: another process, other latents than its
        VAE's, files that lack tensors. Loads no weights."""
        self.process()
        check_latents(self.model, self.denoiser_config, self.vae_config)
        parts = self.family.parts
        for part in (parts.denoiser, *([] if self.vae else [parts.vae]), *parts.text_encoders):
            self.check_part(part)

    def check_part(self, part: Part) -> None:
        """Raise ValueError naming what a part lacks, where the place can tell without loading it."""
        if self.alias in EMBEDDED or part.folder in self._whole:  # they have checksums, and need no diffusers here
            return
        if part in self.family.parts.text_encoders and part.folder in self.text_files:
            return
        check: Any = getattr(self.place, "check_part", None)
        if check is not None:
            check(part.folder, self.family.name, lambda: self._meta_model(part).state_dict())
        self._whole.add(part.folder)

    @functools.cached_property
    def text_files(self) -> dict[str, PartFile]:
        """Return folder of a text encoder -> the file that it is read from, if that is not the model's folder or
        repository. ValueError where a file is none of the family's."""
        files = [PartFile(CheckpointFile(Path(name).expanduser())) for name in self.text_encoders]
        files += getattr(self.place, "text_files", []) if not files else []
        parts = [part for part in self.family.parts.text_encoders if part.library == "transformers"]
        if not files:
            return {}
        quiet()
        return assigned(files, parts, class_of, self.place.config)

    def _part(self, part: Part, dtype: torch.dtype, device: Device = "cpu") -> Any:
        """Load a part in `dtype`; it is complete and has finite numbers. A place that can reads it onto the device at
        once, tensor by tensor, so that no process holds a second copy in host memory."""
        self.check_part(part)
        key = {"transformers": "dtype", "diffusers": "torch_dtype"}[part.library]
        where = {} if torch.device(device).type == "cpu" else {"device_map": {"": torch.device(device)}}
        model = self.place.load_part(part.folder, class_of(part), **{key: dtype}, **where)
        check_numbers(f"model {self.model!r}, part {part.folder}", model)
        return model

    def load(self, *parts: str, dtype: torch.dtype | None = None, device: Device = "cpu") -> dict[str, Any]:
        """Load the named PARTS (all without names), frozen and in eval mode.

        They are in `dtype`; without one in fp32, text encoders in the type that the family names.
        """
        quiet()
        unknown = [part for part in parts if part not in PARTS]
        assert not unknown, f"unknown parts {unknown}; there are {PARTS}"
        loaders = {
            "denoiser": lambda: self.load_denoiser(dtype, device),
            "vae": lambda: self._load_vae(dtype or torch.float32, device),
            "text_encoders": lambda: self._load_text_encoders(dtype, device),
            "tokenizers": self._load_tokenizers,
            "scheduler": self._load_scheduler,
        }
        return {part: loaders[part]() for part in (parts or PARTS)}

    def load_denoiser(
        self,
        dtype: torch.dtype | None = None,
        device: Device = "cpu",
        quantize: str = "none",
        offload: bool = False,
    ) -> Denoiser:
        """Load the denoiser, frozen; quantize 'nf4', 'int8' or 'fp8' keeps the linears that its family names in 4 or 8
        bits, `offload` keeps them in host memory, from where they come to `device` block by block."""
        quiet()
        home = device if quantize == "none" and not offload else "cpu"  # what is quantised rounds where it moves
        model: Denoiser = self._part(self.family.parts.denoiser, dtype or torch.float32, home)
        if offload:
            from diffusekrona_train.models.stored import store_linears

            store_linears(model, quantize, self.family.quantizes, torch.device(device))
        elif quantize != "none":
            from diffusekrona_train.models.quantize import quantize_linears

            quantize_linears(model, quantize, dtype or torch.float32, self.family.quantizes)
        return _frozen(model, device)

    def _load_vae(self, dtype: torch.dtype, device: Device) -> nn.Module:
        check_latents(self.model, self.denoiser_config, self.vae_config)
        if self.vae:
            from diffusekrona_train.models.singlefile import load_other_vae

            vae = load_other_vae(self.vae, class_of(self.family.parts.vae), self.vae_config, dtype)
            check_numbers(f"vae {self.vae!r}", vae)
            return _frozen(vae, device)
        return _frozen(self._part(self.family.parts.vae, dtype), device)

    def _load_text_encoders(self, dtype: torch.dtype | None, device: Device) -> list[nn.Module]:
        # transformers reads a config's own dtype (fp16 files stay fp16) unless a dtype is passed
        return [self._text_encoder(part, dtype, device) for part in self.family.parts.text_encoders]

    def _text_encoder(self, part: Part, dtype: torch.dtype | None, device: Device) -> nn.Module:
        held = self.text_files.get(part.folder)
        if held is None:
            model: nn.Module = self._part(part, dtype or self.text_dtype(part))
        else:
            config = self.place.config(part.folder)
            model = held.load_text(class_of(part), config, dtype or self.text_dtype(part))
            check_numbers(f"{held.shown}, part {part.folder}", model)
        if dtype is None and self.text_precision == "int8":
            from diffusekrona_train.models.quantize import quantize_linears

            quantize_linears(model, "int8", torch.bfloat16, _in_a_block)
        return _frozen(model, device)

    def text_dtype(self, part: Part) -> torch.dtype:
        """Return the type that a text encoder is held in while prompts are encoded: what `text_precision` says, else
        the family's own, fp32 for the small ones of the package."""
        if self.text_precision != "auto":
            return DTYPES.get(self.text_precision, torch.bfloat16)
        return torch.float32 if self.alias in EMBEDDED else part.dtype

    def _load_tokenizers(self) -> list[Any]:
        return [self.place.load_part(part.folder, class_of(part)) for part in self.family.parts.tokenizers]

    def _load_scheduler(self) -> Any:
        import diffusers

        self.process()  # which refuses a scheduler of another process
        config = self.scheduler_config
        cls = getattr(diffusers, config.get("_class_name", "DDIMScheduler"), None)
        if cls is None:
            raise ValueError(f"model {self.model!r}: diffusers has no scheduler {config['_class_name']!r}")
        try:
            return cls.from_config(config)
        except ImportError as error:
            raise ValueError(
                f"model {self.model!r}: its scheduler cannot be used: {' '.join(str(error).split())}"
            ) from None


def _in_a_block(name: str) -> bool:
    """Return whether a linear of a text encoder is in one of its repeated layers."""
    return re.search(r"\.\d+\.", name) is not None


def class_of(part: Part) -> Any:
    """Return the class of a part."""
    return getattr(importlib.import_module(part.library), part.cls)


def quiet() -> None:
    """Keep the libraries' progress bars and advice out of a user's terminal; their errors still come through."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _frozen(model: Module, device: Device) -> Module:
    return model.to(device).eval().requires_grad_(False)
