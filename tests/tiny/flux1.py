"""Random pipelines of the families with T5: FLUX.1, Chroma and SD 3.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.models.source import quiet
from tests.tiny import _text_tower, make_tokenizer
from tests.tiny.texts import t5, t5_tokenizer
from tests.tiny.zimage import kl_vae

WIDTH = 64
"""Of T5, and of two CLIP side by side."""
FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6),
}


def make_flux1(folder: Path, seed: int = 0) -> Path:
    """Writes a FLUX.1 dev pipeline to `folder` in fp32 and returns it."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, long = make_tokenizer(folder / "tokenizer", pad="<|endoftext|>"), t5_tokenizer()
        tower: Any = _text_tower(clip, projection=False)
        FluxPipeline(
            scheduler=_scheduler(use_dynamic_shifting=True),
            vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=tower,
            tokenizer=clip,
            text_encoder_2=t5(len(long), WIDTH),
            tokenizer_2=long,
            transformer=FluxTransformer2DModel(**FLUX, pooled_projection_dim=32, guidance_embeds=True),
        ).save_pretrained(folder)
    return folder


def make_chroma(folder: Path, seed: int = 0) -> Path:
    """Writes a Chroma pipeline to `folder` in fp32 and returns it."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    quiet()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        long = t5_tokenizer()
        approximator = {"num_channels": 16, "hidden_dim": 32, "layers": 1}
        settings: dict[str, Any] = {f"approximator_{name}": value for name, value in approximator.items()}
        ChromaPipeline(
            scheduler=_scheduler(shift=1.0),
            vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=t5(len(long), WIDTH),
            tokenizer=long,
            transformer=ChromaTransformer2DModel(**FLUX, **settings),
        ).save_pretrained(folder)
    return folder


def make_sd3(folder: Path, seed: int = 0) -> Path:
    """Writes a pipeline of SD 3.5 medium to `folder` in fp32 and returns it; its first block has the second
    attention."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    quiet()
    settings: dict[str, Any] = {
        "sample_size": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, clip_2 = (make_tokenizer(folder / f"tokenizer{end}", pad="!") for end in ("", "_2"))
        towers: list[Any] = [_text_tower(tokenizer, projection=True) for tokenizer in (clip, clip_2)]
        long = t5_tokenizer()
        StableDiffusion3Pipeline(
            scheduler=_scheduler(shift=3.0),
            vae=kl_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=towers[0],
            tokenizer=clip,
            text_encoder_2=towers[1],
            tokenizer_2=clip_2,
            text_encoder_3=t5(len(long), WIDTH),
            tokenizer_3=long,
            transformer=SD3Transformer2DModel(**settings),
        ).save_pretrained(folder)
    return folder


def _scheduler(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)
