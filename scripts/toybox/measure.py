"""How good a toybox pipeline is: classes and backgrounds on prompts of class x background, judged by its own encoders.

    python scripts/toybox/measure.py --sprites build/toybox [--pipe FOLDER] [--prompts 200] [--sheet sheet.png]

The class is judged by the identity network, next to real renders of the same prompts; the background by the
tiny CLIP, zero-shot among the 23. Several --pipe folders are measured on the same prompts and seeds. How well
subjects are learnt is `scripts/train_suite.py toybox` and `krona-eval suite toybox`.
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from scenes import BACKGROUNDS, paint
from sprites import fetch, load_sprites, small_world
from world import SMALL, compose, with_article

from diffusekrona_train.evaluation.metrics.encoders import TOYBOX, open_clip, open_dino
from diffusekrona_train.models import sdxl
from diffusekrona_train.report.sheet import contact_sheet
from diffusekrona_train.sampling.render import SampleSettings, render

Pair = tuple[str, str]
"""(class noun, background)."""


def draw_pairs(nouns: list[str], number: int, seed: int = 0) -> list[Pair]:
    """Every class about equally often, each with another background."""
    r = np.random.default_rng(seed)
    order = [noun for _ in range(-(-number // len(nouns))) for noun in r.permutation(nouns)]
    backgrounds = list(BACKGROUNDS)
    return [(str(noun), backgrounds[r.integers(len(backgrounds))]) for noun in order[:number]]


def text_of(pair: Pair) -> str:
    return f"{with_article(pair[0])} {pair[1]}"


def real_renders(folder: Path, pairs: list[Pair], seed: int = 1) -> list[Image.Image]:
    """The same prompts as the world itself draws them: the ceiling of every number."""
    sprites, r = small_world(load_sprites(folder)), np.random.default_rng(seed)
    pictures = []
    for noun, background in pairs:
        mates = [sprite for sprite in sprites if sprite.class_noun == noun]
        size = int(r.integers(SMALL.sizes[0], SMALL.sizes[1] + 1))
        sprite = mates[r.integers(len(mates))].image
        scene = paint(background, r)
        picture = compose(sprite, scene, r, size=size, jitter=SMALL.jitter, rotation=SMALL.rotation)
        pictures.append(Image.fromarray(picture))
    return pictures


def right_classes(pictures: list[Image.Image], pairs: list[Pair]) -> float:
    """Share of pictures that the identity network's classifier (165 classes) calls by their noun."""
    tensors = load_file(TOYBOX / "identity.safetensors")
    names = json.loads((TOYBOX / "identity.json").read_text())["cls"]
    rows = torch.from_numpy(open_dino("toybox").images(pictures)) * 12  # the temperature it was trained with
    said = (rows @ tensors["hc.weight"].float().T + tensors["hc.bias"].float()).argmax(dim=1)
    return float(np.mean([names[index] == noun for index, (noun, _) in zip(said.tolist(), pairs, strict=True)]))


def right_backgrounds(pictures: list[Image.Image], pairs: list[Pair]) -> float:
    """Share of pictures whose nearest caption, among their noun on each of the 23 backgrounds, is their own."""
    clip, backgrounds = open_clip("toybox"), list(BACKGROUNDS)
    images = clip.images(pictures)
    hits = []
    for image, (noun, background) in zip(images, pairs, strict=True):
        texts = clip.texts([text_of((noun, other)) for other in backgrounds])
        hits.append(backgrounds[int((texts @ image).argmax())] == background)
    return float(np.mean(hits))


def draw(pipe_folder: Path, pairs: list[Pair], steps: int, guidance: float) -> list[Image.Image]:
    """One picture a prompt, its noise from (prompt, position)."""
    pipe = StableDiffusionXLPipeline.from_pretrained(pipe_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    jobs = [(text_of(pair), seed) for seed, pair in enumerate(pairs)]
    return render(pipe, sdxl.SDXL(), jobs, SampleSettings(steps=steps, guidance=guidance), batch_size=20)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sprites", type=Path, default=Path("build/toybox"), help="folder of the emoji packages")
    parser.add_argument("--pipe", type=Path, action="append", help="pipeline folder; may be repeated (the package's)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, help="PNG of the first 60 pictures of each pipeline")
    given = parser.parse_args()
    try:
        fetch(given.sprites)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    nouns = sorted({sprite.class_noun for sprite in small_world(load_sprites(given.sprites))})
    pairs = draw_pairs(nouns, given.prompts)
    real = real_renders(given.sprites, pairs)
    ceiling = right_classes(real, pairs)
    print(f"real renders: class {ceiling:.3f}, background {right_backgrounds(real, pairs):.3f}", flush=True)
    for folder in given.pipe or [TOYBOX / "pipe"]:
        pictures = draw(folder, pairs, given.steps, given.guidance)
        share = right_classes(pictures, pairs)
        background = right_backgrounds(pictures, pairs)
        print(f"{folder}: class {share:.3f} ({share / ceiling:.0%} of real), background {background:.3f}", flush=True)
        if given.sheet:
            path = given.sheet.with_stem(f"{given.sheet.stem}-{folder.parent.name}-{folder.name}")
            write_sheet(pictures[:60], pairs, path)
    return 0


def write_sheet(pictures: list[Image.Image], pairs: list[Pair], path: Path) -> None:
    across = 10
    starts = range(0, len(pictures), across)
    rows = [("; ".join(text_of(p) for p in pairs[s : s + across]), pictures[s : s + across]) for s in starts]
    contact_sheet(rows, path)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
