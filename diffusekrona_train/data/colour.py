"""Embedded colour profiles: pixels as sRGB, whatever colour space a photo was saved in.

A picture from a phone (Display P3), a camera (Adobe RGB) or a press (CMYK) has other numbers for the same colours. Read
as sRGB they would be learnt paler, brighter or greener than every viewer shows them.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

from diffusekrona_train.data.names import printable

VERSION = "sRGB 1"
"""Part of the cache key of photos whose pixels were converted; raised where the same profile gives other pixels."""
SAME = 2
"""Levels of 255: profiles that change no colour by more are sRGB under one of its many names."""

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Colour space of a profile, by ICC -> the mode of the pixels that it describes."""
_DAMAGED = "its colour profile is damaged; its colours are taken as sRGB"


def to_srgb(image: Image.Image, profile: bytes | None, remarks: list[str]) -> tuple[Image.Image, bool]:
    """(8-bit image in sRGB, whether its colours were converted). Alpha stays; a remark says what was done.

    `image` has 8 bits a channel. A profile that cannot be read, or that is for other pixels than these, is a remark.
    """
    if image.mode == "LAB":  # these numbers are colours by themselves
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), _srgb(), outputMode="RGB"), True  # type: ignore[return-value]
    if not profile:
        return image, False
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        colours = _described(image, space)
        if colours is None:
            remarks.append(f"its colour profile is for {printable(space)} and not for its pixels; taken as sRGB")
            return image, False
        transform = ImageCms.buildTransform(source, _srgb(), colours.mode, "RGB")
        if _changes_nothing(transform, colours.mode):
            return image, False
        converted = ImageCms.applyTransform(colours, transform)
        name = " ".join(printable(ImageCms.getProfileDescription(source).strip(), limit=40).split()) or space
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        remarks.append(_DAMAGED)
        return image, False
    assert converted is not None  # it is None only where the transform works in place
    if has_alpha(image):
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    remarks.append(f"its colours are converted from {name} to sRGB")
    return converted, True


def has_alpha(image: Image.Image) -> bool:
    """Whether the image has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.createProfile("sRGB")  # type: ignore[return-value]


def _described(image: Image.Image, space: str) -> Image.Image | None:
    """The pixels that a profile for `space` describes, without alpha; None where the image has no such pixels."""
    mode = _MODES.get(space)
    if mode == "RGB" and image.mode != "CMYK":
        return (image.convert("RGBA") if image.mode in ("PA", "RGBa") else image).convert("RGB")
    if mode == "L" and image.mode in ("L", "LA", "1"):
        return image.convert("L")
    return image if mode == "CMYK" and image.mode == "CMYK" else None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the transform leaves a lattice of colours as it is, within SAME levels."""
    if mode == "CMYK":
        return False
    steps = np.linspace(0, 255, 256 if mode == "L" else 9).round().astype(np.uint8)
    axes = [steps] if mode == "L" else [steps] * 3
    lattice = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(axes))
    before = Image.fromarray(lattice[..., 0] if mode == "L" else lattice)
    after = ImageCms.applyTransform(before, transform)
    gap = np.asarray(after).astype(int) - np.asarray(before.convert("RGB"))
    return int(np.abs(gap).max()) <= SAME
