"""A random Z-Image pipeline of some hundred kilobytes; the tokenizer knows bytes and Qwen's chat marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.models.source import quiet
from tests.tiny.texts import qwen_tokenizer


def make_zimage(folder: Path, seed: int = 0) -> Path:
    """Writes the pipeline to `folder` in fp32 and returns it: 16 latent channels, two blocks and two refiners."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        pipe = ZImagePipeline(
            transformer=_transformer(),
            vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=_encoder(len(tokenizer)),
            tokenizer=tokenizer,
        )
    pipe.save_pretrained(folder)
    return folder


def _transformer() -> Any:
    from diffusers import ZImageTransformer2DModel

    settings: dict[str, Any] = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "dim": 96,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 4,
        "cap_feat_dim": 32,
        "axes_dims": [8, 8, 8],
        "axes_lens": [1024, 64, 64],
    }
    model = ZImageTransformer2DModel(**settings)
    with torch.no_grad():  # the class leaves these uninitialised
        for name, value in model.named_parameters():
            if "pad_token" in name:
                value.normal_(std=0.05)
    return model


def kl_vae(**scales: float) -> Any:
    """A VAE of 16 channels with its real factor of 8."""
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 16,
        "sample_size": 64,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **scales,
    }
    return AutoencoderKL(**settings)


def _encoder(words: int) -> Any:
    from transformers import Qwen3Config, Qwen3Model

    settings: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
    }
    return Qwen3Model(Qwen3Config(**settings))
