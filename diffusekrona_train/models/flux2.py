"""FLUX.2: dev with Mistral and a guidance embedding, klein 4B and 9B with Qwen3; latents by batch-norm statistics.

dev and klein 9B are gated and not for commercial use; klein 4B is Apache-2.0 and open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
from diffusekrona_train.models.flux1 import AROUND
from diffusekrona_train.models.sd import decoded
from diffusekrona_train.models.transformer import FlowTransformer, hidden_states, posterior, usual

MAX_TOKENS = 512
"""Length of every prompt in tokens: the transformer attends to the padding, so it is never cut."""
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""What dev's text encoder is told first, letter by letter."""
TRANSFORMER = Part("transformer", "Flux2Transformer2DModel")
VAE = Part("vae", "AutoencoderKLFlux2")


class Flux2(FlowTransformer):
    """FLUX.2 dev: guidance is an input of the transformer, there is no negative prompt."""

    name = "flux2"
    parts = Parts(
        denoiser=TRANSFORMER,
        vae=VAE,
        text_encoders=(Part("text_encoder", "Mistral3ForConditionalGeneration", "transformers", torch.bfloat16),),
        tokenizers=(Part("tokenizer", "AutoTokenizer", "transformers"),),
    )
    negative_prompt = False
    loads_lokr = True
    embeds_guidance = True
    text_layers: Sequence[int] = (10, 20, 30)
    streams = {"transformer_blocks": "image", "single_transformer_blocks": "both"}
    feed_forward = {r"ff\.linear_(in|out)": "image", r"ff_context\.linear_(in|out)": "text"}
    fused = {"attn.to_qkv_mlp_proj": "qkv"}
    originals = {
        r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj$": r"single_blocks.\1.linear1",
        r"^single_transformer_blocks\.(\d+)\.attn\.to_out$": r"single_blocks.\1.linear2",
        r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$": r"double_blocks.\1.img_attn.proj",
        r"^transformer_blocks\.(\d+)\.attn\.to_add_out$": r"double_blocks.\1.txt_attn.proj",
        r"^transformer_blocks\.(\d+)\.ff\.linear_in$": r"double_blocks.\1.img_mlp.0",
        r"^transformer_blocks\.(\d+)\.ff\.linear_out$": r"double_blocks.\1.img_mlp.2",
        r"^transformer_blocks\.(\d+)\.ff_context\.linear_in$": r"double_blocks.\1.txt_mlp.0",
        r"^transformer_blocks\.(\d+)\.ff_context\.linear_out$": r"double_blocks.\1.txt_mlp.2",
        r"^(\w+_stream_modulation\w*)\.linear$": r"\1.lin",
        **AROUND,
    }
    turned = (r"norm_out\.linear",)
    joined = {
        r"^transformer_blocks\.(\d+)\.attn\.to_[qkv]$": r"double_blocks.\1.img_attn.qkv",
        r"^transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj$": r"double_blocks.\1.txt_attn.qkv",
    }
    pipeline_class = "Flux2Pipeline"
    version, architecture = "flux_2_dev", "flux-2-dev"
    # counted by python -m scripts.bench.known
    memory = MemoryFigures(plain=72.7, checkpointing=5.09, quantized_share=0.975, largest_block=0.03)

    def matches(self, denoiser_config: Config) -> bool:
        """Return True for FLUX.2's transformer with a guidance embedding (dev) or without (klein)."""
        return super().matches(denoiser_config) and denoiser_config.get("guidance_embeds", True) == self.embeds_guidance

    # ---- images ----

    def latent_shape(self, vae_config: Config, height: int, width: int) -> tuple[int, int, int]:
        """Return (128, H / 16, W / 16): 2 x 2 patches of the VAE's latents."""
        channels, h, w = super().latent_shape(vae_config, height, width)
        return 4 * channels, h // 2, w // 2

    def encode_image(self, vae: Loaded, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] as (B, 128, H / 16, W / 16), normalised by the VAE's statistics."""
        return normalised(vae, posterior(vae, pixels, generator))

    def decode(self, vae: Loaded, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, 128, h, w) to images (B, 3, 16 h, 16 w) fp32 in [0, 1]."""
        mean, std = _statistics(vae)
        return decoded(vae, functional.pixel_shuffle(latents.to(vae.dtype) * std + mean, 2))

    # ---- prompts ----

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (512, 3 D)}: three hidden states side by side, padding included."""
        tokens = self._tokens(tokenizers[0], prompt)
        return {"prompt_embeds": hidden_states(text_encoders[0], tokens, self.text_layers).flatten(1)}

    def _tokens(self, tokenizer: Loaded, prompt: str) -> Any:
        said = {"system": SYSTEM, "user": prompt.replace("[IMG]", "")}  # the mark of an image in Mistral's template
        messages = [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in said.items()]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt", **_padded()
        )

    # ---- the denoiser ----

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity (B, 128, h, w) for x_t (B, 128, h, w), sigma (B,); dev is trained at guidance 1."""
        embeds = conditioning["prompt_embeds"]
        (count, _, height, width), length = x_t.shape, embeds.shape[1]
        tokens = denoiser(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=t,
            guidance=torch.ones_like(t) if self.embeds_guidance else None,
            encoder_hidden_states=embeds,
            txt_ids=_ids(1, 1, length, x_t.device).expand(count, -1, -1),
            img_ids=_ids(height, width, 1, x_t.device).expand(count, -1, -1),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape_as(x_t)

    # ---- generating ----

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself; the transformer is told the guidance."""
        embeds = positive["prompt_embeds"]
        tokens = pipe(prompt_embeds=embeds, latents=noise, guidance_scale=request.guidance, **usual(request))[0]
        return tokens.transpose(1, 2).reshape_as(noise)


class Klein(Flux2):
    """FLUX.2 klein 4B and 9B: Qwen3 as text encoder, usual guidance. Base models are trained, distilled ones generate
    in 4 steps without guidance."""

    name = "flux2-klein"
    fp16 = False
    parts = Parts(
        denoiser=TRANSFORMER,
        vae=VAE,
        text_encoders=(Part("text_encoder", "Qwen3ForCausalLM", "transformers", torch.bfloat16),),
        tokenizers=(Part("tokenizer", "Qwen2Tokenizer", "transformers"),),
    )
    negative_prompt = True
    embeds_guidance = False
    text_layers = (9, 18, 27)
    pipeline_class = "Flux2KleinPipeline"
    version, architecture = "flux_2_klein", "flux-2-klein"
    # of 9B; 4B, whose blocks are a larger share of it, takes two thirds
    memory = MemoryFigures(plain=27.3, checkpointing=2.55, quantized_share=0.95, largest_block=0.063)

    def _tokens(self, tokenizer: Loaded, prompt: str) -> Any:
        messages = [{"role": "user", "content": prompt}]
        said = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return tokenizer(said, return_tensors="pt", **_padded())

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself, with usual guidance: on above 1. Its latents come back as the VAE's own."""
        latents = pipe(
            prompt_embeds=positive["prompt_embeds"],
            negative_prompt_embeds=negative["prompt_embeds"] if negative else None,
            latents=noise,
            guidance_scale=request.guidance,
            **usual(request),
        )[0]
        return normalised(pipe.vae, latents)


def normalised(vae: Loaded, latents: Tensor) -> Tensor:
    """Turn a VAE's own latents (B, 32, h, w) into what the transformer takes, (B, 128, h / 2, w / 2)."""
    mean, std = _statistics(vae)
    return (functional.pixel_unshuffle(latents, 2) - mean.to(latents)) / std.to(latents)


def _statistics(vae: Loaded) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a channel of patches, (1, 128, 1, 1), from the VAE's batch norm."""
    mean, variance = (values.view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def _padded() -> dict[str, Any]:
    return {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}


def _ids(rows: int, columns: int, tokens: int, device: torch.device) -> Tensor:
    """Return the places of tokens, (1, N, 4): time 0, row, column, number of the text token."""
    ranges = [torch.arange(count, device=device) for count in (1, rows, columns, tokens)]
    return torch.cartesian_prod(*ranges)[None]


DEV: Family = Flux2()
KLEIN: Family = Klein()
