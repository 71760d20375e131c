"""From a PIL picture to what an encoder sees, recorded with every result because scores depend on it."""

from __future__ import annotations

from dataclasses import dataclass

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
        """A PIL picture of any size and mode -> (3, crop, crop) fp32."""
        picture = picture.convert("RGB")
        width, height = picture.size
        short = min(width, height)
        size = (int(self.resize * width / short), int(self.resize * height / short))
        if size != picture.size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        picture = picture.crop((left, top, left + self.crop, top + self.crop))
        values = np.asarray(picture, dtype=np.float32) / 255
        normalised = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))

    def describe(self) -> str:
        """One line for reports."""
        return f"shorter side {self.resize} (bicubic), centre crop {self.crop}, mean {self.mean}, std {self.std}"
