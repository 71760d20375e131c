"""Open the transformer of a flow model from one .safetensors file, as ComfyUI has it; nothing is downloaded for it.

A file is told by its tensors' names, in the original or in diffusers' naming. It may hold the VAE and the text encoders
too. What it does not hold (tokenizers, scheduler, configs) comes from `base`: a folder, or the repository of the model.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusekrona_train.config.known import config_file, known_models
from diffusekrona_train.models.checkpointfile import CheckpointFile
from diffusekrona_train.models.contracts import Config, Place
from diffusekrona_train.models.hub import HubModel
from diffusekrona_train.models.partfile import PartFile, text_groups

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "")
"""What may stand before the names of a transformer's tensors."""
VAES = ("first_stage_model.", "vae.")
TEXTS = "text_encoders."
"""What stands before the names of the other parts, where a file holds them."""
CONDITIONER = "llm_adapter."
"""Anima's text conditioner, which its file holds beside the transformer."""


@dataclass(frozen=True)
class Marks:
    """How a class of transformers is told: `names` that no other has, and the numbered `blocks` that its size is told
    by, with the field of the config that counts them."""

    names: tuple[str, ...]
    blocks: str
    count: str


CLASSES = {
    "ZImageTransformer2DModel": Marks(
        ("noise_refiner.0.attention.qkv.weight", "noise_refiner.0.attention.to_q.weight"),
        r"layers\.(\d+)\.",
        "n_layers",
    ),
    "Flux2Transformer2DModel": Marks(
        ("double_stream_modulation_img.lin.weight", "double_stream_modulation_img.linear.weight"),
        r"single_(?:transformer_)?blocks\.(\d+)\.",
        "num_single_layers",
    ),
    "ChromaTransformer2DModel": Marks(
        ("distilled_guidance_layer.in_proj.weight",), r"single_(?:transformer_)?blocks\.(\d+)\.", "num_single_layers"
    ),
    "FluxTransformer2DModel": Marks(
        ("double_blocks.0.img_mod.lin.weight", "single_transformer_blocks.0.norm.linear.weight"),
        r"single_(?:transformer_)?blocks\.(\d+)\.",
        "num_single_layers",
    ),
    "SD3Transformer2DModel": Marks(
        ("joint_blocks.0.x_block.attn.qkv.weight", "pos_embed.pos_embed"),
        r"(?:joint|transformer)_blocks\.(\d+)\.",
        "num_layers",
    ),
    "QwenImageTransformer2DModel": Marks(
        ("transformer_blocks.0.img_mod.1.weight",), r"transformer_blocks\.(\d+)\.", "num_layers"
    ),
    "Krea2Transformer2DModel": Marks(
        ("txtfusion.projector.weight", "text_fusion.projector.weight"),
        r"(?:transformer_)?blocks\.(\d+)\.",
        "num_layers",
    ),
    "CosmosTransformer3DModel": Marks(
        ("blocks.0.adaln_modulation_self_attn.1.weight", "patch_embed.proj.weight"),
        r"(?:transformer_)?blocks\.(\d+)\.",
        "num_layers",
    ),
}
"""Class of a transformer -> its marks; the first that fits is taken."""
SAID = {
    "z-image-turbo": "turbo",
    "krea-2-turbo": "turbo",
    "klein-4b": "base",
    "klein-9b": "base",
    "flux1-krea-dev": "krea",
    "qwen-image-2512": "2512",
}
"""Alias of a model -> what its file's name says where another has tensors of the same shapes."""


def recognised(file: CheckpointFile) -> tuple[str, str] | None:
    """Return (class, prefix) of the transformer in a file, None where there is none that is known."""
    for cls, marks in CLASSES.items():
        for prefix in PREFIXES:
            if any(prefix + name in file.shapes for name in marks.names):
                return cls, prefix
    return None


def likely_alias(file: CheckpointFile, cls: str, prefix: str) -> str | None:
    """Return the alias of the model whose config has as many blocks, told by the file's name where several have."""
    pattern, names = re.compile(CLASSES[cls].blocks), [name.removeprefix(prefix) for name in file.weights(prefix)]
    blocks = len({match[1] for name in names if (match := pattern.match(name))})
    guided = any(re.match(r"guidance_in\.|.*\.guidance_embedder\.", name) for name in names)

    def fits(alias: str) -> bool:
        config: Config = json.loads(config_file(alias, "transformer/config.json").read_text())
        size = config.get("_class_name"), config.get(CLASSES[cls].count), bool(config.get("guidance_embeds"))
        return size == (cls, blocks, guided)

    fitting = [alias for alias in known_models() if fits(alias)]
    said = [alias for alias in fitting if SAID.get(alias, "\0") in file.path.name.lower()]
    return next(iter([*said, *(alias for alias in fitting if alias not in SAID)]), None)


@dataclass
class TransformerFile:
    """One file with a transformer. `base` has everything that the file does not hold."""

    path: Path
    file: CheckpointFile
    cls: str
    prefix: str
    base: Place

    def __post_init__(self) -> None:
        found = self.config("transformer").get("_class_name")
        if found != self.cls:
            raise ValueError(
                f"model file {self.path.name!r} holds a {self.cls}, and {self.base.identity!r} is a {found}; give the "
                "model_config_dir of this model"
            )

    @property
    def alias(self) -> str | None:
        """Return None: its weights may be anyone's."""
        return None

    @property
    def identity(self) -> str:
        """Return base name and hash of the weights; never a path."""
        return self.file.identity

    @functools.cached_property
    def text_files(self) -> list[PartFile]:
        """Return the text encoders in the file, which are told by what they hold."""
        return text_groups(self.file)

    def held(self, part: str) -> PartFile | None:
        """Return where in the file a part of a folder is, None where `base` has it."""
        if part == "transformer":
            return PartFile(self.file, self.prefix, (CONDITIONER, *VAES, TEXTS))
        if part == "vae":
            return next((PartFile(self.file, prefix) for prefix in VAES if self.file.weights(prefix)), None)
        if part == "text_conditioner" and self.file.weights(self.prefix + CONDITIONER):
            return PartFile(self.file, self.prefix + CONDITIONER)
        return None

    def config(self, part: str) -> dict[str, Any]:
        return self.base.config(part)

    def check_part(self, part: str, family: str, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Raise ValueError naming what the file lacks of a part that it holds."""
        held = self.held(part)
        if held is not None:
            held.check(self.config(part), tensors())

    def load_part(self, part: str, cls: type, **options: Any) -> Any:
        held = self.held(part)
        if held is None:
            return self.base.load_part(part, cls, **options)
        return held.load(cls, self.config(part), options["torch_dtype"])


def open_transformer(path: Path, file: CheckpointFile, found: tuple[str, str], base: Place | None) -> TransformerFile:
    """Open a recognised file; without `base` its other parts are those of the model on the hub that it seems to be."""
    cls, prefix = found
    if base is None:
        alias = likely_alias(file, cls, prefix)
        if alias is None:
            raise ValueError(
                f"model file {path.name!r} is a {cls} of a size that no model known here has; give model_config_dir: "
                "the folder, alias or hub name of the model whose configs and other parts it goes with"
            )
        base = HubModel(known_models()[alias].hub, alias=alias)
    return TransformerFile(path, file, cls, prefix, base)
