"""krona-train init: a commented YAML that fits the photos and reads back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusekrona_train import data
from diffusekrona_train.config import load_config
from diffusekrona_train.training.check import starter
from diffusekrona_train.training.check.starter import write_init


def photos(folder, *sizes):
    folder.mkdir(parents=True)
    for index, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("free", "model"), [(None, "sdxl"), (4.0, "sd15"), (23.0, "sdxl")], ids=["no card", "small card", "large card"]
)
def test_it_is_fitted_to_the_card(free, model, tmp_path, monkeypatch):
    monkeypatch.setattr(starter, "free_gib", lambda: free)
    path = write_init(photos(tmp_path / "photos" / "dog", (900, 900)), "dog")
    config = load_config(path)
    assert path.name == "dog.yaml" and config.model == model and config.output == "runs/dog"
    assert config.data.resolution == (512 if model == "sd15" else 1024) and not config.data.buckets


def test_it_is_fitted_to_the_photos(tmp_path):
    path = write_init(photos(tmp_path / "dog", (900, 500), (500, 900), (300, 300)), "dog", tmp_path / "mine.yaml")
    text, config = path.read_text(), load_config(path)
    assert config.data.buckets and "2 of 3 photos are far from square" in text
    assert "would be enlarged" in text and "3 photos" in text
    assert all("#" in line for line in text.splitlines() if line.startswith("  resolution"))


@pytest.mark.parametrize("name", ["my dog", 'a "quoted" 🐕', "yes", "12", "it's: a #dog", "back\\slash", "-dash"])
def test_strange_folder_names_are_quoted(name, tmp_path):
    folder = photos(tmp_path / name, (700, 700))
    config = load_config(write_init(folder, "dog: small", "x.yaml"))
    assert config.subject.images == str(folder) and config.subject.class_noun == "dog: small"


def test_nothing_is_overwritten_and_no_photos_is_an_error(tmp_path):
    folder = photos(tmp_path / "dog", (700, 700))
    write_init(folder, "dog")
    with pytest.raises(ValueError, match="dog.yaml: there is a file of that name"):
        write_init(folder, "dog")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        write_init(tmp_path / "empty", "dog")
    assert not (tmp_path / "empty.yaml").exists()
    with pytest.raises(ValueError, match="subject.class"):
        write_init(folder, "", "y.yaml")


def test_embedded_subjects(tmp_path, monkeypatch):
    photos(tmp_path / "subjects" / "poodle", (64, 64))
    (tmp_path / "subjects" / "subjects.json").write_text('{"poodle": {"class": "dog", "files": ["0.png"]}}')
    monkeypatch.setattr(data, "TOYBOX_SUBJECTS", tmp_path / "subjects")
    config = load_config(write_init("toybox:poodle", "dog"))
    assert (config.model, config.data.resolution, config.train.batch_size) == ("toybox", 64, 4)
    assert config.subject.images == "toybox:poodle"
