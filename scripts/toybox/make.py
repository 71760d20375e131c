"""The recipe of toybox and toybox-flow, from npm packages to weights, by one command or by stage; skips what is done.

    python scripts/toybox/make.py                       # everything, into build/toybox
    python scripts/toybox/make.py vae identity          # these stages
    python scripts/toybox/make.py flow                  # toybox-flow, with the VAE and the judges of the package
    python scripts/toybox/make.py --fraction 0.01       # a hundredth of every stage: does it run?

Stages that were stopped go on from their last state (VAE, UNet, flow) or start again (the others take minutes). With a
GPU, --device cuda. `unet.py` says how to train on two CPU cores at once.
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import argparse
import json
import os
import sys
from pathlib import Path

import flow
import judges
import numpy as np
import torch
import unet
import vae
from diffusers import AutoencoderKL
from PIL import Image
from sprites import NAMES, Sprite, fetch, load_sprites, small_world
from vae import finish
from world import COLOURS, PLAIN, SCENES, SMALL, WIDE, compose, draw_world, paint

STEPS = {
    "subjects": 1,
    "vae": 5819,
    "clip": 716,
    "identity": 2400,
    "wide": 4480,
    "small": 3339,
    "grow": 2400,
    "flow": flow.STEPS,
}
PICTURES = {"wide": 40_000, "small": 16_000}


PLACES = (
    ("on a wooden floor", 50),
    ("on the grass", 44),
    ("on a blue background", 52),
    ("in a kitchen", 46),
    ("in the city", 48),
)
"""(background, size in pixels) of the five pictures."""


def make_subjects(build: Path, sprites: list[Sprite], seed: int = 11) -> None:
    """Write five images of each of the twelve held-out sprites, with their class nouns."""
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


def words_of(sprites: list[Sprite]) -> dict:
    """Names of what the judges tell apart, as identity.json holds them."""
    return {
        "cls": sorted({sprite.class_noun for sprite in sprites}),
        "names": sorted({sprite.name for sprite in sprites}),
        "bgs": [*SCENES, *PLAIN],
        "tints": list(COLOURS),
        "ntr": sum(not sprite.held_out for sprite in sprites),
    }


def train_unet(build: Path, stage: str, sprites: list[Sprite], number: int, steps: int, device: str) -> None:
    pictures, captions, _ = draw_world(sprites, WIDE if stage == "wide" else SMALL, number, seed=5)
    coder = AutoencoderKL.from_pretrained(build / "pipe" / "vae", torch_dtype=torch.float32).eval().to(device)
    unet.run(build, stage, vae.encode(coder, pictures, device), captions, steps, device=device)


def make(build: Path, stage: str, sprites: list[Sprite], fraction: float, device: str) -> None:
    steps = max(1, round(STEPS[stage] * fraction))
    seen = [sprite for sprite in sprites if not sprite.held_out]
    if stage == "subjects":
        make_subjects(build, sprites)
    elif stage == "flow":
        flow.run(build, sprites, max(200, round(flow.PICTURES * fraction)), steps, device=device)
    elif stage in unet.SHAPES:
        number = max(200, round(PICTURES["wide" if stage == "wide" else "small"] * fraction))
        train_unet(build, stage, seen if stage == "wide" else small_world(sprites), number, steps, device)
    else:
        pictures, captions, labels = draw_world(seen, WIDE, max(1200, round(PICTURES["wide"] * fraction)), seed=0)
        if stage == "vae":
            vae.run(build, pictures, steps, device=device)
        elif stage == "clip":
            judges.train_clip(build, pictures, captions, labels, words_of(sprites), steps, device=device)
        else:
            judges.train_identity(build, pictures, labels, words_of(sprites), steps, device=device)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STEPS)} (all)")
    parser.add_argument("--build", type=Path, default=Path("build/toybox"), help="where everything goes")
    parser.add_argument("--fraction", type=float, default=1.0, help="of every stage's steps and pictures")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    np.seterr(all="raise", under="ignore")
    try:
        if unknown := [stage for stage in given.stages if stage not in STEPS]:
            raise ValueError(f"there is no stage {unknown[0]!r}; there are {', '.join(STEPS)}")
        fetch(given.build)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sprites = load_sprites(given.build)
    for stage in given.stages or STEPS:
        done = given.build / f"{stage}.done"
        if done.is_file():
            print(f"{stage}: done before (remove {done} to make it again)")
            continue
        make(given.build, stage, sprites, given.fraction, given.device)
        if os.environ.get("RANK", "0") == "0":
            done.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
