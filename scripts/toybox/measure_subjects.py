"""How well toybox's twelve subjects were learnt: identity, nearest sprite, background, next to real renders.

    python scripts/train_suite.py toybox --config configs/toybox.yaml --runs runs/suite-krona
    python scripts/train_suite.py toybox --config configs/toybox.yaml --runs runs/suite-full \
        --set adapter.type=full --set adapter.targets=all --set train.learning_rate=3e-4 --set train.steps=200
    python scripts/toybox/measure_subjects.py --runs runs/suite-krona --runs runs/suite-full [--sheet sheet.png]

Per subject five backgrounds that its photos do not have, --images pictures of each, 25 steps, guidance 4. Identity is
the mean cosine of the judge's embeddings to the subject's photos. The nearest sprite is sought among the subject, all
sprites of its class and every fourth other one. Real renders are the subject's own sprite on the same backgrounds.
"""

from __future__ import annotations

# pyright: reportArgumentType=false, reportCallIssue=false
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import Pair, right_backgrounds
from PIL import Image
from scenes import SCENES, paint
from sprites import Sprite, fetch, load_sprites
from subjects import NAMES
from world import compose

from diffusekrona_train.adapters.formats import load_adapter
from diffusekrona_train.evaluation.inputs import load_suite
from diffusekrona_train.evaluation.metrics import unit
from diffusekrona_train.evaluation.metrics.encoders import TOYBOX, Encoder, open_dino
from diffusekrona_train.models import open_model
from diffusekrona_train.report.sheet import contact_sheet
from diffusekrona_train.sampling.render import SampleSettings, render

PLACES = ("on the beach", "in the snow", "at night", "in front of a brick wall", "in the desert")


@dataclass(frozen=True)
class Score:
    identity: float
    nearest: float
    background: float

    def __str__(self) -> str:
        return f"{self.identity:.2f} | {self.nearest:.0%} | {self.background:.0%}"


def mean(scores: list[Score]) -> Score:
    columns = ([getattr(score, name) for score in scores] for name in ("identity", "nearest", "background"))
    return Score(*(float(np.mean(column)) for column in columns))


def drawn(sprite: Sprite, place: str, seed: int) -> Image.Image:
    r = np.random.default_rng(seed)
    return Image.fromarray(compose(sprite.image, paint(place, r), r, size=48, jitter=4, rotation=5))


class Subject:
    """One subject: its photos, and the sprites among which its pictures should be nearest to its own."""

    def __init__(self, name: str, noun: str, sprites: list[Sprite], judge: Encoder) -> None:
        self.name, self.noun, self.judge = name, noun, judge
        photos = sorted((TOYBOX / "subjects" / name).glob("*.png"))
        self.photos = judge.images([Image.open(path) for path in photos])
        own = next(s for s in sprites if s.short_name == NAMES[name] and s.held_out and s.style == "f")
        self.mates = [s for s in sprites if s.class_noun == noun and s is not own]
        others = [s for s in sprites if s.class_noun != noun][::4]
        self.own, scenes = own, list(SCENES)
        rows = [[drawn(s, scenes[k * 3 % len(scenes)], k) for k in range(6)] for s in (own, *self.mates, *others)]
        self.gallery = unit(np.stack([judge.images(row).mean(axis=0) for row in rows]))

    def score(self, pictures: list[Image.Image], pairs: list[Pair]) -> Score:
        rows = self.judge.images(pictures)
        nearest = float(((rows @ self.gallery.T).argmax(axis=1) == 0).mean())
        return Score(float((rows @ self.photos.T).mean()), nearest, right_backgrounds(pictures, pairs))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, action="append", required=True, help="folder of runs; may be repeated")
    parser.add_argument("--sprites", type=Path, default=Path("build/toybox"), help="folder of the emoji packages")
    parser.add_argument("--images", type=int, default=4, help="pictures a prompt")
    parser.add_argument("--sheet", type=Path, help="PNG: a photo and one picture of each background, by subject")
    given = parser.parse_args()
    rows = load_suite("toybox").rows
    try:
        for folder in given.runs:
            if missing := [row.name for row in rows if not adapter_of(folder, row.name).is_file()]:
                raise ValueError(
                    f"{folder} has no finished run of {', '.join(missing)}: scripts/train_suite.py makes them"
                )
        fetch(given.sprites)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    judge, source, sprites = open_dino("toybox"), open_model("toybox"), load_sprites(given.sprites)
    pipe = source.family.pipeline(source.load("denoiser", "vae", "text_encoders", "tokenizers", "scheduler"))
    pipe.set_progress_bar_config(disable=True)
    kinds = ["real renders", "base", *(folder.name for folder in given.runs)]
    table: dict[str, list[Score]] = {kind: [] for kind in kinds}
    mates, sheets = [], {folder: [] for folder in given.runs}
    print("| subject | " + " | ".join(f"{kind}: identity | nearest | background" for kind in kinds) + " |")
    print("|---" * (1 + 3 * len(kinds)) + "|")
    for row in rows:
        subject = Subject(row.name, row.class_noun, sprites, judge)
        jobs = [(f"a {row.token} {row.class_noun} {place}", seed) for seed in range(given.images) for place in PLACES]
        pairs = [(row.class_noun, place) for _ in range(given.images) for place in PLACES]
        pictures = {"real renders": [drawn(subject.own, place, 20 + i) for i, (_, place) in enumerate(pairs)]}
        mates += [float((judge.images([drawn(s, PLACES[0], 20)]) @ subject.photos.T).mean()) for s in subject.mates]
        for folder in (None, *given.runs):
            injection = load_adapter(pipe, adapter_of(folder, row.name)) if folder else None
            settings = SampleSettings(steps=25, guidance=4.0)
            found = render(pipe, source.family, jobs, settings, batch_size=10)
            pictures[folder.name if folder else "base"] = found
            if injection:
                injection.eject()
                photo = Image.open(TOYBOX / "subjects" / row.name / "00.png")
                sheets[folder].append((f"{row.name} | {' | '.join(PLACES)}", [photo, *found[: len(PLACES)]]))
        for kind in kinds:
            table[kind].append(subject.score(pictures[kind], pairs))
        print(f"| {row.name} | " + " | ".join(str(table[kind][-1]) for kind in kinds) + " |", flush=True)
    print("| **mean** | " + " | ".join(str(mean(table[kind])) for kind in kinds) + " |")
    print(f"\nclassmates' identity to the subject: {np.mean(mates):.2f}")
    for folder, found in sheets.items():
        if given.sheet:
            path = given.sheet.with_stem(f"{given.sheet.stem}-{folder.name}")
            contact_sheet(found, path)
            print(path)
    return 0


def adapter_of(runs: Path, name: str) -> Path:
    return runs / name / f"{name}.safetensors"


if __name__ == "__main__":
    sys.exit(main())
