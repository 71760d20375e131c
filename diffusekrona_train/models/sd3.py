"""Stable Diffusion 3.5 medium and large: two streams, two CLIP and T5, unpacked latents, times up to 1000.

Its licence (Stability community) is gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from diffusekrona_train.models.contracts import (
    Conditioning,
    Denoiser,
    Family,
    Layer,
    Loaded,
    MemoryFigures,
    Part,
    Parts,
    Request,
    Tensors,
)
from diffusekrona_train.models.flux1 import t5_tokens
from diffusekrona_train.models.sd import VAE, tokenize
from diffusekrona_train.models.transformer import FlowTransformer, usual

MAX_TOKENS = 256
"""Of T5; CLIP's 77 stand before them."""


class SD3(FlowTransformer):
    """SD 3.5. Medium has a second attention over the image alone in its first blocks, attn2."""

    name = "sd3"
    parts = Parts(
        denoiser=Part("transformer", "SD3Transformer2DModel"),
        vae=VAE,
        text_encoders=(
            Part("text_encoder", "CLIPTextModelWithProjection", "transformers"),
            Part("text_encoder_2", "CLIPTextModelWithProjection", "transformers"),
            Part("text_encoder_3", "T5EncoderModel", "transformers", torch.bfloat16),
        ),
        tokenizers=(
            Part("tokenizer", "CLIPTokenizer", "transformers"),
            Part("tokenizer_2", "CLIPTokenizer", "transformers"),
            Part("tokenizer_3", "T5Tokenizer", "transformers"),
        ),
    )
    streams = {"transformer_blocks": "image"}
    feed_forward = {r"ff\.net\.\d(\.proj)?": "image", r"ff_context\.net\.\d(\.proj)?": "text"}
    dead = (r"attn\.add_q_proj",)
    originals = {
        r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$": r"joint_blocks.\1.x_block.attn.proj",
        r"^transformer_blocks\.(\d+)\.attn\.to_add_out$": r"joint_blocks.\1.context_block.attn.proj",
        r"^transformer_blocks\.(\d+)\.attn2\.to_out\.0$": r"joint_blocks.\1.x_block.attn2.proj",
        r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$": r"joint_blocks.\1.x_block.mlp.fc1",
        r"^transformer_blocks\.(\d+)\.ff\.net\.2$": r"joint_blocks.\1.x_block.mlp.fc2",
        r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$": r"joint_blocks.\1.context_block.mlp.fc1",
        r"^transformer_blocks\.(\d+)\.ff_context\.net\.2$": r"joint_blocks.\1.context_block.mlp.fc2",
        r"^transformer_blocks\.(\d+)\.norm1\.linear$": r"joint_blocks.\1.x_block.adaLN_modulation.1",
        r"^transformer_blocks\.(\d+)\.norm1_context\.linear$": r"joint_blocks.\1.context_block.adaLN_modulation.1",
        r"^time_text_embed\.timestep_embedder\.linear_1$": "t_embedder.mlp.0",
        r"^time_text_embed\.timestep_embedder\.linear_2$": "t_embedder.mlp.2",
        r"^time_text_embed\.text_embedder\.linear_1$": "y_embedder.mlp.0",
        r"^time_text_embed\.text_embedder\.linear_2$": "y_embedder.mlp.2",
        r"^norm_out\.linear$": "final_layer.adaLN_modulation.1",
        r"^proj_out$": "final_layer.linear",
    }
    turned = (r"norm_out\.linear", r"transformer_blocks\.\d+\.norm1_context\.linear")  # of the text, the last alone
    joined = {
        r"^transformer_blocks\.(\d+)\.(attn2?)\.to_[qkv]$": r"joint_blocks.\1.x_block.\2.qkv",
        r"^transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$": r"joint_blocks.\1.context_block.attn.qkv",
    }
    pipeline_class = "StableDiffusion3Pipeline"
    version, architecture = "sd3", "stable-diffusion-3"
    # counted by python -m scripts.bench.known, of large
    memory = MemoryFigures(plain=13.9, checkpointing=1.27, quantized_share=0.991, largest_block=0.045)

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (77 + 256, D), "pooled": (Dp,)}: both CLIP side by side, filled up with
        zeros, then T5. The transformer attends to all padding, so it stays."""
        t5, hidden, pooled = text_encoders[2], [], []
        with torch.no_grad():
            for tokenizer, clip in zip(tokenizers[:2], text_encoders[:2], strict=True):
                found = clip(tokenize(tokenizer, prompt).input_ids.to(clip.device), output_hidden_states=True)
                hidden.append(found.hidden_states[-2][0])
                pooled.append(found.text_embeds[0])
            long = t5(t5_tokens(tokenizers[2], prompt, MAX_TOKENS).input_ids.to(t5.device))[0][0]
        short = torch.cat(hidden, dim=-1).to(long.dtype)
        filled = functional.pad(short, (0, long.shape[-1] - short.shape[-1]))
        return {"prompt_embeds": torch.cat([filled, long]), "pooled": torch.cat(pooled)}

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity (B, 16, h, w) for x_t (B, 16, h, w), sigma (B,)."""
        return denoiser(
            hidden_states=x_t,
            timestep=1000 * t,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]

    def describe(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """Describe a linear of the blocks; attn2 is a second self attention here."""
        found = super().describe(name, in_features, out_features)
        if found is None or found.kind != "cross":
            return found
        group = found.group if found.projection == "o" else f"{found.block}.attn2:image"
        return replace(found, kind="self", group=group)

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself, with usual guidance: on above 1."""
        negative = negative or positive
        return pipe(
            prompt_embeds=positive["prompt_embeds"],
            pooled_prompt_embeds=positive["pooled"],
            negative_prompt_embeds=negative["prompt_embeds"],
            negative_pooled_prompt_embeds=negative["pooled"],
            latents=noise,
            guidance_scale=request.guidance,
            **usual(request),
        )[0]


FAMILY: Family = SD3()
