"""Toybox's world: a sprite on a background with its caption, drawn by a seeded generator, and whole data sets of them.

pictures, captions, labels = draw_world(small_world(load_sprites(folder)), SMALL, number=24_000, seed=5)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scenes import BACKGROUNDS, COLOURS, PLAIN, SCENES, paint
from sprites import Sprite

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
