"""A model that was found but not loaded: its parts on request, its layers and identity.

`place` is where it lies: local.py has the folder, hub.py the hub repository, singlefile.py the single file. Each has
`config(part)` and `load_part(part, cls, dtype)`; diffusers and transformers are imported when a part is loaded.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass, field
from typing import Any

PARTS = ("denoiser", "vae", "text_encoders", "tokenizers", "scheduler")

TARGET = re.compile(r"(?P<name>.+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))\.weight")


@dataclass
class ModelSource:
    """A found model. `family` knows how to use it, `place` where its parts lie; nothing is loaded until `load`."""

    model: str
    place: Any
    family: Any
    vae: str | None = None
    _layers: list = field(default_factory=list, repr=False)

    @property
    def identity(self) -> str:
        """What an adapter file may say about its base: hub name, `toybox`, or base name and hash; never a path."""
        return self.place.identity

    @property
    def alias(self) -> str | None:
        """Short name where the package knows the model by itself: sdxl, sd15, sd14, sd21, toybox."""
        return self.place.alias

    @functools.cached_property
    def prediction_type(self) -> str:
        """'epsilon' or 'v_prediction', from the scheduler's config."""
        found = self.place.config("scheduler").get("prediction_type", "epsilon")
        if found not in ("epsilon", "v_prediction"):
            raise ValueError(f"model {self.model!r}: prediction_type {found!r} is none of epsilon, v_prediction")
        return found

    @functools.cached_property
    def default_resolution(self) -> int:
        """Side in pixels that the model was trained for."""
        blocks = self.place.config("vae")["block_out_channels"]
        return int(self.place.config("unet")["sample_size"]) * 2 ** (len(blocks) - 1)

    def layers(self) -> list:
        """All attention and feed-forward linears as adapters.Layer rows, without loading a weight."""
        if not self._layers:
            from diffusekrona_train.models import layers as tables

            known = self.alias if self.alias != "toybox" else None
            self._layers = tables.layer_table(known) if known else layers_of(self._meta_shapes)
        return list(self._layers)

    def base_parameters(self) -> int:
        """Number of parameters of the denoiser."""
        if self.alias and self.alias != "toybox":
            from diffusekrona_train.models import layers as tables

            return tables.base_parameters(self.alias)
        return sum(shape.numel() for shape in self._meta_shapes.values())

    @functools.cached_property
    def _meta_shapes(self) -> dict[str, Any]:
        import torch
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            model = UNet2DConditionModel.from_config(self.place.config("unet"))
        return {name: tensor.shape for name, tensor in model.named_parameters()}

    def load(self, *parts: str, dtype: Any = None, device: Any = "cpu") -> dict[str, Any]:
        """Load the named PARTS (all without names) in `dtype` (fp32 without one), frozen and in eval mode."""
        import torch

        quiet()
        unknown = [part for part in parts if part not in PARTS]
        assert not unknown, f"unknown parts {unknown}; there are {PARTS}"
        loaders = {
            "denoiser": lambda: self.load_denoiser(dtype, device),
            "vae": lambda: self._load_vae(dtype or torch.float32, device),
            "text_encoders": lambda: self._load_text_encoders(dtype or torch.float32, device),
            "tokenizers": self._load_tokenizers,
            "scheduler": self._load_scheduler,
        }
        return {part: loaders[part]() for part in (parts or PARTS)}

    def load_denoiser(self, dtype: Any = None, device: Any = "cpu", quantize: str = "none") -> Any:
        """The denoiser, frozen; quantize 'nf4' or 'int8' keeps its transformer linears in 4 or 8 bits."""
        quiet()
        import torch
        from diffusers import UNet2DConditionModel

        model = self.place.load_part("unet", UNet2DConditionModel, torch_dtype=dtype or torch.float32)
        if quantize != "none":
            from diffusekrona_train.models.quantize import quantize_linears

            quantize_linears(model, quantize, dtype or torch.float32)
        return _frozen(model, device)

    def _load_vae(self, dtype: Any, device: Any) -> Any:
        from diffusers import AutoencoderKL

        if self.vae:
            from diffusekrona_train.models.singlefile import load_other_vae

            return _frozen(load_other_vae(self.vae, self.place.config("vae"), dtype), device)
        return _frozen(self.place.load_part("vae", AutoencoderKL, torch_dtype=dtype), device)

    def _load_text_encoders(self, dtype: Any, device: Any) -> list:
        import transformers

        # transformers reads a config's own dtype (fp16 files stay fp16) unless it is told one
        return [
            _frozen(self.place.load_part(part, getattr(transformers, cls), dtype=dtype), device)
            for part, cls in self.family.text_encoders
        ]

    def _load_tokenizers(self) -> list:
        from transformers import CLIPTokenizer

        return [self.place.load_part(part, CLIPTokenizer) for part in self.family.tokenizers]

    def _load_scheduler(self) -> Any:
        import diffusers

        config = self.place.config("scheduler")
        cls = getattr(diffusers, config.get("_class_name", "DDIMScheduler"), None)
        if cls is None:
            raise ValueError(f"model {self.model!r}: diffusers has no scheduler {config['_class_name']!r}")
        return cls.from_config(config)


def layers_of(shapes: dict[str, Any]) -> list:
    """adapters.Layer rows from a denoiser's parameter names and shapes, in the model's own order."""
    from diffusekrona_train.models.layers import describe_layer

    matches = ((TARGET.fullmatch(key), shape) for key, shape in shapes.items())
    return [describe_layer(match["name"], int(shape[1]), int(shape[0])) for match, shape in matches if match]


@functools.cache
def quiet() -> None:
    """Keep the libraries' progress bars and advice out of a user's terminal; their errors still come through."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _frozen(model: Any, device: Any) -> Any:
    return model.to(device).eval().requires_grad_(False)
