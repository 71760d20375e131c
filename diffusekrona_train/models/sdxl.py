"""Stable Diffusion XL and smaller variants such as toybox: two text encoders, a pooled embedding, size ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusekrona_train.models import layers as names
from diffusekrona_train.models.contracts import (
    Conditioning,
    Config,
    Family,
    Layer,
    Loaded,
    Part,
    Parts,
    Tensors,
)
from diffusekrona_train.models.sd import SD, UNET, VAE, optional, original_path, tokenize


class SDXL(SD):
    """What differs from SD: prompts, size ids and the pipeline; images pass the same kind of VAE."""

    name = "sdxl"
    parts = Parts(
        denoiser=UNET,
        vae=VAE,
        text_encoders=(
            Part("text_encoder", "CLIPTextModel", "transformers"),
            Part("text_encoder_2", "CLIPTextModelWithProjection", "transformers"),
        ),
        tokenizers=(
            Part("tokenizer", "CLIPTokenizer", "transformers"),
            Part("tokenizer_2", "CLIPTokenizer", "transformers"),
        ),
    )

    added = {"text_embeds": "pooled", "time_ids": "size_ids"}

    def matches(self, denoiser_config: Config) -> bool:
        """Return True for a UNet with added text and time embeddings."""
        is_unet = denoiser_config.get("_class_name") == "UNet2DConditionModel"
        return is_unet and denoiser_config.get("addition_embed_type") == "text_time"

    def picture_conditioning(
        self, original_hw: tuple[int, int], crop_top_left: tuple[int, int], target_hw: tuple[int, int]
    ) -> Tensors:
        """Return {"size_ids": (6,) fp32}: original height and width, top and left of the crop, target height and
        width."""
        return {"size_ids": torch.tensor([*original_hw, *crop_top_left, *target_hw], dtype=torch.float32)}

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (L, D), "pooled": (Dp,)}, as StableDiffusionXLPipeline.encode_prompt.

        The penultimate hidden states of both encoders side by side; pooled is the second one's projection.
        """
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
            with torch.no_grad():
                output = encoder(tokenize(tokenizer, prompt).input_ids.to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        return {"prompt_embeds": torch.cat(hidden, dim=-1)[0], "pooled": pooled[0]}

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Build diffusers' pipeline from loaded parts; text encoders and tokenizers may be missing."""
        from diffusers import StableDiffusionXLPipeline

        encoders, tokenizers = optional(parts, 2)
        pipe = StableDiffusionXLPipeline(
            vae=parts["vae"],
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=parts["denoiser"],
            scheduler=parts["scheduler"],
            add_watermarker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _call_arguments(
        self, pipe: Loaded, positive: Conditioning, negative: Conditioning, empty: bool
    ) -> Conditioning:
        """Return as SD's; SDXL's own convention is zeros, not the encoded '', for an empty negative prompt."""
        if empty and pipe.config.force_zeros_for_empty_prompt:
            negative = {name: torch.zeros_like(value) for name, value in positive.items()}
        return {
            "prompt_embeds": positive["prompt_embeds"],
            "pooled_prompt_embeds": positive["pooled"],
            "negative_prompt_embeds": negative["prompt_embeds"],
            "negative_pooled_prompt_embeds": negative["pooled"],
        }

    def file_name(self, layer: str, layers_per_block: int = 2) -> str:
        """Return lora_unet_ and the original path if there is one, as kohya's scripts write it."""
        return names.underscored("lora_unet_", original_path(layer, layers_per_block))

    def metadata(self, layers: Sequence[Layer], prediction_type: str) -> dict[str, str]:
        """Return SDXL's base, and the repository that it came from."""
        return {
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        }


FAMILY: Family = SDXL()
