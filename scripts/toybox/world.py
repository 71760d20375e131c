"""Toybox's world: a sprite on a background with its caption, drawn by a seeded generator, and whole data sets of them.

pictures, captions, labels = draw_world(small_world(load_sprites(folder)), SMALL, number=24_000, seed=5)

The 23 backgrounds are 14 drawn scenes and 9 plain colours, each a function of a random generator: a painter takes
(random generator, side) and gives (side, side, 3) floats from 0 to 255.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sprites import Sprite

# ---- backgrounds -----------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (215, 45, 40),
    "blue": (45, 90, 215),
    "green": (50, 160, 65),
    "yellow": (245, 210, 50),
    "purple": (135, 65, 175),
    "orange": (245, 140, 35),
    "pink": (245, 140, 185),
    "black": (28, 28, 32),
    "white": (246, 246, 246),
}


def shade(r, colour, spread=8):
    return np.array(colour, np.float32) + r.normal(0, spread, 3).astype(np.float32)


def grain(r, n, cells, strength):
    """(n, n, 1) smooth noise of `cells` blobs a side."""
    dots = Image.fromarray((r.random((cells, cells)) * 255).astype(np.uint8))
    return (np.asarray(dots.resize((n, n), Image.Resampling.BICUBIC), np.float32)[..., None] / 255 - 0.5) * strength


def fade(n, top, bottom):
    t = np.linspace(0, 1, n, dtype=np.float32)[:, None, None]
    return np.broadcast_to(np.array(top, np.float32) * (1 - t) + np.array(bottom, np.float32) * t, (n, n, 3)).copy()


def flat(n, colour):
    return np.broadcast_to(np.array(colour, np.float32), (n, n, 3)).copy()


def land(r, n, sky, ground, waves=0.0):
    """Ground under sky with a horizon somewhat above the middle; gives (picture, horizon row)."""
    row = int(n * r.uniform(0.38, 0.58))
    edge = row + waves * np.sin(np.arange(n) / n * r.uniform(3, 8) + r.uniform(0, 6))
    return np.where((np.arange(n)[:, None] < edge[None])[..., None], sky, ground).astype(np.float32), row


def disc(image, y, x, radius, colour):
    yy, xx = np.mgrid[: len(image), : len(image)]
    image[(yy - y) ** 2 + (xx - x) ** 2 < radius**2] = colour


def dots(r, image, count, low, high=255):
    for _ in range(count):
        y, x = r.integers(0, len(image), 2)
        image[y, x] = r.uniform(low, high)


def beach(r, n):
    sand = shade(r, (235, 210, 150), 6) + grain(r, n, 24, 22)
    image, row = land(r, n, fade(n, (120, 195, 245), (190, 230, 250)), sand)
    half = int(n * r.uniform(0.1, 0.18)) // 2
    image[row - half : row + half] = shade(r, (40, 140, 190)) + grain(r, n, 12, 25)[row - half : row + half]
    image[row + half : row + half + 2] = (240, 245, 245)
    return image


def snow(r, n):
    image, _ = land(r, n, fade(n, (170, 195, 220), (215, 228, 240)), (240, 244, 250) + grain(r, n, 10, 14), 2)
    dots(r, image, r.integers(15, 35), 255)
    return image


def grass(r, n):
    blades = shade(r, (95, 170, 60)) + grain(r, n, 32, 50) + grain(r, n, n, 25)
    return land(r, n, fade(n, (125, 195, 250), (200, 230, 250)), blades, 1.5)[0]


def night(r, n):
    image = fade(n, shade(r, (10, 12, 40), 4), shade(r, (30, 35, 85), 5))
    dots(r, image, r.integers(20, 40), 150)
    disc(image, r.uniform(5, 16), r.uniform(6, n - 6), r.uniform(3, 5), (245, 240, 200))
    return image


def wooden_floor(r, n):
    image, plank = flat(n, shade(r, (165, 110, 60))), int(r.integers(9, 14))
    for y in range(0, n, plank):
        streaks = Image.fromarray((r.random((n, 6)) * 255).astype(np.uint8)).resize((n, n))
        image[y : y + plank] += (
            r.normal(0, 10) + (np.asarray(streaks, np.float32)[y : y + plank, :, None] / 255 - 0.5) * 24
        )
        image[y] *= 0.6
    return image


def ocean(r, n):
    yy, xx = np.mgrid[:n, :n] / n
    wave = np.sin(yy * r.uniform(28, 40) + 2 * np.sin(xx * r.uniform(6, 10) + r.uniform(0, 6)))
    crests = (wave > 0.75)[..., None] * np.array((50, 50, 40), np.float32)
    return fade(n, shade(r, (35, 130, 200)), shade(r, (10, 60, 130), 6)) + crests


def brick_wall(r, n):
    image, offset = flat(n, shade(r, (165, 70, 50))) + grain(r, n, 32, 25), r.integers(0, 16)
    for i, y in enumerate(range(0, n, 8)):
        image[y] = (200, 190, 180)
        image[y : y + 8, (offset + i % 2 * 8) % 16 :: 16] = (200, 190, 180)
    return image


def desert(r, n):
    dunes = shade(r, (215, 150, 75), 6) + grain(r, n, 8, 30)
    return land(r, n, fade(n, (250, 190, 110), (255, 225, 170)), dunes, 4)[0]


def forest(r, n):
    image = fade(n, shade(r, (60, 110, 60), 6), shade(r, (40, 80, 40), 6)) + grain(r, n, 16, 30)
    for _ in range(r.integers(5, 8)):
        x, width = r.integers(0, n), r.integers(3, 6)
        image[:, x : x + width] = shade(r, (75, 52, 34), 5)
    floor = int(n * 0.8)
    image[floor:] = (60, 75, 35) + grain(r, n, 32, 30)[floor:]
    return image


def city(r, n):
    image, x = fade(n, (160, 185, 215), (215, 220, 230)), 0
    while x < n:
        width, height = int(r.integers(9, 17)), int(r.integers(n * 0.35, n * 0.75))
        wall = np.array((120, 120, 135), np.float32) + r.normal(0, 22)
        image[n - height :, x : x + width] = wall
        for y in range(n - height + 3, n - 12, 5):
            for window in range(x + 2, min(x + width - 2, n - 1), 4):
                image[y : y + 2, window : window + 2] = (250, 235, 150) if r.random() < 0.5 else wall * 0.6
        x += width
    image[-10:] = (80, 80, 85)
    return image


def sunset(r, n):
    image, row = fade(n, shade(r, (90, 50, 120), 6), shade(r, (250, 130, 60), 6)), int(n * r.uniform(0.38, 0.58))
    disc(image, row, r.uniform(10, n - 10), r.uniform(7, 11), (255, 225, 110))
    image[row + 4 :] = (70, 35, 60) + grain(r, n, 16, 20)[row + 4 :]
    return image


def mountains(r, n):
    image, (yy, xx) = fade(n, (140, 190, 235), (215, 232, 245)), np.mgrid[:n, :n].astype(np.float32)
    for _ in range(3):
        x, peak, slope = r.uniform(0, n), r.uniform(0.15, 0.45) * n, r.uniform(0.8, 1.4)
        inside = yy > peak + np.abs(xx - x) * slope
        image[inside] = np.array((110, 115, 130), np.float32) + r.normal(0, 10)
        image[inside & (yy < peak + 7 + 2 * np.sin(xx))] = (240, 245, 250)
    image[int(n * 0.82) :] = shade(r, (100, 150, 80), 5)
    return image


def road(r, n):
    image, row = land(r, n, fade(n, (140, 200, 245), (205, 230, 245)), (110, 165, 80) + grain(r, n, 32, 25))
    yy, xx = np.mgrid[:n, :n].astype(np.float32)
    tar = (yy > row) & (np.abs(xx - n / 2) < (yy - row) * 0.9 + 4)
    image[tar] = (95, 95, 100)
    image[tar & (np.abs(xx - n / 2) < 1.5) & (yy // 5 % 2 == 0)] = (240, 240, 230)
    return image


def kitchen(r, n):
    yy, xx = np.mgrid[:n, :n] // 8
    image = np.where(
        ((yy + xx) % 2 == 0)[..., None], np.array((235, 235, 230), np.float32), np.array((205, 218, 222), np.float32)
    )
    table = int(n * 0.7)
    image[table:] = shade(r, (150, 100, 65), 6)
    image[table : table + 2] = (90, 60, 40)
    return image


def plain(colour):
    def paint(r, n):
        slope = (np.arange(n, dtype=np.float32) / n - 0.5)[:, None, None] * r.uniform(-14, 14)
        return flat(n, shade(r, COLOURS[colour])) + slope

    return paint


SCENES = {
    "on the beach": beach,
    "in the snow": snow,
    "on the grass": grass,
    "at night": night,
    "on a wooden floor": wooden_floor,
    "in the ocean": ocean,
    "in front of a brick wall": brick_wall,
    "in the desert": desert,
    "in the forest": forest,
    "in the city": city,
    "at sunset": sunset,
    "in the mountains": mountains,
    "on the road": road,
    "in a kitchen": kitchen,
}
PLAIN = {f"on a{'n' if colour[0] in 'aeiou' else ''} {colour} background": plain(colour) for colour in COLOURS}
BACKGROUNDS = SCENES | PLAIN
"""Words of a caption -> painter."""


def paint(words: str, r: np.random.Generator, side: int = 64) -> np.ndarray:
    """(side, side, 3) fp32 in [0, 255]."""
    return np.clip(BACKGROUNDS[words](r, side), 0, 255).astype(np.float32)


# ---- sprites on backgrounds ------------------------------------------------------------------------------------------

SIDE = 64
RARE = ("sks", "zwx", "ohwx", "vtk", "xjq")
"""Words that captions hold here and there without meaning: the identifiers of subjects to come."""


@dataclass(frozen=True)
class World:
    """How freely sprites are placed. Sizes, jitter in pixels; rotation in degrees; the rest are probabilities."""

    sizes: tuple[int, int]
    jitter: float
    rotation: float
    flip: float
    tint: float
    own_name: float
    """How often a caption calls the sprite by its own name and not by its class noun."""
    variants: int
    """Different pictures of each background."""


WIDE = World((38, 56), 6, 10, 0.5, 0.2, 0.5, 80)
SMALL = World((46, 54), 2.5, 4, 0.0, 0.12, 0.2, 60)


@dataclass(frozen=True)
class Label:
    sprite: int
    class_noun: str
    background: str
    tint: str | None


def compose(
    sprite: Image.Image,
    background: np.ndarray,
    r: np.random.Generator,
    *,
    tint: str | None = None,
    size: int = 48,
    jitter: float = 3,
    rotation: float = 5,
    flip: float = 0.0,
) -> np.ndarray:
    """(64, 64, 3) uint8: the sprite, tinted or not, about the middle of the background."""
    if r.random() < flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # alpha stays as it is before resizing: premultiplied sprites get white halos
    angle = r.uniform(-rotation, rotation)
    filter_ = Image.Resampling.BOX if size < 40 else Image.Resampling.BICUBIC
    layers = np.asarray(sprite.rotate(angle, Image.Resampling.BICUBIC).resize((size, size), filter_), np.float32)
    alpha = layers[..., 3:] / 255
    colour = (_tinted(layers[..., :3], alpha, tint) if tint else layers[..., :3]) * alpha
    y, x = (int(np.clip((SIDE - size) / 2 + shift, -3, SIDE - size + 3)) for shift in _shifts(r, jitter))
    top, left, bottom, right = max(y, 0), max(x, 0), min(y + size, SIDE), min(x + size, SIDE)
    cut = slice(top - y, bottom - y), slice(left - x, right - x)
    image = background.copy()
    image[top:bottom, left:right] = image[top:bottom, left:right] * (1 - alpha[cut]) + colour[cut]
    return np.clip(image, 0, 255).astype(np.uint8)


def _shifts(r: np.random.Generator, jitter: float) -> tuple[float, float]:
    return r.normal(0, jitter) * 0.8 + 2, r.normal(0, jitter)


def _tinted(rgb: np.ndarray, alpha: np.ndarray, tint: str) -> np.ndarray:
    light = np.clip(rgb @ np.array((0.3, 0.59, 0.11), np.float32) / 255, 0, 1)[..., None]
    mean = float((light * alpha).sum() / alpha.sum())
    factor = np.clip(0.75 + 0.9 * (light - mean), 0, 1.3)
    return np.clip(np.array(COLOURS[tint], np.float32) * factor + np.clip(light - 0.8, 0, 1) * 100, 0, 255)


def write_caption(sprite: Sprite, background: str, tint: str | None, world: World, r: np.random.Generator) -> str:
    words = sprite.name if r.random() < world.own_name else sprite.class_noun
    if r.random() < 0.06:
        words = f"{RARE[r.integers(len(RARE))]} {words}"
    if tint:
        words = f"{tint} {words}"
    text = with_article(words) if r.random() < 0.85 else f"the {words}"
    if r.random() < 0.06:
        return text
    return f"{'a photo of ' if r.random() < 0.1 else ''}{text} {background}"


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw_world(
    sprites: list[Sprite], world: World, number: int, seed: int
) -> tuple[np.ndarray, list[str], list[Label]]:
    """(number, 64, 64, 3) uint8, captions and labels; held-out sprites are never drawn."""
    assert not any(sprite.held_out for sprite in sprites)
    r = np.random.default_rng(seed)
    crowd = Counter(sprite.class_noun for sprite in sprites)
    weights = np.array([crowd[sprite.class_noun] ** -0.4 if world is WIDE else 1.0 for sprite in sprites])
    bank = {words: [paint(words, r) for _ in range(world.variants)] for words in BACKGROUNDS}
    scenes, plain, tints = list(SCENES), list(PLAIN), list(COLOURS)
    pictures, captions, labels = np.empty((number, SIDE, SIDE, 3), np.uint8), [], []
    for i in range(number):
        index = int(r.choice(len(sprites), p=weights / weights.sum()))
        names = scenes if r.random() < 0.72 else plain
        background = names[r.integers(len(names))]
        tint = tints[r.integers(len(tints))] if r.random() < world.tint else None
        size = int(r.integers(world.sizes[0], world.sizes[1] + 1))
        pictures[i] = compose(
            sprites[index].image,
            bank[background][r.integers(world.variants)],
            r,
            tint=tint,
            size=size,
            jitter=world.jitter,
            rotation=world.rotation,
            flip=world.flip,
        )
        captions.append(write_caption(sprites[index], background, tint, world, r))
        labels.append(Label(index, sprites[index].class_noun, background, tint))
    return pictures, captions, labels
