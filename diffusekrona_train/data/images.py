"""Open a photo as viewers show it: orientation applied, any mode as 8-bit sRGB, transparency over white.

A photo from a phone (Display P3), a camera (Adobe RGB) or a press (CMYK) has other numbers for the same colours. Read
as sRGB they would be learnt paler, brighter or greener than every viewer shows them.

Whatever is wrong with a file (truncated, not an image, too large to be one) is a ValueError of one line.
"""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from diffusekrona_train.data.names import printable

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
FORMATS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "AVIF": ".avif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".gif",
}
"""Pillow's name of a format -> its suffix; it reads many more, some of them by starting other programs."""
MIN_SIDE = 16
"""Pixels; below this there is nothing to learn from."""
NOTHING_LEFT = 254
"""Level of 255 from which a pixel over white cannot be distinguished from the white."""
COLOUR_VERSION = "sRGB 1"
"""Part of the cache key of photos whose pixels were converted; raised where the same profile gives other pixels."""
SAME_COLOUR = 2
"""Levels of 255: profiles that change no colour by more are sRGB under one of its many names."""

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Colour space of a profile, by ICC -> the mode of the pixels that it describes."""
_DAMAGED = "its colour profile is damaged; its colours are taken as sRGB"

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # our one line says what is wrong with a file

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class Opened:
    """A decoded photo, remarks on what was done to get it, and whether its colours were converted to sRGB."""

    image: Image.Image
    remarks: list[str] = field(default_factory=list)
    converted: bool = False


def open_image(content: bytes | Path, name: str) -> Image.Image:
    """Return the first frame as an RGB image, completely decoded; ValueError naming `name` where that fails."""
    return inspect_image(content, name).image


def inspect_image(content: bytes | Path, name: str) -> Opened:
    """Decode an image to RGB, with remarks on what was done (first frame, transparency, colours); errors as above."""
    try:
        if Path(name).suffix.lower() in HEIC_SUFFIXES:
            _register_heic()
        if (len(content) if isinstance(content, bytes) else content.stat().st_size) == 0:
            raise ValueError("the file is empty (0 bytes)")
        opened, nothing_left = _decode(content)
        if nothing_left:
            raise ValueError("is transparent and nothing of it is left over white; save it on a background")
        if min(opened.image.size) < MIN_SIDE:
            width, height = opened.image.size
            raise ValueError(f"{width} x {height} pixels are too few; {MIN_SIDE} a side is the least")
    except ValueError as error:
        raise ValueError(f"{printable(name)}: {error}") from None
    return opened


def true_suffix(content: bytes, name: str) -> str:
    """Return the suffix of an image's real format, by its first bytes; ValueError naming `name` for any other file."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return ".heic"
    try:
        with Image.open(io.BytesIO(content), formats=[kind for kind in FORMATS if kind != "MPO"]) as image:
            return FORMATS[str(image.format)]
    except Exception:  # decoders raise what they like
        shown = printable(name)
        raise ValueError(f"{shown}: is not a photo; JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP and GIF are read") from None


def _decode(content: bytes | Path) -> tuple[Opened, bool]:
    """Return the upright image, and whether it is transparent and white all over."""
    remarks: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
                remarks += _frames(file)
                orientation = _orientation(file, remarks)
                file.seek(0)
                file.load()
                image, converted = to_srgb(_eight_bits(file), file.info.get("icc_profile"), remarks)
                alpha = image.convert("RGBA").getchannel("A") if has_alpha(image) else None
                see_through = alpha is not None and any(alpha.histogram()[:255])
                image = to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("is not an image that can be read, whatever its suffix is") from None
    except Image.DecompressionBombError:
        raise ValueError("has too many pixels for a photo; scale it down below 170 megapixels") from None
    except PermissionError:
        raise ValueError("no permission to read it") from None
    except Exception as error:
        # decoders raise what they like: OSError, SyntaxError, struct.error, zlib.error, EOFError, ValueError
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"is damaged or truncated ({what[:120]})") from None
    if see_through:
        remarks.append("transparent, laid over white")
    seen = sum(count for level, count in enumerate(image.histogram()) if level % 256 < NOTHING_LEFT)
    nothing_left = see_through and not seen
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    return Opened(image, remarks, converted), nothing_left


def _frames(file: Image.Image) -> list[str]:
    """Return the remark on a file with several images; none on a phone's MPO, which holds one photo and its gain
    map."""
    count = getattr(file, "n_frames", 1)
    if count < 2 or file.format == "MPO":
        return []
    return [f"has {count} pages; the first is used" if file.format == "TIFF" else "animated; its first frame is used"]


def _orientation(file: Image.Image, remarks: list[str]) -> int:
    try:
        return int(file.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:
        # a broken EXIF block raises a dozen kinds of errors, and says nothing against the pixels
        remarks.append("its EXIF block is damaged; taken as upright")
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Return any mode as RGB: transparency over white, 16-bit and float greyscale brought to 8 bits."""
    image = _eight_bits(image)
    if has_alpha(image):
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey: PIL converts it to LA alone
        return image.convert("LA")
    return _to_8_bits(image) if image.mode.startswith(("I", "F")) else image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return greyscale of 16 bits, 32 bits or floats as L: full range is 65535, or 255 or 1 where no value is above
    that."""
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        top = next(
            (limit for limit in (1.0 if image.mode == "F" else 255.0, 255.0, 65535.0) if values.max() <= limit), 0
        )
    return Image.fromarray(np.round(values * (255.0 / (top or values.max()))).astype(np.uint8))


def _register_heic() -> None:
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "reading HEIC needs an extra: pip install 'diffusekrona-train[heic]' (or save it as JPEG)"
        ) from None
    pillow_heif.register_heif_opener()


# ---- colours ----


def to_srgb(image: Image.Image, profile: bytes | None, remarks: list[str]) -> tuple[Image.Image, bool]:
    """Return the image in sRGB, and whether its colours were converted. Alpha stays; a remark says what was done.

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
    """Return whether the image has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.createProfile("sRGB")  # type: ignore[return-value]


def _described(image: Image.Image, space: str) -> Image.Image | None:
    """Return the pixels that a profile for `space` describes, without alpha; None if the image has no such pixels."""
    mode = _MODES.get(space)
    if mode == "RGB" and image.mode != "CMYK":
        return (image.convert("RGBA") if image.mode in ("PA", "RGBa") else image).convert("RGB")
    if mode == "L" and image.mode in ("L", "LA", "1"):
        return image.convert("L")
    return image if mode == "CMYK" and image.mode == "CMYK" else None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether the transform leaves a lattice of colours as it is, within SAME_COLOUR levels."""
    if mode == "CMYK":
        return False
    steps = np.linspace(0, 255, 256 if mode == "L" else 9).round().astype(np.uint8)
    axes = [steps] if mode == "L" else [steps] * 3
    lattice = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(axes))
    before = Image.fromarray(lattice[..., 0] if mode == "L" else lattice)
    after = ImageCms.applyTransform(before, transform)
    gap = np.asarray(after).astype(int) - np.asarray(before.convert("RGB"))
    return int(np.abs(gap).max()) <= SAME_COLOUR
