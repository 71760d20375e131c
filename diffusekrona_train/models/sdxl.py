"""Stable Diffusion XL and its smaller kin, toybox among them: two text encoders, a pooled embedding, size ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusekrona_train.models.sd import SD, tokenize


class SDXL(SD):
    """What differs from SD: prompts, size ids and the pipeline; pictures pass the same kind of VAE."""

    name = "sdxl"
    file_prefix = "lora_unet_"
    text_encoders = (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection"))
    tokenizers = ("tokenizer", "tokenizer_2")

    def matches(self, denoiser_config: dict) -> bool:
        """True for a UNet with added text and time embeddings."""
        is_unet = denoiser_config.get("_class_name") == "UNet2DConditionModel"
        return is_unet and denoiser_config.get("addition_embed_type") == "text_time"

    def encode_prompt(self, tokenizers: list, text_encoders: list, prompts: list[str]) -> dict[str, Tensor]:
        """Prompts -> {"prompt_embeds": (B, T, D), "pooled": (B, Dp)}, as StableDiffusionXLPipeline.encode_prompt.

        The penultimate hidden states of both encoders side by side; pooled is the second one's projection.
        """
        rows, pooled = [], []
        for prompt in prompts:
            hidden = []
            for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
                with torch.no_grad():
                    ids = tokenize(tokenizer, prompt).input_ids.to(encoder.device)
                    output = encoder(ids, output_hidden_states=True)
                hidden.append(output.hidden_states[-2])
            rows.append(torch.cat(hidden, dim=-1))
            pooled.append(output[0])
        return {"prompt_embeds": torch.cat(rows), "pooled": torch.cat(pooled)}

    def size_ids(self, original_hw: tuple, crop_top_left: tuple, target_hw: tuple) -> Tensor:
        """(6,) fp32: original height and width, top and left of the crop, target height and width, in pixels."""
        return torch.tensor([*original_hw, *crop_top_left, *target_hw], dtype=torch.float32)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """x_t (B, C, h, w), t (B,), conditioning with pooled (B, Dp) and size_ids (B, 6) -> (B, C, h, w)."""
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["size_ids"]}
        embeds = conditioning["prompt_embeds"]
        return denoiser(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]

    def pipeline(self, parts: dict[str, Any]) -> Any:
        """diffusers' pipeline around loaded parts; text encoders and tokenizers may be missing."""
        from diffusers import StableDiffusionXLPipeline

        encoders: Any = parts.get("text_encoders") or [None, None]
        tokenizers: Any = parts.get("tokenizers") or [None, None]
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

    def call_arguments(self, pipe: Any, positive: dict[str, Tensor], negative: dict[str, Tensor], empty: bool) -> dict:
        """As SD's; SDXL's own convention is zeros, not the encoded '', for an empty negative prompt."""
        if empty and pipe.config.force_zeros_for_empty_prompt:
            negative = {name: torch.zeros_like(value) for name, value in positive.items()}
        return {
            "prompt_embeds": positive["prompt_embeds"],
            "pooled_prompt_embeds": positive["pooled"],
            "negative_prompt_embeds": negative["prompt_embeds"],
            "negative_pooled_prompt_embeds": negative["pooled"],
        }


FAMILY = SDXL()
