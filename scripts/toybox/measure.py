"""How good a pipeline of toybox's world is, and how well its twelve subjects were learnt, judged by its own encoders.

    python scripts/toybox/measure.py --sprites build/toybox [--pipe FOLDER] [--prompts 200] [--sheet sheet.png]
    python scripts/train_suite.py toybox --config configs/toybox.yaml --runs runs/suite-krona
    python scripts/train_suite.py toybox --config configs/toybox.yaml --runs runs/suite-full \
        --set adapter.type=full --set adapter.targets=all --set train.learning_rate=3e-4 --set train.steps=200
    python scripts/toybox/measure.py --runs runs/suite-krona --runs runs/suite-full [--sheet sheet.png]
    python scripts/toybox/measure.py --pipe toybox-flow [--runs runs/suite-flow]    # the same of another model

A pipeline: prompts of class x background. The class is judged by the identity network, next to real renders of the same
prompts; the background by the tiny CLIP, zero-shot among the 23. Several --pipe (embedded models or
folders) are measured on the same prompts and seeds.

Subjects (--runs, trained on --pipe): five backgrounds that a subject's photos do not have, --images images of each.
Identity is the mean cosine of the judge's embeddings to the subject's photos. The nearest sprite is sought among the
subject, all sprites of its class and every fourth other one. Real renders are the subject's own sprite on the same
backgrounds.
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sprites import NAMES, Sprite, fetch, load_sprites, small_world
from world import BACKGROUNDS, SCENES, SMALL, compose, paint, with_article

from diffusekrona_train.adapters.formats import load_adapter
from diffusekrona_train.evaluation.inputs import SuiteRow, load_suite
from diffusekrona_train.evaluation.metrics import unit
from diffusekrona_train.evaluation.metrics.encoders import TOYBOX, Encoder, open_clip, open_dino
from diffusekrona_train.models import ModelSource, open_model
from diffusekrona_train.report.sheet import contact_sheet
from diffusekrona_train.sampling.render import SampleSettings, render

# ---- a pipeline ------------------------------------------------------------------------------------------------------


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


def open_pipe(model: str) -> tuple[ModelSource, Any]:
    """An embedded model or a pipeline's folder: where it comes from, and the pipeline in fp32."""
    source = open_model(model)
    pipe = source.family.pipeline(source.load("denoiser", "vae", "text_encoders", "tokenizers", "scheduler"))
    pipe.set_progress_bar_config(disable=True)
    return source, pipe


def draw(model: str, pairs: list[Pair], settings: SampleSettings) -> list[Image.Image]:
    """One picture a prompt, its noise from (prompt, position)."""
    source, pipe = open_pipe(model)
    jobs = [(text_of(pair), seed) for seed, pair in enumerate(pairs)]
    return render(pipe, source.family, jobs, settings, batch_size=20)


def measure_pipelines(given: argparse.Namespace) -> None:
    nouns = sorted({sprite.class_noun for sprite in small_world(load_sprites(given.sprites))})
    pairs = draw_pairs(nouns, given.prompts)
    real = real_renders(given.sprites, pairs)
    ceiling = right_classes(real, pairs)
    print(f"real renders: class {ceiling:.3f}, background {right_backgrounds(real, pairs):.3f}", flush=True)
    for model in given.pipe:
        pictures = draw(model, pairs, settings_of(given))
        share = right_classes(pictures, pairs)
        background = right_backgrounds(pictures, pairs)
        print(f"{model}: class {share:.3f} ({share / ceiling:.0%} of real), background {background:.3f}", flush=True)
        if given.sheet:
            path = given.sheet.with_stem("-".join([given.sheet.stem, *Path(model).parts[-2:]]))
            write_sheet(pictures[:60], pairs, path)


def write_sheet(pictures: list[Image.Image], pairs: list[Pair], path: Path) -> None:
    across = 10
    starts = range(0, len(pictures), across)
    rows = [("; ".join(text_of(p) for p in pairs[s : s + across]), pictures[s : s + across]) for s in starts]
    contact_sheet(rows, path)
    print(path)


# ---- subjects --------------------------------------------------------------------------------------------------------


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


def measure_subjects(given: argparse.Namespace) -> None:
    rows = rows_of(given.only)
    judge, sprites, (source, pipe) = open_dino("toybox"), load_sprites(given.sprites), open_pipe(given.pipe[0])
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
            found = render(pipe, source.family, jobs, settings_of(given), batch_size=10)
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


def settings_of(given: argparse.Namespace) -> SampleSettings:
    return SampleSettings(steps=given.steps, guidance=given.guidance)


def adapter_of(runs: Path, name: str) -> Path:
    return runs / name / f"{name}.safetensors"


def rows_of(only: list[str] | None) -> list[SuiteRow]:
    """The subjects of the suite, or those named; ValueError of one line for an unknown name."""
    rows = load_suite("toybox").rows
    if unknown := set(only or []) - {row.name for row in rows}:
        raise ValueError(f"--only {min(unknown)}: the suite has {', '.join(row.name for row in rows)}")
    return [row for row in rows if not only or row.name in only]


def check_runs(folders: list[Path], rows: list[SuiteRow]) -> None:
    """ValueError of one line where a folder lacks a subject's run."""
    for folder in folders:
        if missing := [row.name for row in rows if not adapter_of(folder, row.name).is_file()]:
            raise ValueError(f"{folder} has no finished run of {', '.join(missing)}: scripts/train_suite.py makes them")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sprites", type=Path, default=Path("build/toybox"), help="folder of the emoji packages")
    parser.add_argument("--sheet", type=Path, help="PNG of images of each pipeline, or of each folder of runs")
    parser.add_argument("--pipe", action="append", help="toybox, toybox-flow or a folder; may be repeated (toybox)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--runs", type=Path, action="append", help="measure subjects: folder of runs; may be repeated")
    parser.add_argument("--only", nargs="*", help="names of the subjects to measure (all)")
    parser.add_argument("--images", type=int, default=4, help="images a prompt of a subject")
    given = parser.parse_args()
    given.pipe = given.pipe or ["toybox"]
    try:
        if given.runs and len(given.pipe) > 1:
            raise ValueError("--pipe: give one with --runs, the model that they were trained on")
        check_runs(given.runs or [], rows_of(given.only))
        fetch(given.sprites)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (measure_subjects if given.runs else measure_pipelines)(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
