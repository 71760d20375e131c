"""Load a model from one .safetensors file in the layout of the original releases; nothing is downloaded.

The file holds weights only. Configs come from package data, chosen by key shapes, or from the user's `model_config_dir`
(a folder in diffusers' layout, weights not needed); the CLIP tokenizer from its byte-pair merges in package data.
"""

from __future__ import annotations

import functools
import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona_train.models.checkpointfile import CheckpointFile
from diffusekrona_train.models.contracts import Config
from diffusekrona_train.models.hub import HubModel
from diffusekrona_train.models.local import ASSETS, LocalModel, one_line_errors
from diffusekrona_train.models.original import (
    BIG_CLIP_PREFIX,
    CLIP_PREFIX,
    DENOISER,
    VAE,
    original_tensors,
    vae_tensors,
)
from diffusekrona_train.models.partfile import PartFile

CONFIGS = ASSETS / "configs"
SPOKEN = {"unet": "denoiser", "vae": "VAE", "text_encoder_2": "second text encoder"}
OTHERS = {
    "conv_in.weight": "only a denoiser in diffusers' layout",
    "decoder.conv_in.weight": "only a VAE (give it in vae)",
    "decoder.conv1.weight": "only a VAE (give it in vae)",
    "model.embed_tokens.weight": "only a text encoder (give it in text_encoders)",
    "text_model.embeddings.token_embedding.weight": "only a text encoder (give it in text_encoders)",
    "shared.weight": "only a text encoder (give it in text_encoders)",
}
"""Tensor of a file that is not a model -> what the file has."""
CROSS_WIDTH = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Width of the text embedding -> packaged configs."""


@dataclass
class SingleFile:
    """One checkpoint file; `config_folder` replaces the packaged configs. `own_vae` False: its VAE is not needed."""

    path: Path
    config_folder: str | None = None
    alias: str | None = None
    own_vae: bool = True

    def __post_init__(self) -> None:
        self.file = CheckpointFile(self.path)
        check_checkpoint(self.path, self.file.shapes, self.own_vae)
        if self.config_folder is not None and not Path(self.config_folder).is_dir():
            raise ValueError(f"model_config_dir {self.config_folder!r} is not a folder")
        name = packaged_configs(self.path, self.file.shapes, self.file.metadata) if self.config_folder is None else ""
        self.configs = LocalModel(Path(self.config_folder) if self.config_folder else CONFIGS / name)

    @property
    def identity(self) -> str:
        """Return base name and hash of the weights; never a path."""
        return self.file.identity

    def config(self, part: str) -> dict[str, Any]:
        found = self.configs.config(part)
        if part == "scheduler" and self.config_folder is None:
            marks, said = self.file.stored, self.file.metadata.get("modelspec.prediction_type")
            if "v_pred" in marks or said in ("v", "v_prediction"):
                found["prediction_type"] = "v_prediction"
            if "ztsnr" in marks:
                found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return found

    def check_part(self, part: str, family: str, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Raise ValueError naming what the file lacks of a part with these tensors (on the meta device, diffusers'
        names)."""
        second = any(name.startswith(f"{CLIP_PREFIX[family]}model.") for name in self.file.shapes)
        expected = original_tensors(part, family, tensors(), self.config(part), second)
        self.file.check_complete(SPOKEN.get(part, "text encoder"), expected)

    def load_part(self, part: str, cls: type, **options: Any) -> Any:
        options.pop("device_map", None)  # the file's tensors are renamed and cast in host memory
        folder = str(self.configs.path)
        with one_line_errors(f"model file {self.path.name!r}, part {part}"):
            if part.startswith("tokenizer"):
                return load_tokenizer(self.configs.path / part, cls)
            if part.startswith("text_encoder"):
                return self._load_text_encoder(part, cls, folder, options["dtype"])
            weights = self.file.read(DENOISER if part == "unet" else VAE)
            return cls.from_single_file(weights, config=folder, subfolder=part, local_files_only=True, **options)

    def _load_text_encoder(self, part: str, cls: type, folder: str, dtype: torch.dtype) -> Any:
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

        prefixes = (BIG_CLIP_PREFIX,) if part == "text_encoder_2" else tuple(CLIP_PREFIX.values())
        return create_diffusers_clip_model_from_ldm(
            cls, self.file.read(*prefixes), subfolder=part, config=folder, torch_dtype=dtype, local_files_only=True
        )


def check_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]], own_vae: bool = True) -> None:
    """Raise ValueError unless the keys are those of a text-to-image checkpoint in the original layout, with all
    parts."""
    what = f"model file {path.name!r}"
    if any("lora_" in key or ".lokr_" in key or ".hada_" in key for key in shapes):
        raise ValueError(f"{what} is an adapter, not a model; give its base model here")
    entry = shapes.get(f"{DENOISER}input_blocks.0.0.weight")
    if entry is None:
        near = next((said for key, said in OTHERS.items() if key in shapes), f"no {DENOISER}input_blocks keys")
        raise ValueError(
            f"{what} has {near}; a complete Stable Diffusion checkpoint, or the transformer of a flow model, is needed"
        )
    if entry[1] != shapes.get(f"{DENOISER}out.2.weight", entry)[0]:
        raise ValueError(f"{what} takes {entry[1]} input channels (inpainting or editing); text-to-image is needed")
    if f"{DENOISER}label_emb.0.0.weight" in shapes and not any(key.startswith("conditioner.") for key in shapes):
        raise ValueError(f"{what} takes an image's embedding beside the prompt (unCLIP); text-to-image is needed")
    parts = {VAE: "VAE (give one with vae)"} if own_vae else {}
    for prefix, part in {**parts, ("cond_stage_model.", "conditioner."): "text encoder"}.items():
        if not any(key.startswith(prefix) for key in shapes):
            raise ValueError(f"{what} holds no {part}; a checkpoint with all parts is needed")


def packaged_configs(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> str:
    """Return the folder in assets/configs for these shapes; SD 2 is the 768-pixel v-prediction model by default."""
    width = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    if width == 1280:
        raise ValueError(f"model file {path.name!r} is SDXL's refiner; the base model is needed")
    if width not in CROSS_WIDTH:
        raise ValueError(
            f"model file {path.name!r} has text width {width}; known are {', '.join(map(str, CROSS_WIDTH))}: "
            "give model_config_dir with its configs"
        )
    name = CROSS_WIDTH[width]
    said = f"{metadata.get('modelspec.architecture', '')} {metadata.get('modelspec.prediction_type', '')}"
    return "sd21-base" if name == "sd21" and ("v2-512" in said or "epsilon" in said) else name


def load_tokenizer(folder: Path, cls: type) -> Any:
    """Load the tokenizer of a config folder: its own vocabulary where it has one, else CLIP's from package data."""
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return cls.from_pretrained(str(folder), local_files_only=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    vocabulary, merges = clip_vocabulary()
    return cls(vocab=dict(vocabulary), merges=list(merges), **settings)


@functools.cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's 49,408 tokens and 48,894 merges, in the order of the original tokenizer (OpenAI's
    simple_tokenizer.py)."""
    text = gzip.decompress((CONFIGS / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    lines = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def load_other_vae(name: str, cls: Any, model_config: Config, dtype: torch.dtype) -> nn.Module:
    """Load a VAE of class `cls` by hub name, folder or file instead of a model's own, whose `model_config` it must
    match.

    ValueError where nothing is found or its latents have another shape than the model's.
    """
    path = Path(name).expanduser()
    with one_line_errors(f"vae {name!r}"):
        if path.is_dir():
            place = path / "vae" if (path / "vae").is_dir() else path
            vae = cls.from_pretrained(str(place), local_files_only=True, torch_dtype=dtype)
        elif path.is_file():
            vae = _vae_from_file(path, cls, model_config, dtype)
        elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
            vae = HubModel(name).load_part("", cls, torch_dtype=dtype)
        else:
            raise ValueError("no such file or folder; give a hub name, a folder or a .safetensors file")
    for key in ("latent_channels", "z_dim", "block_out_channels", "dim_mult"):
        if key not in model_config:
            continue
        ours, theirs = vae.config.get(key), model_config[key]
        if (len(ours or ()) != len(theirs)) if isinstance(theirs, list | tuple) else (ours != theirs):
            raise ValueError(f"vae {name!r} has {key} {ours}, the model's own {theirs}: their latents do not fit")
    return vae


def _vae_from_file(path: Path, cls: Any, config: Config, dtype: torch.dtype) -> Any:
    file = CheckpointFile(path)
    with torch.device("meta"):
        empty: Any = cls.from_config(dict(config))
    expected = empty.state_dict()
    prefix = next((prefix for prefix in (VAE, "vae.") if file.weights(prefix)), "")
    if cls.__name__ != "AutoencoderKL":
        held = PartFile(file, prefix)
        held.check({**config, "_class_name": cls.__name__}, expected)
        return held.load(cls, {**config, "_class_name": cls.__name__}, dtype)
    if not expected.keys() <= file.shapes.keys():
        expected = vae_tensors(expected, prefix)
    file.check_complete("VAE", expected)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vae").mkdir()
        (Path(folder) / "vae" / "config.json").write_text(json.dumps(dict(config)))
        weights: Any = file.read(prefix)
        return cls.from_single_file(weights, config=folder, subfolder="vae", torch_dtype=dtype, local_files_only=True)
