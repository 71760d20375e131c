"""Qwen-Image and Qwen-Image-2512: two streams, Qwen2.5-VL as text encoder, a video VAE used on single frames.

Both are Apache-2.0 and open. Krea 2 and Anima have the same VAE.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusekrona_train.common.device import empty_cache
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
from diffusekrona_train.models.sd import decoded
from diffusekrona_train.models.transformer import FlowTransformer, hidden_states, pack, posterior, unpack, usual

MAX_TOKENS = 1024
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 34
"""How many tokens of Qwen's the prefix has; the denoiser does not see them."""
VAE = Part("vae", "AutoencoderKLQwenImage")


class QwenVae(FlowTransformer):
    """What the families with Qwen-Image's VAE share: 16 channels, each with a mean and a deviation of its own."""

    def latent_shape(self, vae_config: Config, height: int, width: int) -> tuple[int, int, int]:
        """Return (16, H / 8, W / 8)."""
        factor = 2 ** len(vae_config["temperal_downsample"])
        return int(vae_config["z_dim"]), height // factor, width // factor

    def encode_image(self, vae: Loaded, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] as normalised latents (B, 16, h, w)."""
        mean, std = _statistics(vae)
        return (posterior(vae, pixels.unsqueeze(2), generator).squeeze(2) - mean) / std

    def decode(self, vae: Loaded, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, 16, h, w) to images (B, 3, H, W) fp32 in [0, 1]."""
        mean, std = _statistics(vae)
        return decoded(vae, (latents.to(vae.dtype) * std + mean).unsqueeze(2), decode_in_tiles).squeeze(2)


class QwenImage(QwenVae):
    """Qwen-Image: prompts of any length, masked; usual guidance, rescaled by the pipeline."""

    name = "qwenimage"
    parts = Parts(
        denoiser=Part("transformer", "QwenImageTransformer2DModel"),
        vae=VAE,
        text_encoders=(Part("text_encoder", "Qwen2_5_VLForConditionalGeneration", "transformers", torch.bfloat16),),
        tokenizers=(Part("tokenizer", "Qwen2Tokenizer", "transformers"),),
    )
    streams = {"transformer_blocks": "image"}
    feed_forward = {r"img_mlp\.net\.\d(\.proj)?": "image", r"txt_mlp\.net\.\d(\.proj)?": "text"}
    dead = (r"attn\.(add_q_proj|to_add_out)", r"txt_mlp\..+")
    pipeline_class = "QwenImagePipeline"
    version, architecture = "qwen_image", "qwen-image"
    # counted by python -m scripts.bench.known
    memory = MemoryFigures(plain=24.7, checkpointing=2.07, quantized_share=0.998, largest_block=0.017)

    def matches(self, denoiser_config: Config) -> bool:
        """Return True for the transformer of text to image, False for those that edit or make layers."""
        edits = denoiser_config.get("zero_cond_t") or denoiser_config.get("use_additional_t_cond")
        return super().matches(denoiser_config) and not edits

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (L, D)}: the last hidden states behind the prefix."""
        said, room = PREFIX + prompt + SUFFIX, MAX_TOKENS + PREFIX_TOKENS
        tokens = tokenizers[0](said, max_length=room, truncation=True, return_tensors="pt")
        return {"prompt_embeds": hidden_states(text_encoders[0], tokens, (-1,))[PREFIX_TOKENS:, 0]}

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity (B, 16, h, w) for x_t (B, 16, h, w), sigma (B,)."""
        count, _, height, width = x_t.shape
        tokens = denoiser(
            hidden_states=pack(x_t),
            timestep=t,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning.get("prompt_embeds_mask"),
            img_shapes=[[(1, height // 2, width // 2)]] * count,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself, with usual guidance: on above 1."""
        against = negative if negative and request.guidance > 1 else {}
        tokens = pipe(
            prompt_embeds=positive["prompt_embeds"],
            prompt_embeds_mask=positive.get("prompt_embeds_mask"),
            negative_prompt_embeds=against.get("prompt_embeds"),
            negative_prompt_embeds_mask=against.get("prompt_embeds_mask"),
            latents=pack(noise),
            true_cfg_scale=request.guidance,
            max_sequence_length=MAX_TOKENS,
            **usual(request),
        )[0]
        return unpack(tokens, *noise.shape[-2:])


def _statistics(vae: Loaded) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, (1, C, 1, 1)."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=vae.device, dtype=vae.dtype)
    mean, std = values.view(2, 1, -1, 1, 1)
    return mean, std


def decode_in_tiles(vae: Loaded, latents: Tensor) -> Tensor:
    """Decode (B, C, 1, h, w) in blended tiles of half the longer side; the VAE's own settings for tiles stay."""
    side = max(4, max(latents.shape[-2:]) // 8 * 4) * vae.spatial_compression_ratio
    wanted = {"use_tiling": True}
    for axis in ("height", "width"):
        wanted |= {f"tile_sample_min_{axis}": side, f"tile_sample_stride_{axis}": side // 4 * 3}
    before = {name: getattr(vae, name) for name in wanted}
    empty_cache()
    try:
        for name, value in wanted.items():
            setattr(vae, name, value)
        return vae.decode(latents, return_dict=False)[0]
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


FAMILY: Family = QwenImage()
