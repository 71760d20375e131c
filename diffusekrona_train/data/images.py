"""Opening a photo as everybody sees it: orientation applied, any mode as 8-bit sRGB, transparency over white.

Whatever is wrong with a file (truncated, no image at all, too large to be one) is a ValueError of one line.
"""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffusekrona_train.data import colour
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
"""Level of 255 from which a pixel over white cannot be told from the white."""

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
    shown = printable(name)
    if Path(name).suffix.lower() in HEIC_SUFFIXES:
        _register_heic(shown)
    if (len(content) if isinstance(content, bytes) else content.stat().st_size) == 0:
        raise ValueError(f"{shown}: the file is empty (0 bytes)")
    opened, nothing_left = _decode(content, shown)
    if nothing_left:
        raise ValueError(f"{shown}: is transparent and nothing of it is left over white; save it on a background")
    if min(opened.image.size) < MIN_SIDE:
        width, height = opened.image.size
        raise ValueError(f"{shown}: {width} x {height} pixels are too few; {MIN_SIDE} a side is the least")
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


def _decode(content: bytes | Path, shown: str) -> tuple[Opened, bool]:
    """The upright image, and whether it is transparent and white all over."""
    remarks: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
                remarks += _frames(file)
                orientation = _orientation(file, remarks)
                file.seek(0)
                file.load()
                image, converted = colour.to_srgb(_eight_bits(file), file.info.get("icc_profile"), remarks)
                alpha = image.convert("RGBA").getchannel("A") if colour.has_alpha(image) else None
                see_through = alpha is not None and any(alpha.histogram()[:255])
                image = to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"{shown}: is not an image that can be read, whatever its suffix is") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{shown}: has too many pixels for a photo; scale it down below 170 megapixels") from None
    except PermissionError:
        raise ValueError(f"{shown}: no permission to read it") from None
    except Exception as error:
        # decoders raise what they like: OSError, SyntaxError, struct.error, zlib.error, EOFError, ValueError
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{shown}: is damaged or truncated ({what[:120]})") from None
    if see_through:
        remarks.append("transparent, laid over white")
    seen = sum(count for level, count in enumerate(image.histogram()) if level % 256 < NOTHING_LEFT)
    nothing_left = see_through and not seen
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    return Opened(image, remarks, converted), nothing_left


def _frames(file: Image.Image) -> list[str]:
    """What to say of a file with several pictures. A phone's MPO holds one photo and its gain map: nothing to say."""
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
    if colour.has_alpha(image):
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey: PIL converts it to LA alone
        return image.convert("LA")
    return _to_8_bits(image) if image.mode.startswith(("I", "F")) else image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits, 32 bits or floats as L: full range is 65535, or 255 or 1 where no value is above that."""
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        top = next(
            (limit for limit in (1.0 if image.mode == "F" else 255.0, 255.0, 65535.0) if values.max() <= limit), 0
        )
    return Image.fromarray(np.round(values * (255.0 / (top or values.max()))).astype(np.uint8))


def _register_heic(shown: str) -> None:
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            f"{shown}: reading HEIC needs an extra: pip install 'diffusekrona-train[heic]' (or save it as JPEG)"
        ) from None
    pillow_heif.register_heif_opener()
