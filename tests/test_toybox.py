"""The embedded model: its files, subjects and drawn world, and that a few steps on it teach a subject measurably."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusekrona_train.adapters.formats import load_adapter
from diffusekrona_train.common.files import sha256
from diffusekrona_train.config import make_config
from diffusekrona_train.evaluation.metrics.encoders import TOYBOX, open_dino
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling.render import SampleSettings, render
from diffusekrona_train.training import train

RECIPE = Path(__file__).parent.parent / "scripts" / "toybox"
MB = 2**20
JUDGES = {
    "identity.safetensors": "2fd7d742efd2ac7b7211bb1a4a8e4acd45fd37cc1711d84041c03e7a59a2b2f8",
    "clip/model.safetensors": "77196242ca176d3ff12656d1c0cc29c50bbd079f644e36128020168949265838",
}
NOUNS = {
    "poodle": "dog",
    "black_cat": "cat",
    "owl": "owl",
    "t-rex": "dinosaur",
    "racing_car": "car",
    "teapot": "teapot",
    "teddy_bear": "toy",
    "robot": "robot",
    "alarm_clock": "clock",
    "satchel": "backpack",
    "hiking_boot": "boot",
    "parrot": "bird",
}
PLACES = ("", "on the beach", "in the snow", "at night", "in the desert", "in the forest")
SEEDS = range(4)


def test_weights_are_small():
    weights = {path: path.stat().st_size for path in TOYBOX.rglob("*.safetensors")}
    assert max(weights.values()) <= 16 * MB and sum(weights.values()) <= 25 * MB


def test_every_file_has_its_sum():
    sums = {
        name: digest for digest, name in (line.split() for line in (TOYBOX / "SHA256SUMS").read_text().splitlines())
    }
    loaded = {path for part in ("pipe", "clip") for path in (TOYBOX / part).rglob("*") if path.is_file()}
    loaded |= set(TOYBOX.glob("identity.*"))
    assert {path.relative_to(TOYBOX).as_posix() for path in loaded} == set(sums)
    assert all(sha256(TOYBOX / name) == digest for name, digest in sums.items())


def test_the_judges_are_frozen():
    """Another judge means measuring every table again."""
    assert {name: sha256(TOYBOX / name) for name in JUDGES} == JUDGES


def test_subjects_have_five_pictures_and_a_known_noun():
    folder = TOYBOX / "subjects"
    rows = json.loads((folder / "subjects.json").read_text())
    assert {name: row["class"] for name, row in rows.items()} == NOUNS
    assert set(NOUNS.values()) <= set(json.loads((TOYBOX / "identity.json").read_text())["cls"])
    for name, row in rows.items():
        assert (
            sorted(row["files"]) == sorted(path.name for path in (folder / name).iterdir()) and len(row["files"]) == 5
        )
        for file in row["files"]:
            with Image.open(folder / name / file) as image:
                assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")


@pytest.fixture
def recipe(monkeypatch):
    """The recipe's modules sprites and world, and three drawn sprites, one of them held out."""
    monkeypatch.syspath_prepend(str(RECIPE))
    names = ("sprites", "world")
    sprites, world = (importlib.import_module(name) for name in names)

    def sprite(name, held_out, fill):
        image = Image.new("RGBA", (112, 112))
        ImageDraw.Draw(image).ellipse((4, 20, 108, 100), fill=fill)
        return sprites.Sprite(name, name, "dog", "f", image, held_out)

    rows = [sprite("a", False, "brown"), sprite("b", False, "gray"), sprite("poodle", True, "pink")]
    yield sprites, world, rows
    for name in names:
        sys.modules.pop(name, None)


def test_the_world_is_a_function_of_its_seed(recipe):
    _, world, rows = recipe
    first, again, other = (world.draw_world(rows[:2], world.WIDE, 6, seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0]) and first[1:] == again[1:] and first[1] != other[1]
    assert first[0].shape == (6, 64, 64, 3) and first[0].dtype == np.uint8


def test_held_out_sprites_are_never_drawn(recipe):
    sprites, world, rows = recipe
    with pytest.raises(AssertionError):
        world.draw_world(rows, world.SMALL, 1, 0)
    assert len(sprites.HELD_OUT) == len(NOUNS)
    for class_noun, names in sprites.read_table("small").items():
        assert not any("f" in sprites.HELD_OUT.get(name, "") for name in names), class_noun


def test_every_background_is_a_picture_of_its_own(recipe):
    _, world, _ = recipe
    pictures = {words: world.paint(words, np.random.default_rng(0)) for words in world.BACKGROUNDS}
    assert len(pictures) == 23
    assert all(p.shape == (64, 64, 3) and p.min() >= 0 and p.max() <= 255 for p in pictures.values())
    flat = np.stack([p.ravel() for p in pictures.values()])
    assert len(np.unique(flat, axis=0)) == 23


def test_a_stopped_unet_stage_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Six steps straight through, and six steps killed within the fifth and started again."""
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in (before := set(sys.modules)) & {"judges", "vae", "world"}:
        monkeypatch.delitem(sys.modules, name)
    unet = importlib.import_module("unet")
    monkeypatch.setattr(unet, "BATCH", 2)
    monkeypatch.setattr(unet, "sample_sheet", lambda pipe, captions: [])
    monkeypatch.setitem(unet.SHAPES, "wide", {"block_out_channels": (16, 16), "attention_head_dim": (2, 2)})
    latents, captions = torch.randn(5, 8, 16, 16), ["a dog", "a cat", "an owl", "a red car", "a dog at night"]

    def stage(name: str) -> Path:
        shutil.copytree(TOYBOX / "pipe", tmp_path / name / "pipe", dirs_exist_ok=True)
        unet.run(tmp_path / name, "wide", latents, captions, steps=6, save_every=2)
        return tmp_path / name / "unet-wide" / "diffusion_pytorch_model.safetensors"

    straight, loss_of, calls = stage("straight"), unet.loss_of, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss_of(*args)

    monkeypatch.setattr(unet, "loss_of", killed)
    with pytest.raises(KeyboardInterrupt):
        stage("stopped")
    assert sha256(stage("stopped")) == sha256(straight) and len(calls) == 7
    for name in set(sys.modules) - before:
        if str(RECIPE) in str(getattr(sys.modules[name], "__file__", "")):
            monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def similarity():
    """Call it with an adapter file (None: the base): (seeds, prompts) identity similarity to the poodle's photos."""
    source, judge = open_model("toybox"), open_dino("toybox")
    pipe = source.family.pipeline(source.load("denoiser", "vae", "text_encoders", "tokenizers", "scheduler"))
    pipe.set_progress_bar_config(disable=True)
    photos = judge.images([Image.open(path) for path in sorted((TOYBOX / "subjects" / "poodle").glob("*.png"))])
    jobs = [(f"a sks dog {place}".strip(), seed) for seed in SEEDS for place in PLACES]

    @functools.cache
    def measure(adapter: Path | None) -> np.ndarray:
        injection = load_adapter(pipe, adapter) if adapter else None
        pictures = render(pipe, source.family, jobs, SampleSettings(steps=8, guidance=4.0), batch_size=12)
        if injection:
            injection.eject()
        return (judge.images(pictures) @ photos.T).mean(axis=1).reshape(len(SEEDS), len(PLACES))

    return measure


def learn_poodle(folder: Path, steps: int, learning_rate: float) -> Path:
    """The adapter file of a short run on toybox:poodle with the embedded model's own defaults."""
    tree = {
        "model": "toybox",
        "subject": {"images": "toybox:poodle", "class": "dog"},
        "data": {"cache_dir": str(folder / "cache")},
        "train": {"steps": steps, "learning_rate": learning_rate},
        "validation": {"every": 0, "loss": False, "report": False},
        "output": str(folder / "poodle"),
    }
    return train(make_config(tree)).file


def learnt(base: np.ndarray, adapted: np.ndarray) -> bool:
    """Above the base by at least 0.10 and by five standard deviations over seeds."""
    gaps = (adapted - base).mean(axis=1)
    print(f"base {base.mean():.3f}, adapted {adapted.mean():.3f}, gaps by seed {gaps.round(3)}")
    return bool(gaps.mean() >= 0.10 and gaps.mean() >= 5 * gaps.std(ddof=1))


@pytest.mark.full
def test_sixty_steps_teach_the_poodle(tmp_path, similarity):
    assert learnt(similarity(None), similarity(learn_poodle(tmp_path, steps=60, learning_rate=4e-3)))


@pytest.mark.full
def test_without_a_learning_rate_nothing_is_learnt(tmp_path, similarity):
    """The smallest rate the config takes in place of zero."""
    assert not learnt(similarity(None), similarity(learn_poodle(tmp_path, steps=2, learning_rate=1e-12)))
