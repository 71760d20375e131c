"""Stable Diffusion 1.x and 2.x: one text encoder, no size ids, epsilon or v prediction."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusekrona_train.common.device import empty_cache, ran_out
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
from diffusekrona_train.models.process import Ddpm
from diffusekrona_train.models.schedulers import check_ddpm

UNET = Part("unet", "UNet2DConditionModel")
VAE = Part("vae", "AutoencoderKL")


class SD:
    """How SD 1.4, 1.5, 2.0 and 2.1 turn images and prompts into tensors, and predict."""

    name = "sd"
    parts = Parts(
        denoiser=UNET,
        vae=VAE,
        text_encoders=(Part("text_encoder", "CLIPTextModel", "transformers"),),
        tokenizers=(Part("tokenizer", "CLIPTokenizer", "transformers"),),
    )
    side_multiple = 8
    negative_prompt = True
    added: Mapping[str, str] = {}
    """What the UNet is given beside its prompt: its name for it -> the conditioning's."""
    caption = "prompt_embeds"
    blocks = ("down_blocks", "mid_block", "up_blocks")
    # Counted for SDXL (scripts/bench/trace.py): 5.3 and 0.6, without cuDNN's workspaces and fragmentation; stepping
    # down corrects what is left. Three quarters of a UNet are linears of transformer blocks.
    fp16 = True
    loads_lokr = False
    memory = MemoryFigures(plain=6.5, checkpointing=1.2, quantized_share=0.75)

    def matches(self, denoiser_config: Config) -> bool:
        """Return True for a UNet with cross-attention to one text encoder and 4 or more latent channels."""
        is_unet = denoiser_config.get("_class_name") == "UNet2DConditionModel"
        return is_unet and denoiser_config.get("addition_embed_type") is None

    def process(self, scheduler_config: Config, side: int) -> Process:
        """Return the process of the scheduler's config; the side does not matter."""
        check_ddpm(scheduler_config)
        return Ddpm.from_config(scheduler_config)

    def default_resolution(self, denoiser_config: Config, vae_config: Config) -> int:
        """Return the side that the UNet was trained on, in pixels."""
        return int(denoiser_config["sample_size"]) * _factor(vae_config)

    def latent_shape(self, vae_config: Config, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w): C is the VAE's, 4 in all published models; its factor is mostly 8."""
        factor = _factor(vae_config)
        return int(vae_config["latent_channels"]), height // factor, width // factor

    # ---- images ----

    def encode_image(self, vae: Loaded, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] as latents (B, C, h, w), scaled; the posterior's mean without a
        generator."""
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        latents = posterior.mean if generator is None else posterior.sample(generator)
        return latents * vae.config.scaling_factor

    def decode(self, vae: Loaded, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W) fp32 in [0, 1], computed in the VAE's own type."""
        return decoded(vae, latents.to(vae.dtype) / vae.config.scaling_factor)

    def picture_conditioning(
        self, original_hw: tuple[int, int], crop_top_left: tuple[int, int], target_hw: tuple[int, int]
    ) -> Tensors:
        """Return {}: SD has no size conditioning."""
        return {}

    # ---- prompts ----

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode a prompt as {"prompt_embeds": (L, D)}, as diffusers' StableDiffusionPipeline.encode_prompt gives it.

        L is the tokenizer's length: the UNet attends to the padding.
        """
        (tokenizer,), (encoder,) = tokenizers, text_encoders
        tokens = tokenize(tokenizer, prompt)
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        with torch.no_grad():
            return {"prompt_embeds": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0][0]}

    def collate(self, rows: Sequence[Tensors]) -> Conditioning:
        """Batch rows as `collate` below: stacked, as all prompts of a UNet have the tokenizer's length."""
        return collate(rows)

    # ---- the denoiser ----

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model's prediction (B, C, h, w) for x_t (B, C, h, w), t (B,)."""
        embeds, added = conditioning["prompt_embeds"], {name: conditioning[key] for name, key in self.added.items()}
        return denoiser(x_t, t, encoder_hidden_states=embeds, added_cond_kwargs=added or None, return_dict=False)[0]

    def describe(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """Describe a linear of the transformer blocks by its diffusers name."""
        return names.describe(name, in_features, out_features)

    def layers(self, linears: Linears) -> list[Layer]:
        """Return every projection and feed-forward of the transformer blocks."""
        return names.described(linears)

    def describe_other(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """Return None: what other tools adapt around the blocks of a UNet may be convolutions
        (layers.find_projections)."""
        return None

    def quantizes(self, name: str) -> bool:
        """Return True inside attention blocks: embeddings and time projections are small but affect every block."""
        return ".attentions." in name

    # ---- generating ----

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Build diffusers' pipeline from loaded parts; text encoders and tokenizers may be missing."""
        from diffusers import StableDiffusionPipeline

        (encoder,), (tokenizer,) = optional(parts, 1)
        pipe = StableDiffusionPipeline(
            vae=parts["vae"],
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=parts["denoiser"],
            scheduler=parts["scheduler"],
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Call the pipeline itself, with usual guidance: on above 1."""
        return pipe(
            **self._call_arguments(pipe, positive, negative or {}, request.negative_is_empty),
            latents=noise,
            generator=request.generators,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            height=request.height,
            width=request.width,
            output_type="latent",
            return_dict=False,
        )[0]

    def _call_arguments(
        self, pipe: Loaded, positive: Conditioning, negative: Conditioning, empty: bool
    ) -> Conditioning:
        """Return the embeddings by the pipeline's names; `empty`: the negative prompt is ''."""
        return {"prompt_embeds": positive["prompt_embeds"], "negative_prompt_embeds": negative["prompt_embeds"]}

    # ---- files ----

    def file_name(self, layer: str, layers_per_block: int = 2) -> str:
        """Return lora_unet_ and the diffusers path, as kohya's scripts write it."""
        return names.underscored("lora_unet_", layer)

    def other_names(self, layer: str, layers_per_block: int = 2) -> Sequence[str]:
        """Return diffusers' and the original path, bare, below unet., kohya's and LyCORIS's."""
        return names.usual_names(layer, original_path(layer, layers_per_block), prefixes=["unet"])

    def without_effect(self, layers: Sequence[Layer]) -> Sequence[str]:
        """Return nothing: every layer has a gradient."""
        return ()

    def joined_names(self, layer: str) -> Sequence[str]:
        """Return nothing: q, k and v are apart in the original UNets too."""
        return ()

    def turned_names(self, layer: Layer) -> Sequence[str]:
        """Return nothing: all rows have one order."""
        return ()

    def metadata(self, layers: Sequence[Layer], prediction_type: str) -> dict[str, str]:
        """Return SD 1's or SD 2's metadata: SD 2 has text embeddings 1024 wide, SD 1 768."""
        predicts_v = prediction_type == "v_prediction"
        cross = {layer.in_features for layer in layers if layer.kind == "cross" and layer.projection in "kv"}
        version, architecture = "sd_v1", "stable-diffusion-v1/lora"
        if predicts_v and 768 not in cross:
            version, architecture = "sd_v2_v", "stable-diffusion-v2-768-v/lora"
        elif 1024 in cross:
            version, architecture = "sd_v2", "stable-diffusion-v2-512/lora"
        return {
            "ss_base_model_version": version,
            "modelspec.architecture": architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        }


_ATTENTION = re.compile(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.attentions\.(\d+)\.(.+)")


def original_path(name: str, layers_per_block: int) -> str:
    """Return the original path of a diffusers path: down_blocks.1.attentions.0.x -> input_blocks.4.1.x."""
    match = _ATTENTION.match(name)
    if match is None:
        return name
    side, block, mid, attention, rest = match.groups()
    if mid:
        return f"middle_block.1.{rest}" if attention == "0" else name
    index = (layers_per_block + 1) * int(block) + int(attention)
    return f"input_blocks.{1 + index}.1.{rest}" if side == "down" else f"output_blocks.{index}.1.{rest}"


def _factor(vae_config: Config) -> int:
    """Return pixels per latent, along one side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def optional(parts: Mapping[str, Any], count: int) -> tuple[list[Any], list[Any]]:
    """Return (text encoders, tokenizers) of loaded parts, `count` each, None where they were not loaded."""
    return parts.get("text_encoders") or [None] * count, parts.get("tokenizers") or [None] * count


def decoded(vae: Loaded, unscaled: Tensor, in_tiles: Callable[[Loaded, Tensor], Tensor] | None = None) -> Tensor:
    """Decode a VAE's own latents (B, C, h, w) to images (B, 3, H, W) fp32 in [0, 1].

    Where memory ends, or the VAE's tiling is on, in overlapping tiles of half the side: nearly the same image
    in a quarter of the memory. (The VAE's own tiles are as large as the images that it was trained on.)
    """
    pixels = None
    try:
        if not vae.use_tiling:
            pixels = vae.decode(unscaled, return_dict=False)[0]
    except RuntimeError as error:
        if not ran_out(error):
            raise
    if pixels is None:  # not in the handler: its traceback keeps what the decoder had made so far
        pixels = (in_tiles or decode_in_tiles)(vae, unscaled)
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def decode_in_tiles(vae: Loaded, latents: Tensor) -> Tensor:
    """Decode as vae.decode, in blended tiles of at most half the longer side; the VAE's own settings for tiles stay."""
    side = max(4, max(latents.shape[-2:]) // 8 * 4)  # a quarter of it is the overlap, in whole latents
    names = ("use_tiling", "tile_latent_min_size", "tile_sample_min_size")
    before = {name: getattr(vae, name) for name in names}
    scale = before["tile_sample_min_size"] // before["tile_latent_min_size"]
    empty_cache()
    try:
        for name, value in zip(names, (True, side, side * scale), strict=True):
            setattr(vae, name, value)
        return vae.decode(latents, return_dict=False)[0]
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def collate(rows: Sequence[Tensors]) -> Conditioning:
    """Batch rows of the same names: name -> (B, ...), stacked where shapes agree, else padded at the end of their first
    axis.

    Padding is zero (False in masks). A padded tensor `x` without an `x_mask` of its own gets one: (B, L) boolean, True
    where there is something. Raises ValueError where the rows have other names.
    """
    for row in rows[1:]:
        if row.keys() != rows[0].keys():
            raise ValueError(f"prompts with {', '.join(row)} cannot be batched with {', '.join(rows[0])}")
    batch: Conditioning = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(value.shape == values[0].shape for value in values):
            batch[name] = torch.stack(values)
            continue
        batch[name] = pad_sequence(values, batch_first=True)
        if not name.endswith("_mask") and f"{name}_mask" not in rows[0]:
            batch[f"{name}_mask"] = _mask(values)
    return batch


def _mask(values: Sequence[Tensor]) -> Tensor:
    lengths = torch.tensor([len(value) for value in values])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).to(values[0].device)


def tokenize(tokenizer: Loaded, prompt: str) -> Any:
    """Tokenize one prompt, padded and cut to the tokenizer's length: input_ids and attention_mask (1, T)."""
    length = tokenizer.model_max_length
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


FAMILY: Family = SD()
