"""Z-Image, its Turbo and the embedded toybox-flow: one stream of caption and picture, a Qwen3 text encoder, a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    Process,
    Request,
    Tensors,
)
from diffusekrona_train.models.process import Flow
from diffusekrona_train.models.sd import VAE
from diffusekrona_train.models.transformer import FlowTransformer, usual

TRAINING_SHIFT = 3.0
"""At most; the base's scheduler has 6, which would hardly train the finer half of the noise levels."""
MAX_TOKENS = 512
"""Longest prompt in tokens, the chat template's among them."""


class ZImage(FlowTransformer):
    """Z-Image: lists of captions and pictures, a reversed time and a negated velocity."""

    name = "zimage"
    parts = Parts(
        denoiser=Part("transformer", "ZImageTransformer2DModel"),
        vae=VAE,
        text_encoders=(Part("text_encoder", "Qwen3Model", "transformers", torch.bfloat16),),
        tokenizers=(Part("tokenizer", "Qwen2Tokenizer", "transformers"),),
    )
    fp16 = False
    loads_lokr = True
    streams = {"noise_refiner": "image", "context_refiner": "text", "layers": "both"}
    feed_forward = {r"feed_forward\.w[123]": ""}
    gated = r"(.+\.feed_forward)\.w[13]"
    originals = {
        r"\.attention\.to_out\.0$": ".attention.out",
        r"^all_x_embedder\.2-1$": "x_embedder",
        r"^all_final_layer\.2-1\.": "final_layer.",
    }
    joined = {r"\.attention\.to_[qkv]$": ".attention.qkv"}
    pipeline_class = "ZImagePipeline"
    version, architecture = "zimage", "z-image"
    # counted by python -m scripts.bench.known
    memory = MemoryFigures(plain=30.0, checkpointing=2.14, quantized_share=0.997, largest_block=0.029)

    def process(self, scheduler_config: Config, side: int) -> Process:
        """Return a flow with the shift of the scheduler's config, TRAINING_SHIFT at most."""
        found = super().process(scheduler_config, side)
        assert isinstance(found, Flow)
        return replace(found, shift=min(found.shift, TRAINING_SHIFT))

    # ---- prompts ----

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """A prompt -> {"prompt_embeds": (L, D)}, the real tokens alone, as ZImagePipeline.encode_prompt gives it."""
        (tokenizer,), (encoder,) = tokenizers, text_encoders
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        tokens = tokenizer(said, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(encoder.device).bool()
        with torch.no_grad():
            ids = tokens.input_ids.to(encoder.device)
            hidden = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return {"prompt_embeds": hidden[0][mask[0]]}

    # ---- the denoiser ----

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """x_t (B, C, h, w), sigma (B,) -> velocity eps - x_0 (B, C, h, w).

        The transformer takes lists and 1 - sigma, and gives x_0 - eps.
        """
        pictures = list(x_t.unsqueeze(2))
        velocity = denoiser(pictures, 1 - t, captions(conditioning), return_dict=False)[0]
        return -torch.stack(list(velocity)).squeeze(2)

    # ---- generating ----

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """The pipeline's own call. Its measure of guidance is one less than the usual one, and on above 0."""
        return pipe(
            prompt_embeds=captions(positive),
            negative_prompt_embeds=captions(negative) if negative else None,
            latents=noise.float(),
            guidance_scale=max(request.guidance - 1, 0.0),
            **usual(request),
        )[0]


def captions(conditioning: Conditioning) -> list[Tensor]:
    """The prompts (L, D) of a collated batch, without its padding."""
    embeds, mask = conditioning["prompt_embeds"], conditioning.get("prompt_embeds_mask")
    return list(embeds) if mask is None else [row[real] for row, real in zip(embeds, mask, strict=True)]


FAMILY: Family = ZImage()
