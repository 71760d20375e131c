"""Another adapter for each prompt of a batch, against calls of their own with one adapter."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from diffusekrona_train import sample
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.adapters.packed import Pack
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import open_model
from tests.runs import make_world

KINDS = {"krona": {"a1": 4, "a2": 4}, "loha": {"type": "loha", "rank": 2}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and three adapters of two types with factors that change what is seen."""
    from diffusekrona_train.adapters.formats import save_adapter

    folder = make_world(tmp_path_factory.mktemp("world"))
    source = open_model(str(folder / "model"))
    unet = source.load_denoiser()
    for kind, spec in KINDS.items():
        for number in range(3):
            injection = inject(unet, AdapterConfig(**spec), seed=number)
            for index, parameter in enumerate(injection.parameters()):
                parameter.data.add_(0.3 * np.sin(number + index))
            about = {"model": str(folder / "model"), "token": f"tok{number}", "class": "dog", "resolution": 64}
            save_adapter(folder / f"{kind}{number}.safetensors", injection, about)
            injection.eject()
    return folder


PROMPTS = ["a [V] {class}", "a [V] {class} on the beach", "a [V] {class} in the snow"]
SETTINGS = {"steps": 3, "guidance": 4.0, "seeds": [0, 1]}


def pixels(samples) -> list[np.ndarray]:
    return [np.asarray(one.image).astype(int) for one in samples]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_adapters_is_what_each_gives_alone(world, kind):
    """With guidance; batches of two over three adapters, so that one is swapped in."""
    model, files = str(world / "model"), [world / f"{kind}{i}.safetensors" for i in range(3)]
    strengths = ["", ":0.5", ":-0.8"]
    each = [f"{file}{strength}" for file, strength in zip(files, strengths, strict=True)]
    together = list(sample(None, PROMPTS, each=each, model=model, batch_size=2, **SETTINGS))
    assert [one.prompt for one in together[::2]] == ["a tok0 dog", "a tok1 dog on the beach", "a tok2 dog in the snow"]
    bare = pixels(sample(None, ["a tok0 dog"], model=model, **SETTINGS))
    assert np.abs(pixels(together)[0] - bare[0]).max() > 8, "the adapter changes nothing that could be compared"
    for number, (text, use) in enumerate(zip(PROMPTS, each, strict=True)):
        alone = pixels(sample(None, [text], adapters=[use], model=model, **SETTINGS))
        for one, wanted in zip(pixels(together)[2 * number : 2 * number + 2], alone, strict=True):
            assert np.abs(one - wanted).max() <= 2, f"prompt {number}"


def test_a_schedule_of_strengths_acts_on_each(world):
    model, files = str(world / "model"), [str(world / f"krona{i}.safetensors") for i in range(2)]
    settings = {**SETTINGS, "seeds": [0], "strength_schedule": "0.2@0.5", "model": model}
    together = pixels(sample(None, PROMPTS[:2], each=files, batch_size=2, **settings))
    plain = pixels(sample(None, PROMPTS[:2], each=files, batch_size=2, **{**settings, "strength_schedule": None}))
    for one, text, file, without in zip(together, PROMPTS, files, plain, strict=False):
        (wanted,) = pixels(sample(None, [text], adapters=[file], **settings))
        assert np.abs(one - wanted).max() <= 2
        assert np.abs(one - without).max() > 2


def test_the_model_is_loaded_once_and_factors_are_swapped_in_place(world, monkeypatch):
    from diffusekrona_train.models.source import ModelSource

    loaded, packs = [], []
    load, place = ModelSource.load_denoiser, Pack._place
    monkeypatch.setattr(ModelSource, "load_denoiser", lambda *a, **k: loaded.append(1) or load(*a, **k))
    monkeypatch.setattr(Pack, "_place", lambda self, first: packs.append(self) or place(self, first))
    each = [str(world / f"krona{i}.safetensors") for i in (0, 1, 2)]
    images = pixels(sample(None, PROMPTS, each=each, model=str(world / "model"), batch_size=1, steps=2, seeds=[0]))
    assert (len(images), len(loaded), len(packs), packs[0].slots) == (3, 1, 1, 1)


def krona_sample(*words: str):
    from diffusekrona_train.cli.sample import app

    return CliRunner().invoke(app, list(words))


def test_by_command(world, tmp_path):
    model = ["--model", str(world / "model"), "--steps", "2", "--output", str(tmp_path)]
    each = [word for i in range(2) for word in ("--each", str(world / f"krona{i}.safetensors"))]
    done = krona_sample(*PROMPTS[:2], *each, *model, "--batch-size", "2")
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.glob("*.png"))) == 2
    for words, wrong in (
        ([PROMPTS[0], *each], "--each: 2 adapters for 1 prompts; give one for each"),
        ([*PROMPTS[:2], *each[:2], "--each", str(world / "loha0.safetensors")], "adapters have the type and shapes of"),
        ([*PROMPTS[:2], *each, "--offload", "model"], "leave out --offload"),
    ):
        done = krona_sample(*words, *model, "--overwrite")
        assert done.exit_code == 2 and wrong in done.output and "Traceback" not in done.output, done.output
