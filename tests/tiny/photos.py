"""Photos that are generated for tests and benchmarks."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw


def draw_photos(folder: Path, count: int = 3, sizes=((80, 72), (64, 96), (100, 64))) -> Path:
    """Write `count` PNG files with random shapes to `folder`, of `sizes` (width, height) in turn; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(0)
    for i in range(count):
        image = Image.new("RGB", sizes[i % len(sizes)], tuple(dice.randrange(256) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        for _ in range(6):
            x, y = dice.randrange(60), dice.randrange(50)
            pen.ellipse((x, y, x + 20, y + 20), fill=tuple(dice.randrange(256) for _ in range(3)))
        image.save(folder / f"{i}.png")
    return folder
