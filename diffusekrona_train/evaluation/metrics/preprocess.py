"""Prepare PIL images for an encoder; recorded with every result because scores depend on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to `resize` pixels (bicubic), centre crop to `crop`, values in [0, 1], then (x - mean) / std."""

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """Convert a PIL image of any size and mode to (3, crop, crop) fp32."""
        return _processor(self)(picture.convert("RGB"), return_tensors="np")["pixel_values"][0]

    def describe(self) -> str:
        """Return one line for reports."""
        return f"shorter side {self.resize} (bicubic), centre crop {self.crop}, mean {self.mean}, std {self.std}"


@functools.lru_cache
def _processor(how: Preprocessing) -> Any:
    """transformers' own on PIL images: its faster one on tensors rounds otherwise, and scores would depend on it."""
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4 has it under this name
        from transformers import CLIPImageProcessor as Processor
    return Processor(
        size={"shortest_edge": how.resize},
        crop_size={"height": how.crop, "width": how.crop},
        image_mean=list(how.mean),
        image_std=list(how.std),
    )
