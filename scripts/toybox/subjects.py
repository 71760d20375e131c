"""Stage subjects: five pictures of each of the twelve held-out sprites, with their class nouns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import paint
from sprites import Sprite
from stage import finish
from world import compose

NAMES = {
    "poodle": "poodle",
    "black_cat": "black_cat",
    "owl": "owl",
    "t-rex": "t-rex",
    "racing_car": "racing_car",
    "teapot": "teapot",
    "teddy_bear": "teddy_bear",
    "robot": "robot_face",
    "alarm_clock": "alarm_clock",
    "satchel": "school_satchel",
    "hiking_boot": "hiking_boot",
    "parrot": "parrot",
}
"""Subject -> the emoji's short name."""
PLACES = (
    ("on a wooden floor", 50),
    ("on the grass", 44),
    ("on a blue background", 52),
    ("in a kitchen", 46),
    ("in the city", 48),
)
"""(background, size in pixels) of the five pictures."""


def run(build: Path, sprites: list[Sprite], seed: int = 11) -> None:
    held_out = {sprite.short_name: sprite for sprite in sprites if sprite.held_out and sprite.style == "f"}
    table, sheet = {}, []
    for name, short_name in NAMES.items():
        sprite, r, folder = held_out[short_name], np.random.default_rng(seed), build / "subjects" / name
        folder.mkdir(parents=True, exist_ok=True)
        sheet.append([compose(sprite.image, paint(place, r), r, size=size) for place, size in PLACES])
        for i, picture in enumerate(sheet[-1]):
            Image.fromarray(picture).save(folder / f"{i:02d}.png")
        table[name] = {"class": sprite.class_noun, "files": [f"{i:02d}.png" for i in range(len(PLACES))]}
    (build / "subjects" / "subjects.json").write_text(json.dumps(table, indent=1) + "\n")
    finish(build, "subjects", {"subjects": len(table), "pictures": sum(map(len, sheet))}, sheet)
