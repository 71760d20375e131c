"""Random FLUX.2 pipelines of under a megabyte, dev and klein; their text encoders are thin, but as deep as the layers
that are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.models.source import quiet
from tests.tiny.texts import mistral3, mistral_tokenizer, qwen3, qwen_tokenizer

WIDTH = 16
"""Of a text encoder: three hidden states side by side enter the transformer."""


def make_klein(folder: Path, seed: int = 0) -> Path:
    """Writes a klein pipeline to `folder` in fp32 and returns it."""
    from diffusers import Flux2KleinPipeline

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        encoder = qwen3(len(tokenizer), 28, WIDTH, "Qwen3ForCausalLM")
        Flux2KleinPipeline(_scheduler(), _vae(), encoder, tokenizer, _transformer(False)).save_pretrained(folder)
    return folder


def make_flux2(folder: Path, seed: int = 0) -> Path:
    """Writes a dev pipeline to `folder` in fp32 and returns it."""
    from diffusers import Flux2Pipeline

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer: Any = mistral_tokenizer()
        encoder = mistral3(len(tokenizer), 31, WIDTH)
        Flux2Pipeline(_scheduler(), _vae(), encoder, tokenizer, _transformer(True)).save_pretrained(folder)
    return folder


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _transformer(guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 3 * WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": guidance,
    }
    return Flux2Transformer2DModel(**settings)


def _vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    settings: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    vae = AutoencoderKLFlux2(**settings)
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    assert mean is not None and variance is not None
    mean.normal_(std=0.2)  # fresh ones are 0 and 1, which would hide that nobody applies them
    variance.uniform_(0.5, 1.5)
    return vae
