"""Read a part of a model (transformer, VAE, text encoder) from a .safetensors file, in diffusers' or original names.

The names are converted by diffusers' own functions, on shapes alone at first, so that what a file lacks is known before
anything is read. transformers renames the tensors of text encoders itself.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona_train.models.checkpointfile import CheckpointFile, listed
from diffusekrona_train.models.contracts import Config, Part
from diffusekrona_train.models.local import one_line_errors

FUNCTIONS = "diffusers.loaders.single_file_utils"
CONVERSIONS = {
    "ZImageTransformer2DModel": "convert_z_image_transformer_checkpoint_to_diffusers",
    "Flux2Transformer2DModel": "convert_flux2_transformer_checkpoint_to_diffusers",
    "FluxTransformer2DModel": "convert_flux_transformer_checkpoint_to_diffusers",
    "ChromaTransformer2DModel": "convert_chroma_transformer_checkpoint_to_diffusers",
    "SD3Transformer2DModel": "convert_sd3_transformer_checkpoint_to_diffusers",
    "Krea2Transformer2DModel": "convert_krea2_transformer_checkpoint_to_diffusers",
    "CosmosTransformer3DModel": "convert_cosmos_transformer_checkpoint_to_diffusers",
    "AutoencoderKL": "convert_ldm_vae_checkpoint",
    "AutoencoderKLFlux2": "convert_ldm_vae_checkpoint",
    "AutoencoderKLQwenImage": "convert_wan_vae_to_diffusers",
}
"""Class of a part -> diffusers' function that turns the original names into its own; others have the same names."""
COUNTER = "num_batches_tracked"
"""A batch norm's count of what it has seen, which files leave out: it is not used."""
HEAD = "lm_head.weight"
"""A language model's last layer: only hidden states are used."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class PartFile:
    """A part's tensors in `file`: those whose names begin with `prefix`, less what begins with one of `without`."""

    file: CheckpointFile
    prefix: str = ""
    without: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """Return what errors call it."""
        return f"model file {self.file.path.name!r}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name without the prefix -> shape of its weights."""
        return {
            name.removeprefix(self.prefix): self.file.shapes[name]
            for name in self.file.weights(self.prefix)
            if not name.removeprefix(self.prefix).startswith(self.without or ("\0",))
        }

    def _empty(self) -> Tensors:
        return {name: torch.empty(shape, device="meta") for name, shape in self.shapes().items()}

    def _read(self, dtype: torch.dtype) -> Tensors:
        found = self.file.read(self.prefix, dtype=dtype)
        return {name: found.pop(self.prefix + name) for name in self.shapes()}

    # ---- transformers and VAEs ----

    def check(self, config: Config, expected: Tensors) -> None:
        """Raise ValueError unless the file has every tensor of `expected` (diffusers' names, on any device), in its
        shape, and a transformer's file no other. `config` names the class."""
        found = self._converted(config, self._empty(), expected)
        cls = config["_class_name"]
        if missing := [name for name in expected if name not in found and not name.endswith(COUNTER)]:
            raise ValueError(f"{self.shown} lacks {listed(missing)} of its {cls}; use a complete file")
        for name, tensor in expected.items():
            if name in found and found[name].shape != tensor.shape:
                raise ValueError(
                    f"{self.shown}: {name} has shape {tuple(found[name].shape)}, its {cls} should have "
                    f"{tuple(tensor.shape)}; give model_config_dir with the configs of this model"
                )
        self.file.check_numbers([self.prefix + name for name in self.shapes()])

    def load(self, cls: Any, config: Config, dtype: torch.dtype) -> nn.Module:
        """Return the part with the file's weights in `dtype`."""
        from accelerate import init_empty_weights

        with one_line_errors(self.shown):
            with init_empty_weights():
                model = cls.from_config(dict(config))
            expected = model.state_dict()
            found = self._converted(config, self._read(dtype), expected)
            found |= {name: torch.tensor(0) for name in expected if name not in found and name.endswith(COUNTER)}
            for name, tensor in found.items():  # a slice of a fused weight would keep all of it alive
                if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
                    found[name] = tensor.clone()
            model.load_state_dict(found, strict=True, assign=True)
        return model

    def _converted(self, config: Config, tensors: Tensors, expected: Mapping[str, object]) -> Tensors:
        """Return the tensors in diffusers' names. ValueError where a name is missing or unknown."""
        cls: str = config["_class_name"]
        name = CONVERSIONS.get(cls)
        if name is None or expected.keys() <= tensors.keys():
            found, left = tensors, {}
        else:
            function = getattr(importlib.import_module(FUNCTIONS), name, None)
            if function is None:
                raise ValueError(f"{self.shown}: this diffusers cannot convert a {cls}; install diffusers 0.42")
            same, left = {key: tensors[key] for key in expected if key in tensors}, tensors
            try:
                found = {**same, **function(checkpoint=tensors, config=dict(config))}
            except (KeyError, IndexError) as error:
                raise ValueError(f"{self.shown} lacks {error} of its {cls}; use a complete file") from None
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{self.shown} is not a {cls} that diffusers can convert: {error}") from None
        unknown = [key for key in (*found, *left) if key not in expected]
        if unknown and not cls.startswith("Autoencoder"):
            raise ValueError(
                f"{self.shown} holds {listed(unknown)} that a {cls} of this config does not have; give "
                "model_config_dir with the configs of this model"
            )
        return {key: tensor for key, tensor in found.items() if key in expected}

    # ---- text encoders ----

    def text_lacks(self, cls: Any, config: Config) -> tuple[list[str], int]:
        """Return the tensors of a text encoder that are missing or of another shape, and how many more there are."""
        try:
            return self._text(cls, config, self._empty(), device_map="meta")[1:]
        except (RuntimeError, ValueError) as error:
            return [str(error).splitlines()[0][:200]], 0

    def load_text(self, cls: Any, config: Config, dtype: torch.dtype) -> nn.Module:
        """Return a text encoder with the file's weights in `dtype`; ValueError names what they lack."""
        with one_line_errors(self.shown):
            model, missing, _ = self._text(cls, config, self._read(dtype), dtype=dtype)
            if missing:
                raise ValueError(f"lacks {listed(missing)} of its {cls.__name__}; use a complete file")
        return model

    def _text(self, cls: Any, config: Config, tensors: Tensors, **options: Any) -> tuple[nn.Module, list[str], int]:
        """Build a text encoder from tensors -> (model, names that they lack, how many it has no use for)."""
        tied = {} if any(name.endswith(HEAD) for name in tensors) else {"tie_word_embeddings": True}
        made = cls.config_class(**{**config, **(tied if "CausalLM" in cls.__name__ else {})})
        found, told = cls.from_pretrained(None, config=made, state_dict=tensors, output_loading_info=True, **options)
        missing = [name for name in sorted(told["missing_keys"]) if not name.endswith(HEAD)]
        return found, missing + [str(entry) for entry in told["mismatched_keys"]], len(told["unexpected_keys"])


def assigned(
    files: Sequence[PartFile], parts: Sequence[Part], cls_of: Callable[[Part], Any], config_of: Callable[[str], Config]
) -> dict[str, PartFile]:
    """Return folder of a text encoder -> its file, told by what the files hold, in any order.

    ValueError for a file that is none of `parts`, or the same part as another.
    """
    found: dict[str, PartFile] = {}
    for file in files:
        fits = {part: file.text_lacks(cls_of(part), config_of(part.folder)) for part in parts}
        part = min(parts, key=lambda part: (len(fits[part][0]), fits[part][1], part.folder in found))
        lacking, _ = fits[part]
        if lacking:
            raise ValueError(
                f"{file.shown} is not a text encoder of this model ({', '.join(one.cls for one in parts)}): it lacks "
                f"{listed(lacking)}"
            )
        if part.folder in found:
            raise ValueError(f"{file.shown} and {found[part.folder].shown} are both the {part.folder}; keep one")
        found[part.folder] = file
    return found


def text_groups(file: CheckpointFile) -> list[PartFile]:
    """Return the text encoders of a file that holds all parts: below text_encoders.NAME.transformer."""
    pattern = re.compile(r"text_encoders\.[^.]+\.(?:transformer|model)\.")
    prefixes = dict.fromkeys(match[0] for name in file.shapes if (match := pattern.match(name)))
    return [PartFile(file, prefix) for prefix in prefixes]
