"""FLUX.1 dev, schnell and Krea-dev, with CLIP and T5; Chroma1 with T5 alone, a mask and a negative prompt.

dev and Krea-dev are gated and not for commercial use; schnell and Chroma1 are Apache-2.0 and open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusekrona_train.models.contracts import (
    Conditioning,
    Config,
    Denoiser,
    Family,
    Loaded,
    MemoryFigures,
    Part,
    Parts,
    Request,
    Tensors,
)
from diffusekrona_train.models.sd import VAE, tokenize
from diffusekrona_train.models.transformer import FlowTransformer, pack, places, unpack, usual

MAX_TOKENS = 512
"""Of T5."""

AROUND = {
    r"^x_embedder$": "img_in",
    r"^context_embedder$": "txt_in",
    r"^time_(?:text|guidance)_embed\.timestep_embedder\.": "time_in.",
    r"^time_(?:text|guidance)_embed\.guidance_embedder\.": "guidance_in.",
    r"^time_text_embed\.text_embedder\.": "vector_in.",
    r"^((?:time|guidance|vector)_in|distilled_guidance_layer\.layers\.\d+)\.linear_1$": r"\1.in_layer",
    r"^((?:time|guidance|vector)_in|distilled_guidance_layer\.layers\.\d+)\.linear_2$": r"\1.out_layer",
    r"^norm_out\.linear$": "final_layer.adaLN_modulation.1",
    r"^proj_out$": "final_layer.linear",
}
"""`originals` of the layers around the blocks, of FLUX.1, Chroma and FLUX.2."""


class Flux1(FlowTransformer):
    """FLUX.1: the guidance of dev and Krea-dev is an input of the transformer, schnell has none."""

    name = "flux1"
    parts = Parts(
        denoiser=Part("transformer", "FluxTransformer2DModel"),
        vae=VAE,
        text_encoders=(
            Part("text_encoder", "CLIPTextModel", "transformers"),
            Part("text_encoder_2", "T5EncoderModel", "transformers", torch.bfloat16),
        ),
        tokenizers=(
            Part("tokenizer", "CLIPTokenizer", "transformers"),
            Part("tokenizer_2", "T5Tokenizer", "transformers"),
        ),
    )
    negative_prompt = False
    streams = {"transformer_blocks": "image", "single_transformer_blocks": "both"}
    feed_forward = {
        r"ff\.net\.\d(\.proj)?": "image",
        r"ff_context\.net\.\d(\.proj)?": "text",
        r"proj_(mlp|out)": "",  # proj_out holds the attention's output too
    }
    originals = {
        r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$": r"double_blocks.\1.img_attn.proj",
        r"^transformer_blocks\.(\d+)\.attn\.to_add_out$": r"double_blocks.\1.txt_attn.proj",
        r"^single_transformer_blocks\.(\d+)\.proj_out$": r"single_blocks.\1.linear2",
        r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$": r"double_blocks.\1.img_mlp.0",
        r"^transformer_blocks\.(\d+)\.ff\.net\.2$": r"double_blocks.\1.img_mlp.2",
        r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$": r"double_blocks.\1.txt_mlp.0",
        r"^transformer_blocks\.(\d+)\.ff_context\.net\.2$": r"double_blocks.\1.txt_mlp.2",
        r"^transformer_blocks\.(\d+)\.norm1\.linear$": r"double_blocks.\1.img_mod.lin",
        r"^transformer_blocks\.(\d+)\.norm1_context\.linear$": r"double_blocks.\1.txt_mod.lin",
        r"^single_transformer_blocks\.(\d+)\.norm\.linear$": r"single_blocks.\1.modulation.lin",
        **AROUND,
    }
    turned = (r"norm_out\.linear",)
    joined = {
        r"^transformer_blocks\.(\d+)\.attn\.to_[qkv]$": r"double_blocks.\1.img_attn.qkv",
        r"^transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$": r"double_blocks.\1.txt_attn.qkv",
        r"^single_transformer_blocks\.(\d+)\.(?:attn\.to_[qkv]|proj_mlp)$": r"single_blocks.\1.linear1",
    }
    pipeline_class = "FluxPipeline"
    version, architecture = "flux1", "flux-1-dev"
    # counted by python -m scripts.bench.known
    memory = MemoryFigures(plain=22.0, checkpointing=2.25, quantized_share=0.994, largest_block=0.029)

    def matches(self, denoiser_config: Config) -> bool:
        """Return True for FLUX.1's transformer of plain latents, False for fill, depth and canny."""
        return super().matches(denoiser_config) and denoiser_config.get("in_channels", 64) == 64

    # ---- prompts ----

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (512, D) of T5, "pooled": (Dp,) of CLIP}; the transformer attends to
        T5's padding, so it stays."""
        clip, t5 = text_encoders
        with torch.no_grad():
            pooled = clip(tokenize(tokenizers[0], prompt).input_ids.to(clip.device)).pooler_output[0]
            embeds = t5(t5_tokens(tokenizers[1], prompt, MAX_TOKENS).input_ids.to(t5.device))[0][0]
        return {"prompt_embeds": embeds, "pooled": pooled}

    # ---- the denoiser ----

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity (B, 16, h, w) for x_t (B, 16, h, w), sigma (B,); dev is trained at guidance 1."""
        embeds, (height, width) = conditioning["prompt_embeds"], x_t.shape[-2:]
        image = places(height // 2, width // 2, x_t.device)
        tokens = denoiser(
            hidden_states=pack(x_t),
            timestep=t,
            encoder_hidden_states=embeds,
            txt_ids=image.new_zeros(embeds.shape[1], 3),
            img_ids=image,
            return_dict=False,
            **self._beside(denoiser, t, len(image), conditioning),
        )[0]
        return unpack(tokens, height, width)

    def _beside(self, denoiser: Denoiser, t: Tensor, count: int, conditioning: Conditioning) -> dict[str, Any]:
        """Return what the transformer takes beside latents, time and prompt, for `count` image tokens."""
        guided = dict(denoiser.config).get("guidance_embeds", False)
        return {"pooled_projections": conditioning["pooled"], "guidance": torch.ones_like(t) if guided else None}

    # ---- generating ----

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself; the transformer is told the guidance, where it can be."""
        tokens = pipe(
            prompt_embeds=positive["prompt_embeds"],
            pooled_prompt_embeds=positive["pooled"],
            latents=pack(noise),
            guidance_scale=request.guidance,
            **usual(request),
        )[0]
        return unpack(tokens, *noise.shape[-2:])


class Chroma(Flux1):
    """Chroma1: FLUX.1's blocks without its modulation, its pooled prompt and its guidance embedding."""

    name = "chroma"
    parts = Parts(
        denoiser=Part("transformer", "ChromaTransformer2DModel"),
        vae=VAE,
        text_encoders=(Part("text_encoder", "T5EncoderModel", "transformers", torch.bfloat16),),
        tokenizers=(Part("tokenizer", "T5Tokenizer", "transformers"),),
    )
    negative_prompt = True
    pipeline_class = "ChromaPipeline"
    version, architecture = "chroma", "chroma"
    memory = MemoryFigures(plain=20.0, checkpointing=2.02, quantized_share=0.967, largest_block=0.025)

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (L, D)}: its tokens and one of padding, which the transformer sees; it
        never sees the rest."""
        tokens, (t5,) = t5_tokens(tokenizers[0], prompt, MAX_TOKENS), text_encoders
        mask = tokens.attention_mask.to(t5.device)
        with torch.no_grad():
            embeds = t5(tokens.input_ids.to(t5.device), attention_mask=mask)[0][0]
        return {"prompt_embeds": embeds[: int(mask.sum()) + 1]}

    def _beside(self, denoiser: Denoiser, t: Tensor, count: int, conditioning: Conditioning) -> dict[str, Any]:
        mask = conditioning.get("prompt_embeds_mask")
        if mask is None:
            return {}
        return {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)}

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself, with usual guidance: on above 1.

        Its own masks are floating-point numbers, which attention adds instead of masking; ours are boolean.
        """
        negative = negative or positive
        tokens = pipe(
            prompt_embeds=positive["prompt_embeds"],
            prompt_attention_mask=_mask(positive),
            negative_prompt_embeds=negative["prompt_embeds"],
            negative_prompt_attention_mask=_mask(negative),
            latents=pack(noise),
            guidance_scale=request.guidance,
            **usual(request),
        )[0]
        return unpack(tokens, *noise.shape[-2:])


def t5_tokens(tokenizer: Loaded, prompt: str, length: int) -> Any:
    """Tokenize one prompt, padded and cut to `length`: input_ids and attention_mask (1, length)."""
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def _mask(conditioning: Conditioning) -> Tensor:
    """Return (B, L) boolean, True for the tokens of each prompt: all of them where none was padded."""
    embeds = conditioning["prompt_embeds"]
    every = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    return conditioning.get("prompt_embeds_mask", every)


FLUX1: Family = Flux1()
CHROMA: Family = Chroma()
