"""Anima: Cosmos Predict2's transformer, Qwen3 and T5's token numbers joined by a text conditioner, Qwen-Image's VAE.

Its licence (CircleStone) is not for commercial use; the repository is open. diffusers has it as a modular pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusekrona_train.models import layers as names
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
from diffusekrona_train.models.qwenimage import VAE, QwenVae
from diffusekrona_train.models.sd import optional

MAX_TOKENS = 512


class Anima(QwenVae):
    """Anima: one stream of image tokens with cross attention to the conditioned prompt."""

    name = "anima"
    fp16 = False
    parts = Parts(
        denoiser=Part("transformer", "CosmosTransformer3DModel"),
        vae=VAE,
        text_encoders=(
            Part("text_encoder", "Qwen3Model", "transformers", torch.bfloat16),
            Part("text_conditioner", "AnimaTextConditioner", "diffusers", torch.bfloat16),
        ),
        tokenizers=(
            Part("tokenizer", "Qwen2Tokenizer", "transformers"),
            Part("t5_tokenizer", "T5Tokenizer", "transformers"),
        ),
    )
    streams = {"transformer_blocks": "image"}
    feed_forward = {r"ff\.net\.\d(\.proj)?": "image"}
    originals = {
        r"^transformer_blocks\.": "blocks.",
        r"\.attn1\.": ".self_attn.",
        r"\.attn2\.": ".cross_attn.",
        r"\.to_([qkv])$": r".\1_proj",
        r"\.to_out\.0$": ".output_proj",
        r"\.ff\.net\.0\.proj$": ".mlp.layer1",
        r"\.ff\.net\.2$": ".mlp.layer2",
        r"\.norm1\.linear_([12])$": r".adaln_modulation_self_attn.\1",
        r"\.norm2\.linear_([12])$": r".adaln_modulation_cross_attn.\1",
        r"\.norm3\.linear_([12])$": r".adaln_modulation_mlp.\1",
        r"^patch_embed\.proj$": "x_embedder.proj.1",
        r"^time_embed\.t_embedder\.": "t_embedder.1.",
        r"^norm_out\.linear_([12])$": r"final_layer.adaln_modulation.\1",
        r"^proj_out$": "final_layer.linear",
    }
    version, architecture = "anima", "anima"
    # counted by python -m scripts.bench.known
    memory = MemoryFigures(plain=10.9, checkpointing=0.96, quantized_share=0.99, largest_block=0.035)

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (512, D)}, as the conditioner gives it: zeros behind the prompt."""
        encoder, conditioner = text_encoders
        given = [tokenizer([prompt], truncation=True, max_length=MAX_TOKENS) for tokenizer in tokenizers]
        ids, t5_ids = (torch.tensor(tokens.input_ids, dtype=torch.long, device=encoder.device) for tokens in given)
        mask = torch.ones_like(ids)
        if not ids.numel():  # Qwen's tokenizer has nothing for ''
            ids = mask = ids.new_zeros(1, 1)
        with torch.no_grad():
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            embeds = conditioner(hidden * mask.to(hidden).unsqueeze(-1), t5_ids, torch.ones_like(t5_ids), mask)
        return {"prompt_embeds": embeds[0]}

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity (B, 16, h, w) for x_t (B, 16, h, w), sigma (B,)."""
        _resize_without_torchvision()
        return denoiser(
            hidden_states=x_t.unsqueeze(2),
            timestep=t,
            encoder_hidden_states=conditioning["prompt_embeds"],
            padding_mask=x_t.new_zeros(1, 1, *x_t.shape[-2:]),
            return_dict=False,
        )[0].squeeze(2)

    # ---- generating ----

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Build diffusers' modular pipeline from loaded parts; text encoders and tokenizers may be missing."""
        from diffusers.modular_pipelines.anima import AnimaAutoBlocks

        encoders, tokenizers = optional(parts, 2)
        texts = (*self.parts.text_encoders, *self.parts.tokenizers)
        named = {part.folder: loaded for part, loaded in zip(texts, (*encoders, *tokenizers), strict=True)}
        pipe = AnimaAutoBlocks().init_pipeline()
        pipe.update_components(transformer=parts["denoiser"], vae=parts["vae"], scheduler=parts["scheduler"], **named)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline's blocks behind the text encoders, with usual guidance: on above 1."""
        from diffusers import ClassifierFreeGuidance
        from diffusers.modular_pipelines import SequentialPipelineBlocks
        from diffusers.modular_pipelines.anima.modular_blocks_anima import AnimaCoreDenoiseStep

        _resize_without_torchvision()
        steps = AnimaCoreDenoiseStep().sub_blocks
        steps.pop("text_conditioning")
        inner: Any = SequentialPipelineBlocks.from_blocks_dict(steps).init_pipeline()
        guider = ClassifierFreeGuidance(guidance_scale=max(request.guidance, 1.0))
        inner.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler, guider=guider)
        inner.set_progress_bar_config(disable=True)
        return inner(
            prompt_embeds=positive["prompt_embeds"],
            negative_prompt_embeds=(negative or positive)["prompt_embeds"],
            latents=noise.unsqueeze(2),
            generator=request.generators,
            num_inference_steps=request.steps,
            height=request.height,
            width=request.width,
            output="latents",
        ).squeeze(2)

    # ---- files ----

    def file_name(self, layer: str, layers_per_block: int = 2) -> str:
        """Return lora_unet_ and the original path, the one form that ComfyUI reads for Anima."""
        return names.underscored("lora_unet_", self.original(layer))


def _resize_without_torchvision() -> None:
    """Let diffusers' Cosmos transformer run where torchvision is missing: it is used only to resize a mask of
    zeros."""
    from diffusers.models.transformers import transformer_cosmos as module

    if hasattr(module, "transforms"):
        return

    def resize(mask: Tensor, size: list[int], interpolation: object = None) -> Tensor:
        return functional.interpolate(mask, size=size, mode="nearest")

    parts = {"functional": SimpleNamespace(resize=resize), "InterpolationMode": SimpleNamespace(NEAREST="nearest")}
    setattr(module, "transforms", SimpleNamespace(**parts))  # noqa: B010


FAMILY: Family = Anima()
