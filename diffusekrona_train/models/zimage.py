"""Z-Image, its Turbo and the embedded toybox-flow: one stream of caption and picture, a Qwen3 text encoder, a flow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusekrona_train.models import layers as names
from diffusekrona_train.models.contracts import (
    Conditioning,
    Config,
    Denoiser,
    Family,
    Layer,
    Linears,
    Loaded,
    MemoryFigures,
    Part,
    Parts,
    Process,
    Request,
    Tensors,
)
from diffusekrona_train.models.process import Flow
from diffusekrona_train.models.sd import SD, VAE, optional

TRAINING_SHIFT = 3.0
"""At most; the base's scheduler has 6, which would hardly train the finer half of the noise levels."""
MAX_TOKENS = 512
"""Longest prompt in tokens, the chat template's among them."""
STREAMS = {"layers": "both", "noise_refiner": "image", "context_refiner": "text"}
"""Where a block stands -> whose tokens it sees."""

_IN_BLOCK = re.compile(rf"(?P<block>({'|'.join(STREAMS)})\.\d+)\.(?P<rest>.+)")
_FEED_FORWARD = re.compile(r"feed_forward\.w[123]")


class ZImage(SD):
    """What differs from the UNets: all but how a VAE's tiles are decoded."""

    name = "zimage"
    parts = Parts(
        denoiser=Part("transformer", "ZImageTransformer2DModel"),
        vae=VAE,
        text_encoders=(Part("text_encoder", "Qwen3Model", "transformers", torch.bfloat16),),
        tokenizers=(Part("tokenizer", "Qwen2Tokenizer", "transformers"),),
    )
    side_multiple = 16
    fp16 = False
    blocks = ("noise_refiner", "context_refiner", "layers")
    # counted by python -m scripts.bench.known
    memory = MemoryFigures(plain=30.0, checkpointing=2.14, quantized_share=0.997, largest_block=0.029)

    def matches(self, denoiser_config: Config) -> bool:
        """True for Z-Image's transformer."""
        return denoiser_config.get("_class_name") == "ZImageTransformer2DModel"

    def process(self, scheduler_config: Config, side: int) -> Process:
        """Return a flow with the shift of the scheduler's config, TRAINING_SHIFT at most; tokens of 16 pixels a side
        where the shift is dynamic."""
        name = scheduler_config.get("_class_name")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"its scheduler/scheduler_config.json names {name}, which is no flow matching; "
                "name the model's own, FlowMatchEulerDiscreteScheduler"
            )
        found = Flow.from_config(scheduler_config, (side // self.side_multiple) ** 2)
        return replace(found, shift=min(found.shift, TRAINING_SHIFT))

    def default_resolution(self, denoiser_config: Config, vae_config: Config) -> int:
        """The side that the VAE was trained on, in pixels: the transformer's config names none."""
        return int(vae_config["sample_size"])

    # ---- pictures ----

    def encode_image(self, vae: Loaded, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> (z - shift) scale (B, C, h, w); the posterior's mean without generator."""
        return super().encode_image(vae, pixels, generator) - _moved(vae)

    def decode(self, vae: Loaded, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), shifted and scaled -> images (B, 3, H, W) fp32 in [0, 1]."""
        return super().decode(vae, latents + _moved(vae))

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

    def describe(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """q, k, v, o and the feed-forward of the blocks; None for modulation and embedders."""
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            return None
        block, stream = match["block"], STREAMS[name.partition(".")[0]]
        if _FEED_FORWARD.fullmatch(match["rest"]):
            group = name if name.endswith("w2") else f"{block}.feed_forward"
            return Layer(name, in_features, out_features, "ffn", "ffn", stream, block, group)
        found = names.describe(name, in_features, out_features)
        return found and replace(found, stream=stream)

    def layers(self, linears: Linears) -> list[Layer]:
        """Every projection and feed-forward of the blocks, those of the refiners too."""
        return [layer for name, widths in linears.items() if (layer := self.describe(name, *widths))]

    def quantizes(self, name: str) -> bool:
        """True in the blocks, their modulation included; embedders and the final layer stay."""
        return _IN_BLOCK.fullmatch(name) is not None

    # ---- generating ----

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """diffusers' pipeline around loaded parts; the text encoder and its tokenizer may be missing."""
        from diffusers import ZImagePipeline

        (encoder,), (tokenizer,) = optional(parts, 1)
        pipe = ZImagePipeline(
            vae=parts["vae"],
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=parts["denoiser"],
            scheduler=parts["scheduler"],
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """The pipeline's own call. Its measure of guidance is one less than the usual one, and on above 0."""
        return pipe(
            prompt_embeds=captions(positive),
            negative_prompt_embeds=captions(negative) if negative else None,
            latents=noise.float(),
            generator=request.generators,
            num_inference_steps=request.steps,
            guidance_scale=max(request.guidance - 1, 0.0),
            height=request.height,
            width=request.width,
            output_type="latent",
            return_dict=False,
        )[0]

    # ---- files ----

    def file_name(self, layer: str, layers_per_block: int = 2) -> str:
        """lycoris_ and the diffusers path, as LyCORIS writes it and ComfyUI reads it."""
        return names.underscored("lycoris_", layer)

    def other_names(self, layer: str, layers_per_block: int = 2) -> Sequence[str]:
        """The diffusers path bare, below transformer. and diffusion_model., kohya's and LyCORIS's."""
        return names.usual_names(layer, prefixes=["transformer", "diffusion_model"])

    def metadata(self, layers: Sequence[Layer], prediction_type: str) -> dict[str, str]:
        """Z-Image's base, as other trainers name it."""
        return {
            "ss_base_model_version": "zimage",
            "modelspec.architecture": "z-image/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "flow",
        }


def captions(conditioning: Conditioning) -> list[Tensor]:
    """The prompts (L, D) of a collated batch, without its padding."""
    embeds, mask = conditioning["prompt_embeds"], conditioning.get("prompt_embeds_mask")
    return list(embeds) if mask is None else [row[real] for row, real in zip(embeds, mask, strict=True)]


def _moved(vae: Loaded) -> float:
    """What a VAE's shift comes to in scaled latents."""
    return (vae.config.shift_factor or 0.0) * vae.config.scaling_factor


FAMILY: Family = ZImage()
