"""Krea 2: one stream of prompt and image, twelve hidden states of Qwen3-VL a token, Qwen-Image's VAE.

Its licence (Krea 2 community) is gated. Raw is trained; Turbo, distilled to 8 steps, generates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffusekrona_train.models.contracts import (
    Conditioning,
    Denoiser,
    Family,
    Loaded,
    MemoryFigures,
    Part,
    Parts,
    Request,
    Tensors,
)
from diffusekrona_train.models.qwenimage import PREFIX, PREFIX_TOKENS, SUFFIX, VAE, QwenVae
from diffusekrona_train.models.transformer import hidden_states, pack, places, unpack, usual

MAX_TOKENS = 512
SUFFIX_TOKENS = 5
TEXT_LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Of the text encoder: their hidden states are what the denoiser's text fusion mixes."""


class Krea2(QwenVae):
    """Krea 2 without its text fusion and attention gates, which only files of other tools adapt."""

    name = "krea2"
    parts = Parts(
        denoiser=Part("transformer", "Krea2Transformer2DModel"),
        vae=VAE,
        text_encoders=(Part("text_encoder", "Qwen3VLModel", "transformers", torch.bfloat16),),
        tokenizers=(Part("tokenizer", "Qwen2Tokenizer", "transformers"),),
    )
    streams = {"transformer_blocks": "both"}
    feed_forward = {r"ff\.(gate|up|down)": ""}
    originals = {
        r"^transformer_blocks\.": "blocks.",
        r"^text_fusion\.": "txtfusion.",
        r"\.attn\.to_([qkv])$": r".attn.w\1",
        r"\.attn\.to_out\.0$": ".attn.wo",
        r"\.attn\.to_gate$": ".attn.gate",
        r"\.ff\.": ".mlp.",
        r"^img_in$": "first",
        r"^time_embed\.linear_1$": "tmlp.0",
        r"^time_embed\.linear_2$": "tmlp.2",
        r"^time_mod_proj$": "tproj.1",
        r"^txt_in\.linear_1$": "txtmlp.1",
        r"^txt_in\.linear_2$": "txtmlp.3",
        r"^final_layer\.linear$": "last.linear",
    }
    pipeline_class = "Krea2Pipeline"
    version, architecture = "krea2", "krea-2"
    # counted by python -m scripts.bench.known
    memory = MemoryFigures(plain=29.4, checkpointing=2.82, quantized_share=0.948, largest_block=0.034)

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (L, 12, D)}, without its padding, as the denoiser masks it anyway.

        The text encoder is given the padding between prompt and suffix, as in training; it takes no position.
        """
        (tokenizer,), room = tokenizers, MAX_TOKENS + PREFIX_TOKENS - SUFFIX_TOKENS
        fill = {"padding": "max_length", "truncation": True, "max_length": room}
        said = [tokenizer(PREFIX + prompt, return_tensors="pt", **fill), tokenizer(SUFFIX, return_tensors="pt")]
        ids, mask = (torch.cat([part[name] for part in said], dim=1) for name in ("input_ids", "attention_mask"))
        positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        tokens = {"input_ids": ids, "attention_mask": mask.bool(), "position_ids": positions}
        found = hidden_states(text_encoders[0], tokens, TEXT_LAYERS)
        return {"prompt_embeds": found[PREFIX_TOKENS:][mask[0, PREFIX_TOKENS:].bool()]}

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity (B, 16, h, w) for x_t (B, 16, h, w), sigma (B,)."""
        embeds, (height, width) = conditioning["prompt_embeds"], x_t.shape[-2:]
        image = places(height // 2, width // 2, x_t.device)
        tokens = denoiser(
            hidden_states=pack(x_t),
            encoder_hidden_states=embeds,
            timestep=t,
            position_ids=torch.cat([image.new_zeros(embeds.shape[1], 3), image]),
            encoder_attention_mask=conditioning.get("prompt_embeds_mask"),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself. Its measure of guidance is one less than the usual one, and on above 0.

        It counts places by the prompt for the negative prompt too, so both are given the same length.
        """
        both = [positive, negative or positive]
        length = max(each["prompt_embeds"].shape[1] for each in both)
        (embeds, mask), (against, its_mask) = (_filled(each, length) for each in both)
        tokens = pipe(
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            negative_prompt_embeds=against,
            negative_prompt_embeds_mask=its_mask,
            latents=pack(noise),
            guidance_scale=max(request.guidance - 1, 0.0),
            **usual(request),
        )[0]
        return unpack(tokens, *noise.shape[-2:])


def _filled(conditioning: Conditioning, length: int) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, length, 12, D), padded at the end, and their mask (B, length) boolean."""
    embeds = conditioning["prompt_embeds"]
    every = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    mask, missing = conditioning.get("prompt_embeds_mask", every), length - embeds.shape[1]
    return functional.pad(embeds, (0, 0, 0, 0, 0, missing)), functional.pad(mask, (0, missing))


FAMILY: Family = Krea2()
