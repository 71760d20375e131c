"""Write labelled contact sheets: rows of images in one PNG. Needs only PIL."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from diffusekrona_train.common.files import atomic

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK, PAPER, PALE = (32, 33, 36), (255, 255, 255), (225, 228, 232)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    path: Path | str,
    *,
    cell: int | None = None,
    columns: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Write a PNG with one labelled strip of images for each row; return `path`.

    rows: (label, images of any size). cell: side of an image's square in pixels (none: the largest image, held
    within 128 to 320). columns: headings over the images of every row. Small images are enlarged by whole factors,
    without blur.
    """
    if not rows or not any(pictures for _, pictures in rows):
        raise ValueError(f"contact sheet {Path(path).name}: there are no images to show")
    cell = cell or max(128, min(320, max(max(p.size) for _, pictures in rows for p in pictures)))
    gap, margin, size = max(4, cell // 32), max(10, cell // 16), max(12, cell // 11)
    text = "".join([title, *columns, *(label for label, _ in rows)])
    font, small, bold = (_font(n, text.isascii()) for n in (size, max(11, size - 2), size + 4))
    width = 2 * margin + max(max(len(p) for _, p in rows), 2) * (cell + gap) - gap
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [_fit_text(draw, text, small, cell) for text in columns]
    labels = [_wrap(draw, label, font, width - 2 * margin) for label, _ in rows]
    line, head_line = round(size * 1.35), round(size * 1.4) if columns else 0
    top = margin + (round(bold.size * 1.6) if title else 0)
    height = top + sum(len(lines) * line + head_line + cell + 2 * gap for lines in labels) + margin
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), _fit_text(draw, title, bold, width - 2 * margin), INK, font=bold)
    y = top
    for lines, (_, pictures) in zip(labels, rows, strict=True):
        for text in lines:
            draw.text((margin, y), text, INK, font=font)
            y += line
        for i, text in enumerate(heads[: len(pictures)]):
            draw.text((margin + i * (cell + gap), y), text, (95, 99, 104), font=small)
        y += head_line
        for i, picture in enumerate(pictures):
            left = margin + i * (cell + gap)
            draw.rectangle((left, y, left + cell - 1, y + cell - 1), fill=PALE)
            fitted = fit(picture, cell)
            sheet.paste(fitted, (left + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
        y += cell + 2 * gap
    with atomic(Path(path)) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(path)


@functools.cache
def _font(size: int, ascii_only: bool) -> Any:
    """Return PIL's scalable font; it has no accents, so other text uses matplotlib's font if it is installed."""
    plotting = None if ascii_only else importlib.util.find_spec("matplotlib")
    if plotting is not None and plotting.origin:
        wide = Path(plotting.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if wide.is_file():
            return ImageFont.truetype(str(wide), size)
    return ImageFont.load_default(size)


def fit(picture: Image.Image, cell: int) -> Image.Image:
    """Fit the image as RGB into a (cell, cell) square, aspect kept; enlarged by whole factors, reduced with Lanczos."""
    factor = cell / max(picture.size)
    picture = picture.convert("RGB")
    if factor >= 1:
        return picture.resize((picture.width * int(factor), picture.height * int(factor)), Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> list[str]:
    """Wrap `text` to at most three lines of `width` pixels; an empty text has no line."""
    lines: list[str] = []
    for word in " ".join(text.split()).split(" "):
        if lines and draw.textlength(f"{lines[-1]} {word}", font=font) <= width:
            lines[-1] += f" {word}"
        elif word:
            lines.append(word)
    if len(lines) > 3:
        lines = [*lines[:2], " ".join(lines[2:])]
    return [_fit_text(draw, line, font, width) for line in lines]


def _fit_text(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """Shorten `text` with an ellipsis if it is wider than `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"
