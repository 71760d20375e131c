"""A random Anima as a folder of parts; diffusers has no DiffusionPipeline for it, so its parts are saved one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.models.source import quiet
from tests.tiny.qwenimage import qwen_vae
from tests.tiny.texts import qwen3, qwen_tokenizer, t5_tokenizer

WIDTH = 32
"""Of the text encoder and of what the conditioner gives."""


def make_anima(folder: Path, seed: int = 0) -> Path:
    """Writes the parts to `folder` in fp32 and returns it."""
    from diffusers import CosmosTransformer3DModel, FlowMatchEulerDiscreteScheduler
    from diffusers.models import AnimaTextConditioner

    quiet()
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH,
        "adaln_lora_dim": 8,
        "max_size": (4, 32, 32),
        "rope_scale": (1.0, 4.0, 4.0),
        "extra_pos_embed_type": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, t5_numbers = qwen_tokenizer(), t5_tokenizer()
        widths = dict.fromkeys(("source_dim", "target_dim", "model_dim"), WIDTH)
        conditioner: Any = AnimaTextConditioner(
            **widths, num_layers=1, num_attention_heads=2, target_vocab_size=len(t5_numbers)
        )
        parts = {
            "transformer": CosmosTransformer3DModel(**settings),
            "vae": qwen_vae(),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "text_encoder": qwen3(len(tokenizer), 2, WIDTH),
            "tokenizer": tokenizer,
            "text_conditioner": conditioner,
            "t5_tokenizer": t5_numbers,
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "modular_model_index.json").write_text(json.dumps({"_class_name": "AnimaModularPipeline"}))
    return folder
