"""Pipelines with random weights as diffusers folders: small ones in the block layout of the real ones, and real sizes.

`make_pipeline("sdxl", folder)` takes a second and some MB. The text towers are real CLIP classes, the tokenizer is a
byte-level CLIP tokenizer with a few merges, so a prompt goes the whole way. Benchmarks use them too;
`make_real_pipeline` has the published configs, for speed and memory, which do not depend on the values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusekrona_train.models.local import ASSETS, LocalModel
from diffusekrona_train.models.singlefile import load_tokenizer
from diffusekrona_train.models.source import quiet

WORDS = ("dog", "cat", "the", "beach", "snow", "photo", "teapot")
END = "</w>"


def make_pipeline(
    kind: str, folder: str | Path, *, prediction_type: str = "epsilon", seed: int = 0, width: int = 32
) -> Path:
    """Writes a random pipeline of `kind` ("sd15", "sd21" or "sdxl") to `folder` and returns it.

    `width` is the width of the first UNet block; the others follow (sd: w, 2w, 2w, 2w; sdxl: w, 2w, 4w). Latents are
    images / 8, so 64-pixel images have 8 x 8 latents. All fp32. SD kinds have one text tower, SDXL two.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer(folder / "tokenizer", pad="!" if kind == "sd21" else "<|endoftext|>")
    parts: dict[str, Callable[[], Any]] = {
        "unet": lambda: make_unet(kind, width),
        "vae": _vae,
        "text_encoder": lambda: _text_tower(tokenizer, projection=False),
        "tokenizer": lambda: tokenizer,
        "scheduler": lambda: _scheduler(kind, prediction_type),
    }
    if kind == "sdxl":
        tokenizer_2 = make_tokenizer(folder / "tokenizer_2", pad="!")
        parts |= {
            "text_encoder_2": lambda: _text_tower(tokenizer_2, projection=True),
            "tokenizer_2": lambda: tokenizer_2,
        }
    return write_pipeline(kind, folder, parts, seed=seed)


def make_real_pipeline(
    kind: str, folder: str | Path, *, dtype: str = "float16", seed: int = 0, device: str = "cpu"
) -> Path:
    """Writes a pipeline of the published size of `kind`, with its own tokenizers and random weights, to `folder`.

    A part is made in `dtype` at once, saved in shards and dropped before the next one: SDXL needs 7 GB of memory and
    as much disk in 16 bits.
    """
    parts: dict[str, Callable[[], Any]] = {
        part: (lambda part=part: real_part(kind, part)) for part in packaged(kind) if part != "model_index"
    }
    return write_pipeline(kind, folder, parts, seed=seed, dtype=dtype, device=device)


def write_pipeline(
    kind: str,
    folder: str | Path,
    parts: dict[str, Callable[[], Any]],
    *,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
) -> Path:
    """Makes and saves the parts one by one, under a seed of their own each, then the index of the pipeline."""
    import torch

    quiet()
    folder, before = Path(folder), torch.get_default_dtype()
    with torch.random.fork_rng():
        for number, (name, make) in enumerate(parts.items()):
            torch.manual_seed(seed * 1000 + number)
            torch.set_default_dtype(getattr(torch, dtype))
            try:
                with torch.device(device):
                    part: Any = make()
            finally:
                torch.set_default_dtype(before)
            shards = {"max_shard_size": "1GB"} if hasattr(part, "parameters") else {}
            part.save_pretrained(folder / name, **shards)
            del part
    index = packaged(kind)["model_index"]
    if kind != "sdxl":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def packaged(kind: str) -> dict[str, dict[str, Any]]:
    """Part -> config of the published model, as the package carries it; "model_index" is the pipeline's own."""
    place = LocalModel(ASSETS / "configs" / kind)
    index = place.config("model_index")
    parts = [name for name, value in index.items() if isinstance(value, list)]
    return {**{part: place.config(part) for part in parts}, "model_index": index}


def real_part(kind: str, part: str, **changes: Any) -> Any:
    """One part of the published size: a module in eval mode with random weights of torch's default type, a tokenizer
    with CLIP's own vocabulary, or the scheduler. `changes` are made to its config."""
    import diffusers
    import transformers

    place = LocalModel(ASSETS / "configs" / kind)
    library, name = place.config("model_index")[part]
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    if part.startswith("tokenizer"):
        return load_tokenizer(ASSETS / "configs" / kind / part, cls)
    config = place.config(part) | changes
    if part.startswith("text_encoder"):
        return cls(transformers.CLIPTextConfig(**config)).eval()
    made: Any = cls.from_config(config)
    return made if part == "scheduler" else made.eval()


def make_unet(kind: str, width: int = 32):
    """A random UNet2DConditionModel with the block types, naming and projections of `kind`."""
    from diffusers import UNet2DConditionModel

    shared: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "layers_per_block": 2,
        "norm_num_groups": 8,
    }
    if kind == "sdxl":
        own = {
            "block_out_channels": (width, 2 * width, 4 * width),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 4, 8),
            "cross_attention_dim": 64,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
    else:
        own = {
            "block_out_channels": (width, 2 * width, 2 * width, 2 * width),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "attention_head_dim": 4 if kind == "sd15" else (2, 4, 4, 4),
            "cross_attention_dim": 32,
            "use_linear_projection": kind == "sd21",
        }
    return UNet2DConditionModel(**{**shared, **own}).eval()


def make_tokenizer(folder: Path, pad: str):
    """A CLIP tokenizer over bytes that knows WORDS, written to `folder`; `pad` is its padding token."""
    from transformers import CLIPTokenizer

    symbols = list(_byte_symbols())
    merges = [pair for word in WORDS for pair in _merges(word)]
    merges = list(dict.fromkeys(merges))
    tokens = symbols + [s + END for s in symbols] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(["!", *tokens])) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return CLIPTokenizer.from_pretrained(folder)


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(rest))]


def _merges(word: str) -> list[tuple[str, str]]:
    """The byte-pair merges that build `word` from left to right."""
    pieces = [*word[:-1], word[-1] + END]
    return [("".join(pieces[:i]), pieces[i]) for i in range(1, len(pieces))]


def _text_tower(tokenizer, *, projection: bool):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu" if projection else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae():
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {  # diffusers' own types of these are too narrow
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**settings).eval()


def _scheduler(kind: str, prediction_type: str):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

    shared = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    if kind == "sdxl":
        return EulerDiscreteScheduler(**shared, timestep_spacing="leading")
    if kind == "sd15":
        return PNDMScheduler(**shared, skip_prk_steps=True)
    return DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=False)
