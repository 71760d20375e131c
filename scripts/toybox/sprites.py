"""Emoji as sprites: fetched as npm packages, named by class noun, cut out square; the held-out ones are marked.

Two styles: Fluent 3D (f) and Noto (n). classes.txt has the wide world, and the small one, which the UNet learns.

    python scripts/toybox/sprites.py FILE.npz [FOLDER]      # the small world's in one file, for machines without npm
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
PACKAGES = {"fluent": "@lobehub/fluent-emoji-3d@1.1.0", "noto": "emoji-datasource-google@16.0.0"}
HELD_OUT = {
    **dict.fromkeys(("poodle", "black_cat", "racing_car", "hiking_boot", "parrot"), "fn"),
    **dict.fromkeys(("teapot", "teddy_bear", "robot_face", "school_satchel", "alarm_clock", "t-rex", "owl"), "f"),
}
"""Short name -> styles that no stage of training may see."""

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
"""Subject of the package -> the short name of its sprite."""


@dataclass(frozen=True)
class Sprite:
    short_name: str
    name: str
    """As captions call it."""
    class_noun: str
    style: str
    image: Image.Image
    """Square RGBA."""
    held_out: bool


def fetch(folder: Path) -> None:
    """Both packages below `folder`, by npm pack; what is there stays. ValueError without npm or network."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if (folder / name / "package" / "package.json").is_file():
            continue
        try:
            command = ["npm", "pack", package, "--silent", "--pack-destination", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise ValueError("npm is missing: it fetches the emoji (install Node.js)") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"npm could not fetch {package}: {error.stderr.strip()[:160]}") from None
        archive = folder / done.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / name, filter="data")
        archive.unlink()


def load_sprites(folder: Path, side: int = 112) -> list[Sprite]:
    """The wide world in its order in classes.txt, Fluent before Noto; an emoji that a style lacks is left out."""
    table = json.loads((folder / "noto" / "package" / "emoji.json").read_text())
    codes = {row["short_name"]: row["unified"].lower() for row in table}
    found = []
    for class_noun, emoji in read_table("wide").items():
        for item in emoji:
            short_name, _, caption = (part.strip() for part in item.partition("="))
            name = caption or short_name.replace("_", " ").replace("-", " ")
            for style in "fn":
                path = _picture(folder, style, codes[short_name])
                if path is not None:
                    held_out = style in HELD_OUT.get(short_name, "")
                    found.append(Sprite(short_name, name, class_noun, style, _square(path, side), held_out))
    return found


def small_world(sprites: list[Sprite]) -> list[Sprite]:
    """What the UNet learns: Fluent alone, but for the few classes whose only Fluent sprite is held out."""
    chosen = []
    for class_noun, names in read_table("small").items():
        mates = [s for s in sprites if s.class_noun == class_noun and not s.held_out]
        fluent = [s for s in mates if s.style == "f"]
        by_name = {s.short_name: s for s in fluent}
        chosen += [by_name[name] for name in names if name in by_name] or (fluent or mates)[:1]
    return chosen


def pack(sprites: list[Sprite], path: Path) -> None:
    """Write sprites to one .npz file."""
    facts = [[s.short_name, s.name, s.class_noun, s.style, s.held_out] for s in sprites]
    np.savez_compressed(path, images=np.stack([np.asarray(s.image) for s in sprites]), facts=json.dumps(facts))


def unpack(path: Path) -> list[Sprite]:
    """Read the sprites that `pack` wrote."""
    with np.load(path) as found:
        images, facts = found["images"], json.loads(str(found["facts"]))
    rows = zip(images, facts, strict=True)
    return [Sprite(a, b, noun, style, Image.fromarray(image), out) for image, (a, b, noun, style, out) in rows]


def read_table(world: str) -> dict[str, list[str]]:
    """Class noun -> emoji, from the section [wide] or [small] of classes.txt."""
    text = (HERE / "classes.txt").read_text().split(f"[{world}]\n")[1].split("\n[")[0]
    rows = (line.partition(":") for line in text.splitlines() if line and not line.startswith("#"))
    return {noun: [item.strip() for item in items.split("|") if item.strip()] for noun, _, items in rows}


def _picture(folder: Path, style: str, code: str) -> Path | None:
    where, suffix = ("fluent/package/assets", "webp") if style == "f" else ("noto/package/img/google/64", "png")
    paths = [folder / where / f"{name}.{suffix}" for name in (code, code.replace("-fe0f", ""))]
    return next((path for path in paths if path.is_file()), None)


def _square(path: Path, side: int) -> Image.Image:
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getbbox())
    longest = max(image.size)
    square = Image.new("RGBA", (longest, longest))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def main() -> int:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "build/toybox")
    try:
        fetch(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pack(small_world(load_sprites(folder)), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
