"""The embedded flow transformer: its files, its shared VAE, its own defaults, and the recipe that it was made by."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer

from diffusekrona_train.common.files import ASSETS, sha256
from diffusekrona_train.config import load_config
from diffusekrona_train.models import open_model

FOLDER = ASSETS / "toybox-flow"
RECIPE = Path(__file__).parent.parent / "scripts" / "toybox"


def test_every_file_has_its_sum_and_the_whole_is_small():
    lines = (line.split() for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    sums = {name: digest for digest, name in lines}
    files = [path for path in (FOLDER / "pipe").rglob("*") if path.is_file()]
    assert sums == {path.relative_to(FOLDER).as_posix(): sha256(path) for path in files}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12 * 2**20


def test_it_is_a_flow_of_toyboxs_latents_with_toyboxs_own_vae():
    source = open_model("toybox-flow")
    assert (source.family.name, source.identity, source.prediction_type) == ("zimage", "toybox-flow", "flow")
    assert source.default_resolution == 64
    assert source.family.latent_shape(source.vae_config, 64, 64) == (8, 16, 16)
    attention = [layer for layer in source.layers() if layer.kind == "self"]
    assert len(attention) == 32 and sum(16 + 192 * 192 // 16 for _ in attention) == 74_240
    loaded = source.load("vae")["vae"].state_dict()
    theirs = load_file(ASSETS / "toybox" / "pipe" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(loaded[name], value.float()) for name, value in theirs.items())


def test_its_config_takes_its_defaults():
    config = load_config("configs/toybox-flow.yaml")
    assert (config.data.resolution, config.adapter.a1, config.adapter.a2) == (64, 4, 4)
    assert (config.validation.steps, config.validation.guidance, config.train.learning_rate) == (25, 4.0, 5e-3)


# ---- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flow(monkeypatch):
    """The recipe's module, with small batches and a world of two drawn sprites on few different backgrounds."""
    monkeypatch.syspath_prepend(str(RECIPE))
    before = set(sys.modules)
    for name in before & {"flow", "flow_nets", "sprites", "world", "vae", "unet"}:
        monkeypatch.delitem(sys.modules, name)
    made = importlib.import_module("flow")
    monkeypatch.setattr(made, "BATCH", 4)
    monkeypatch.setattr(made, "SMALL", dataclasses.replace(made.SMALL, variants=1))
    monkeypatch.setattr(made, "small_world", lambda sprites: sprites)
    monkeypatch.setattr(made, "sample_sheet", lambda pipe, captions: [])
    yield made
    for name in set(sys.modules) - before:
        if str(RECIPE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def thin(flow, monkeypatch):
    """One layer between the refiners in the place of six, and fewer captions."""
    nets = importlib.import_module("flow_nets")
    monkeypatch.setattr(nets, "LAYERS", 1)
    monkeypatch.setattr(nets, "TAP", 1)
    monkeypatch.setattr(flow, "held_loss", functools.partial(flow.held_loss, batches=4))
    monkeypatch.setattr(flow, "wide_captions", functools.partial(flow.wide_captions, number=1500))


def sprites_of(flow) -> list:
    def sprite(name: str, noun: str, fill: str):
        image = Image.new("RGBA", (112, 112))
        ImageDraw.Draw(image).ellipse((4, 20, 108, 100), fill=fill)
        return flow.Sprite(name, name, noun, "f", image, False)

    return [sprite("hound", "dog", "brown"), sprite("tabby", "cat", "gray")]


def test_a_stopped_recipe_resumes_to_the_same_weights(flow, thin, tmp_path, monkeypatch):
    """Four steps straight through, and four steps stopped within the last and started again."""

    def stage(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        flow.run(tmp_path / name, sprites_of(flow), number=12, steps=4, save_every=2)
        return tmp_path / name / "flow"

    straight, losses, calls = stage("straight"), flow.Course.losses, []

    def stopped(course, r):
        calls.append(course.done)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(course, r)

    monkeypatch.setattr(flow.Course, "losses", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage("stopped")
    again = stage("stopped")
    assert calls == [0, 1, 2, 3, 2, 3]
    for file in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert sha256(again / file) == sha256(straight / file)
    pipe = ZImagePipeline.from_pretrained(straight)
    assert pipe.transformer.config.dim == 192 and open_model(str(straight)).family.name == "zimage"
    assert {"steps": 4, "samples": 16}.items() <= json.loads((tmp_path / "straight" / "flow.json").read_text()).items()


def test_the_recipe_learns(flow, thin, monkeypatch):
    """From nothing to a lower loss on batches that it does not train on."""
    torch.manual_seed(0)
    monkeypatch.setattr(flow, "WARM", 1)
    tokenizer = Qwen2Tokenizer.from_pretrained(FOLDER / "pipe" / "tokenizer")
    course = flow.Course(flow.Nets(tokenizer), tokenizer, flow.prepare(sprites_of(flow), 12, "cpu"), "cpu")
    before = flow.held_loss(course)
    for step in range(12):
        course.step(flow.scale_at(step, 12, constant=1 / 2))
    after = flow.held_loss(course)
    print(before, after)
    assert before > 1.5 and after < 0.8 * before


def test_the_recipes_networks_are_the_packages(flow):
    """Names and shapes as embedded; captions are read as the pipeline reads them."""
    tokenizer = Qwen2Tokenizer.from_pretrained(FOLDER / "pipe" / "tokenizer")
    nets = flow.Nets(tokenizer)
    for part, file in flow.WEIGHTS.items():
        theirs = load_file(FOLDER / "pipe" / part / file)
        assert {name: value.shape for name, value in getattr(nets, part).state_dict().items()} == {
            name: value.shape for name, value in theirs.items()
        }
    others = dict.fromkeys(("scheduler", "vae", "transformer"))
    pipe = ZImagePipeline(**others, tokenizer=tokenizer, text_encoder=nets.text_encoder)  # pyright: ignore[reportArgumentType]
    texts = ["a dog on the beach", "", "the red cat"]
    with torch.no_grad():
        rows = nets.read(*flow.tokens(tokenizer, texts))
        for row, wanted in zip(rows, pipe.encode_prompt(texts, do_classifier_free_guidance=False)[0], strict=True):
            torch.testing.assert_close(row[: len(wanted)], wanted)


def test_the_packages_weights_are_trained_further(flow, tmp_path, monkeypatch):
    """They begin near their last loss, and the file has both networks' tensors in fp16."""
    importlib.import_module("sprites").pack(sprites_of(flow), tmp_path / "sprites.npz")
    given = ["--sprites", str(tmp_path / "sprites.npz"), "--images", "12", "--steps", "1", "--seconds", "500"]
    given += ["--json", str(tmp_path / "told.json")]
    monkeypatch.setattr(sys, "argv", ["flow.py", str(tmp_path / "further.safetensors"), *given])
    assert flow.main() == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["steps"] == 1 and told["loss before"] < 0.6
    tensors = load_file(tmp_path / "further.safetensors")
    own = {
        f"{part}.{name}": value
        for part, file in flow.WEIGHTS.items()
        for name, value in load_file(FOLDER / "pipe" / part / file).items()
    }
    assert tensors.keys() == own.keys() and {value.dtype for value in tensors.values()} == {torch.float16}
    name = "transformer.layers.0.attention.to_q.weight"
    assert 0 < (tensors[name].float() - own[name].float()).abs().max() < 0.02


def test_sprites_travel_in_one_file(flow, tmp_path):
    sprites = importlib.import_module("sprites")
    rows = sprites_of(flow)
    sprites.pack(rows, tmp_path / "small.npz")
    for row, back in zip(rows, sprites.unpack(tmp_path / "small.npz"), strict=True):
        assert back.image.tobytes() == row.image.tobytes() and back.image.mode == "RGBA"
        assert dataclasses.replace(back, image=row.image) == row


def test_the_linear_fall_begins_after_the_constant_share(flow):
    scales = [flow.scale_at(step, flow.STEPS) for step in (0, 59, 1400, 1400 + (4579 - 1400) // 2, 4578)]
    assert scales[:3] == pytest.approx([1 / 60, 1.0, 1.0]) and scales[3] == pytest.approx(0.5, abs=1e-3)
    assert 0 < scales[4] < 1e-3
