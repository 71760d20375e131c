"""Data sets that leave something open: which column, which split, and images that are plain bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffusekrona_train.config import make_config
from diffusekrona_train.data import collect

datasets = pytest.importorskip("datasets")


def run(images, **subject):
    return make_config({"subject": {"images": str(images), "class": "dog"} | subject, "output": "runs/dog"})


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def table(images: dict[str, list[int]], **columns):
    """A data set whose image columns hold the pictures of these seeds."""
    rows = {name: [{"bytes": png(seed), "path": None} for seed in seeds] for name, seeds in images.items()}
    features = datasets.Features(
        {name: datasets.Image() for name in images}
        | {name: datasets.Dataset.from_dict({name: values}).features[name] for name, values in columns.items()}
    )
    return datasets.Dataset.from_dict(rows | columns, features=features)


def shows(collection, *seeds) -> bool:
    found = [np.asarray(one.open()) for one in collection.pictures]
    return len(found) == len(seeds) and all(
        np.array_equal(a, np.asarray(picture(seed))) for a, seed in zip(found, seeds, strict=True)
    )


def refusal(config) -> str:
    with pytest.raises(ValueError) as caught:
        collect(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_of_several_image_columns_image_is_taken_and_the_unused_captions_are_named(tmp_path):
    table({"mask": [7, 8], "image": [1, 2]}, blip_caption=["a [V]", "b"], width=[24, 24]).save_to_disk(tmp_path / "set")
    collection = collect(run(tmp_path / "set"))
    assert shows(collection, 1, 2)
    (note,) = collection.notes
    assert "not used: blip_caption (subject.caption_column" in note and "width" not in note
    chosen = collect(run(tmp_path / "set", caption_column="blip_caption", image_column="mask"))
    assert shows(chosen, 7, 8) and [one.caption for one in chosen.pictures] == ["a sks", "b"] and not chosen.notes


def test_several_image_columns_and_none_called_image_are_named(tmp_path):
    table({"photo": [1], "mask": [2]}).to_parquet(tmp_path / "a.parquet")
    message = refusal(run(tmp_path / "a.parquet"))
    assert "several columns of images, photo, mask, and none called image" in message
    assert "subject.image_column" in message
    assert shows(collect(run(tmp_path / "a.parquet", image_column="photo")), 1)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("image_column", "foto", "subject.image_column: .* has no column 'foto'; it has image, text"),
        ("image_column", "text", "the column 'text' of .* holds no images"),
        ("caption_column", "txt", "subject.caption_column: .* has no column 'txt'; it has text"),
        ("split", "test", "subject.split: .* has no splits"),
        ("caption_key", "text", "subject.caption_key is for a folder's .*takes subject.caption_column"),
    ],
)
def test_what_is_asked_for_and_not_there_is_refused(field, value, said, tmp_path):
    import re

    table({"image": [1]}, text=["a"]).save_to_disk(tmp_path / "set")
    assert re.search(said, refusal(run(tmp_path / "set", **{field: value})))


def test_fields_of_data_sets_are_refused_for_a_folder(tmp_path):
    picture(1).save(tmp_path / "a.png")
    for field in ("image_column", "caption_column", "split"):
        assert f"subject.{field} is for data sets, and" in refusal(run(tmp_path, **{field: "x"}))


@pytest.mark.parametrize("column", [[3, 4], [{"en": "x"}, None], [[1, 2], [3]]], ids=["numbers", "dict", "lists"])
def test_captions_that_are_no_text_are_refused_by_row(column, tmp_path):
    table({"image": [1, 2]}, text=column).save_to_disk(tmp_path / "set")
    assert "row 0, column text: the caption should be text and is" in refusal(run(tmp_path / "set"))
    assert shows(collect(run(tmp_path / "set", captions=False)), 1, 2)


def split(**splits):
    return datasets.DatasetDict({name: table({"image": seeds}) for name, seeds in splits.items()})


def test_splits_are_named_where_none_is_called_train(tmp_path):
    split(validation=[9], training=[1, 2]).save_to_disk(tmp_path / "two")
    message = refusal(run(tmp_path / "two"))
    assert "the splits validation, training and none called train" in message and "subject.split" in message
    assert shows(collect(run(tmp_path / "two", split="training")), 1, 2)
    assert "has no split 'trian'; it has validation, training" in refusal(run(tmp_path / "two", split="trian"))
    split(validation=[9], train=[1, 2]).save_to_disk(tmp_path / "usual")
    assert shows(collect(run(tmp_path / "usual")), 1, 2)
    split(photos=[3]).save_to_disk(tmp_path / "one")
    assert shows(collect(run(tmp_path / "one")), 3)


def test_files_of_several_splits_are_not_thrown_together(tmp_path):
    """As the hub lays them out: data/train-00000-of-00002.parquet beside data/test-00000-of-00001.parquet."""
    (tmp_path / "data").mkdir()
    for name, seeds in {"train-00000-of-00002": [1], "train-00001-of-00002": [2], "test-00000-of-00001": [9]}.items():
        table({"image": seeds}).to_parquet(tmp_path / "data" / f"{name}.parquet")
    assert shows(collect(run(tmp_path)), 1, 2)
    assert shows(collect(run(tmp_path, split="test")), 9)
    for path in (tmp_path / "data").glob("train*"):
        path.rename(path.with_name(path.name.replace("train", "validation")))
    assert "has the splits test, validation and none called train" in refusal(run(tmp_path))


def test_a_hub_set_without_a_train_split_says_which_there_are(monkeypatch):
    asked = []

    def load(name, split):
        asked.append(split)
        if split == "train":
            raise ValueError("Unknown split \"train\". Should be one of ['validation', 'test'].")
        return table({"image": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal(run("hub:me/dog"))
    assert "['validation', 'test']" in message and "subject.split" in message
    assert shows(collect(run("hub:me/dog", split="test")), 1) and asked == ["train", "test"]


def test_plain_bytes_that_are_images_are_taken(tmp_path):
    rows = {"md5": [b"\x01\x02", b"\x03"], "jpg": [png(1), png(2)], "text": ["one", "two"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    collection = collect(run(tmp_path / "a.parquet"))
    assert shows(collection, 1, 2) and [one.caption for one in collection.pictures] == ["one", "two"]
    struct = [{"bytes": png(3), "path": "x.png"}, {"bytes": png(4), "path": None}]
    datasets.Dataset.from_dict({"image": struct}).to_parquet(tmp_path / "b.parquet")
    assert shows(collect(run(tmp_path / "b.parquet")), 3, 4)
    datasets.Dataset.from_dict({"image": [b"no picture"]}).to_parquet(tmp_path / "c.parquet")
    assert "has no column of images; it has image" in refusal(run(tmp_path / "c.parquet"))
    assert "holds no images" in refusal(run(tmp_path / "c.parquet", image_column="image"))
    datasets.Dataset.from_dict({"image": [png(1), b""]}).to_parquet(tmp_path / "d.parquet")
    assert "row 1: holds no image" in refusal(run(tmp_path / "d.parquet"))
