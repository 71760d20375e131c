"""--check: it says what would happen, draws it, and loads nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusekrona_train.config import dump_config, make_config
from diffusekrona_train.data import collect, plan_crops
from diffusekrona_train.training import check
from diffusekrona_train.training.check import (
    check_config,
    draw_sheet,
    identifier_lines,
    photo_lines,
    prompt_lines,
)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a": (96, 64), "b": (64, 64), "c": (200, 90)}.items():
        Image.fromarray(rng.integers(0, 200, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "b.txt").write_text("one of [V]")
    (folder / "notes.md").write_text("stray")
    return folder


def run(photos, **more):
    tree = {"model": "toybox", "subject": {"images": str(photos), "class": "dog"}}
    return make_config(tree | {"output": str(photos.parent / "runs" / "dog")} | more)


def test_it_says_everything_and_loads_no_weights(photos):
    config = run(photos, train={"steps": 30, "batch_size": 2, "gradient_accumulation": 3})
    said = "\n".join(line for _, lines in check_config(config) for line in lines)
    for part in (
        "3 from",
        "captions: 2 from subject.prompt",
        "captions: 1 from .txt files",
        "skipped notes.md: no image, by its suffix",
        "'A sks dog'",
        "'one of sks'",
        "'A sks dog on the beach'",
        "'sks': 1 token in each text encoder",
        "krona: 128 layers (64 self, 64 cross), 125,952 parameters, 1.770% of the denoiser",
        "(4, 4) in 128 layers",
        "30 optimiser steps x batch 6",
        "= 180 views, each of 3 photos about 60 times",
        "passes: 60.0",
        "in kohya's counting 6 repeats x 3 photos / batch 6 = 3 steps an epoch, 10.0 epochs",
        "GiB plain",
        "cache ",
        "check.png",
    ):
        assert part in said, part
    assert (photos.parent / "runs" / "dog" / "check.png").is_file()
    assert {path.name for path in (photos.parent / "runs").rglob("*")} == {"dog", "check.png"}


def test_it_never_imports_diffusers_for_a_known_model(photos, tmp_path):
    path = tmp_path / "dog.yaml"
    path.write_text(dump_config(run(photos)))
    code = (
        "import sys; from diffusekrona_train.config import load_config; "
        "from diffusekrona_train.training.check import check_config; "
        f"check_config(load_config({str(path)!r})); print('diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_sheet_shows_the_crop_on_the_photo(photos, tmp_path):
    """Inside the frame the photo's own colours, outside them paled towards white; the crop itself stands beside."""
    config = run(photos)
    crops = plan_crops(collect(config).pictures, config.data, 0)
    wide = crops[2]
    marked = np.asarray(check._with_boxes(wide, wide[0].picture.open())).astype(int)
    photo = np.asarray(wide[0].picture.open()).astype(int)
    left, _, right, _ = (round(edge) for edge in wide[0].box())
    assert np.array_equal(marked[20:70, left + 6 : right - 6], photo[20:70, left + 6 : right - 6])
    assert (marked[20:70, : left - 6] > photo[20:70, : left - 6] + 30).all()
    frame = tuple(int(check.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(marked[45, left]) == frame
    sheet = Image.open(draw_sheet(config, crops, tmp_path / "sheet.png"))
    assert sheet.height > 3 * 256 and sheet.width >= 2 * 256


def test_photo_lines_tell_of_repeats_and_class_images(photos):
    (photos / "10_sks dog").mkdir()
    (photos / "2_sks").mkdir()
    (photos / "a.png").rename(photos / "10_sks dog" / "a.png")
    for name in ("b", "c"):
        (photos / f"{name}.png").rename(photos / "2_sks" / f"{name}.png")
    config = run(photos, prior={"kind": "images", "count": 7})
    lines = photo_lines(config, collect(config))
    assert "repeats: 2 photos x 2, 1 photos x 10" in lines
    assert any("class images: 7" in line for line in lines)
    own = run(photos, prior={"kind": "images", "count": 7, "images": str(photos / "2_sks")})
    assert any("class images: 2 of 7" in line for line in photo_lines(own, collect(own)))


def test_captions_without_the_identifier_are_told(photos):
    (photos / "b.txt").write_text("a brown dog")
    config = run(photos)
    assert any("1 captions do not hold the identifier 'sks'" in line for line in prompt_lines(config, collect(config)))


class Source:
    """A model on the hub whose vocabulary lies in the package."""

    def __init__(self, alias="sdxl"):
        from diffusekrona_train.models import open_model

        self.__dict__.update(vars(open_model(alias)))
        self.family = open_model(alias).family


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("sks", ["'sks': 1 token in each text encoder"]),
        ("puppy", ["'puppy': 1 token in each", "puppy means something to the model already; rare words it has: "]),
        ("dog", ["'dog' is the class noun itself"]),
        ("zxqvwkjzxq", ["tokens in each text encoder", "many tokens"]),
    ],
)
def test_identifier(token, said, photos):
    config = run(photos, subject={"images": str(photos), "class": "dog", "token": token}, model="sdxl")
    lines = identifier_lines(config, Source(), collect(config))
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert part in line


def test_captions_that_are_too_long_are_told(photos):
    (photos / "b.txt").write_text("dog " * 90)
    config = run(photos, model="sdxl")
    assert any(
        "1 captions or prompts have more than 75 tokens" in line
        for line in identifier_lines(config, Source(), collect(config))
    )


def test_a_model_whose_tokenizers_are_elsewhere(photos, monkeypatch):
    monkeypatch.setattr(check, "local_tokenizers", lambda source: [])
    config = run(photos)
    assert "were not counted" in identifier_lines(config, Source(), collect(config))[0]


def test_adapter_lines_for_budgets_types_and_all(photos):
    from diffusekrona_train.models import open_model

    source = open_model("toybox")
    trainable, lines = check.adapter_lines(run(photos, adapter={"params": "50k"}), source)
    assert trainable <= 50_000 and any("50,000" in line for line in lines)
    trainable, lines = check.adapter_lines(
        run(photos, adapter={"type": "lora", "rank": 4, "attention": "self"}), source
    )
    assert "lora: 64 layers (64 self)" in lines[0]
    trainable, lines = check.adapter_lines(run(photos, adapter={"type": "full", "targets": "all"}), source)
    assert trainable == 7_114_312 and "all 7,114,312 parameters" in lines[0]


def test_a_resolution_the_model_was_not_made_for_and_missing_weights_are_told(photos, monkeypatch):
    from diffusekrona_train.models import open_model

    lines = check.model_lines(run(photos, data={"resolution": 128}), open_model("toybox"))
    assert "the model was made for 64" in lines[1]
    assert len(check.model_lines(run(photos), open_model("toybox"))) == 1
    assert any(
        "not on this machine" in line for line in check.model_lines(run(photos, model="sd15"), open_model("sd15"))
    )


def test_one_decoded_photo_is_held_at_a_time(photos, monkeypatch):
    """Sixty photos of 24 megapixels would be 4 GiB. Counted: whole photos alive whenever the next one is decoded."""
    import gc
    import weakref

    from diffusekrona_train.data import images

    rng = np.random.default_rng(1)
    for index in range(4):
        pixels = rng.integers(0, 200, (400, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"large{index}.png")
    held: list[weakref.ref] = []
    most = []
    decode = images._decode

    def counted(content):
        gc.collect()
        most.append(sum(image() is not None for image in held))
        opened, nothing_left = decode(content)
        held.append(weakref.ref(opened.image))
        return opened, nothing_left

    monkeypatch.setattr(images, "_decode", counted)
    check_config(run(photos))
    assert len(most) >= 3 * 7 and max(most) == 0


def test_prompts_that_mean_something_elsewhere_or_are_too_long_are_told(photos):
    (photos / "b.txt").write_text("a [V] <lora:dog:1>")
    long = "A [V] {class}, sitting, standing, looking, small, large, brown, white, black, young, on the beach"
    sections = check_config(run(photos, validation={"prompts": ["a ([V] dog:1.4)", long]}))
    said = "\n".join(line for _, lines in sections for line in lines)
    assert "validation prompt 'a (sks dog:1.4)': '(sks dog:1.4)' means something to other programs" in said
    assert "caption 'a sks <lora:dog:1>': '<lora:dog:1>' means" in said
    assert "on the beach' is not read: it has" in said


def test_missing_trackers_are_told_before_anything_else(photos, monkeypatch):
    from diffusekrona_train.training import setup

    monkeypatch.setattr(setup, "_is_installed", lambda module: False)
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb"):
        check_config(run(photos, train={"trackers": ["wandb"]}))
    assert not (photos.parent / "runs").exists()
