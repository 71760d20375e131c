"""Check that a base model can be trained or sampled: a text-to-image model with finite weights.

Transformers pack their latents, so that their channels say nothing: channels are held against each other in UNets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusekrona_train.models.contracts import Config

UNET = "UNet2DConditionModel"


def check_denoiser(model: str, config: Config) -> None:
    """Raise ValueError for a UNet that takes more than noisy latents and a prompt, or gives something else back."""
    if config.get("_class_name") != UNET:
        return
    takes, gives = config.get("in_channels", 4), config.get("out_channels", 4)
    if takes != gives:
        kind = {5: "depth", 7: "upscaling", 8: "editing", 9: "inpainting"}.get(takes, "another task")
        raise ValueError(
            f"model {model!r}: its denoiser takes {takes} input channels and gives {gives} ({kind}); "
            "a text-to-image model is needed"
        )
    for name, usual in PLAIN.items():
        if config.get(name) not in (None, *usual):
            raise ValueError(
                f"model {model!r}: its denoiser has {name}: {config[name]!r}, an input that text-to-image training "
                "does not give it; a plain text-to-image model is needed"
            )


PLAIN: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (),
    "num_class_embeds": (),
    "encoder_hid_dim_type": (),
    "attention_type": ("default",),
}
"""UNet config fields for further inputs (unCLIP, upscalers, images, boxes) -> values that mean none."""


def check_latents(model: str, denoiser: Config, vae: Config) -> None:
    """Raise ValueError if the VAE's latents have another number of channels than the denoiser takes."""
    takes, gives = denoiser.get("in_channels", 4), vae.get("latent_channels", 4)
    if denoiser.get("_class_name") == UNET and takes != gives:
        raise ValueError(
            f"model {model!r}: its denoiser takes {takes} input channels and its VAE gives {gives}; "
            "they are parts of different models"
        )


def check_numbers(what: str, model: nn.Module) -> None:
    """Raise ValueError naming the first tensor of a module that holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        # the extremes are NaN where any number is; 16 times as fast as isfinite on a CPU
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(
                f"{what}: tensor {name} holds NaN or infinity in {str(tensor.dtype).removeprefix('torch.')}; the base "
                "itself is damaged (or its numbers too large for this type): use another copy"
            )
