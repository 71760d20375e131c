"""Random pipelines of the families with Qwen-Image's VAE: Qwen-Image itself and Krea 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.models.source import quiet
from tests.tiny.texts import qwen_tokenizer, qwen_vl

WIDTH = 16
"""Of the text encoders."""


def make_qwenimage(folder: Path, seed: int = 0) -> Path:
    """Writes a Qwen-Image pipeline to `folder` in fp32 and returns it."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        encoder = qwen_vl(len(tokenizer), 2, WIDTH, "Qwen2_5_VLForConditionalGeneration")
        settings: dict[str, Any] = {"num_layers": 2, "joint_attention_dim": WIDTH, **HEADS}
        transformer = QwenImageTransformer2DModel(**settings)
        scheduler = _scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
        QwenImagePipeline(scheduler, qwen_vae(), encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


def make_krea2(folder: Path, seed: int = 0) -> Path:
    """Writes a Krea 2 pipeline to `folder` in fp32 and returns it; its text encoder is thin, but as deep as is read."""
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        encoder = qwen_vl(len(tokenizer), 36, WIDTH, "Qwen3VLModel")
        settings: dict[str, Any] = {
            "num_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "timestep_embed_dim": 16,
            "text_hidden_dim": WIDTH,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            **HEADS,
        }
        transformer = Krea2Transformer2DModel(**settings)
        for value in transformer.parameters():  # the class leaves tables and norms at zero
            if not value.any():
                torch.nn.init.normal_(value, std=0.05)
        scheduler = _scheduler(max_shift=1.15, max_image_seq_len=6400)
        Krea2Pipeline(scheduler, qwen_vae(), encoder, tokenizer, transformer).save_pretrained(folder)
    return folder


HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 4, "axes_dims_rope": (4, 6, 6)}


def _scheduler(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, **settings)


def qwen_vae() -> Any:
    """The VAE with its real factor of 8 and statistics of its own."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=(torch.randn(16) * 0.3).tolist(),
        latents_std=(1 + torch.rand(16)).tolist(),
    )
