"""A resumed run knows its photos by their contents: names and folders may change, pictures and captions may not."""

from __future__ import annotations

import pytest
from PIL import Image

from diffusekrona_train.data.order import Row, order_as_before, read, refuse_changes, written
from diffusekrona_train.training import checkpoint, train
from tests.runs import Told, factors, make_run, make_world, same_factors
from tests.tiny.photos import draw_photos

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_rows_find_their_order_again_and_equal_ones_are_told_apart_by_number():
    a, b, c = Row("1", ("x",), "a"), Row("2", ("x", "y"), "b"), Row("1", ("z",), "c")
    now = [Row("2", ("x", "y"), "q"), Row("1", ("z",), "r"), Row("1", ("x",), "s"), Row("1", ("x",), "t")]
    assert order_as_before([a, b, c, a], now) == [2, 0, 1, 3]
    assert read(written([a, b, c])) == [a, b, c]
    refuse_changes([a, b, c, a], now)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ([Row("1", ("x",), "a"), Row("3", ("x",), "b")], "b is another image now"),
        ([Row("1", ("x",), "a")], "b is not there any more"),
        ([Row("1", ("x",), "a"), Row("1", ("x",), "b")], "b is another image now"),
        ([Row("1", ("x",), "a"), Row("1", ("x",), "a"), Row("2", ("x",), "b")], "a is there more often"),
        ([Row("1", ("x",), "a"), Row("2", ("x",), "b"), Row("2", ("x",), "c")], "c is new"),
        ([Row("1", ("x",), "a"), Row("2", ("y",), "b")], "the caption of b was 'x' and is 'y'"),
        ([Row("1", ("x",), "a"), Row("2", ("x", "y"), "b")], "the caption of b was 'x' and is 'x / y'"),
    ],
)
def test_changes_are_named(now, said):
    with pytest.raises(ValueError) as caught:
        refuse_changes([Row("1", ("x",), "a"), Row("2", ("x",), "b")], now)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_renamed_and_moved_photo_is_drawn_as_before(world, tmp_path):
    """Bit for bit the uninterrupted run, though the names now sort the other way round and the folder is another."""
    photos = draw_photos(tmp_path / "photos", 3)
    (photos / "1.txt").write_text("first of [V]\nsecond of [V]")
    subject = {"images": str(photos), "class": "dog"}
    config = make_run(world, tmp_path / "whole" / "run", subject=subject)
    straight = factors(train(config).file.parent)
    train(make_run(world, tmp_path / "part" / "run", subject=subject, train={"steps": 2}))
    moved = tmp_path / "elsewhere"
    photos.rename(moved)
    for old, new in (("0.png", "z.png"), ("1.png", "y.png"), ("1.txt", "y.txt"), ("2.png", "a.png")):
        (moved / old).rename(moved / new)
    there = {"images": str(moved), "class": "dog"}
    resumed = make_run(world, tmp_path / "part" / "run", subject=there)
    assert same_factors(factors(train(resumed, resume=True).file.parent), straight)
    fresh = make_run(world, tmp_path / "fresh" / "run", subject=there)  # it begins in the order of today's names
    assert not same_factors(factors(train(fresh).file.parent), straight)


def test_another_picture_and_another_caption_are_refused_by_name(world, tmp_path):
    photos = draw_photos(tmp_path / "photos", 2)
    (photos / "0.txt").write_text("[V] asleep")
    subject = {"images": str(photos), "class": "dog"}
    train(make_run(world, tmp_path / "run", subject=subject, train={"steps": 2}))
    config = make_run(world, tmp_path / "run", subject=subject)
    (photos / "0.txt").write_text("[V] awake")
    with pytest.raises(ValueError, match=r"the caption of 0\.png was 'sks asleep' and is 'sks awake'"):
        train(config, resume=True)
    (photos / "0.txt").write_text("[V] asleep")
    Image.open(photos / "1.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "1.png")
    with pytest.raises(ValueError, match=r"1\.png is another image now"):
        train(config, resume=True)


def test_a_state_of_version_0_1_is_still_taken_up(world, tmp_path, monkeypatch):
    """It tells its pictures by a mark of names and captions alone."""
    from diffusekrona_train.training import setup

    whole = factors(train(make_run(world, tmp_path / "whole" / "run")).file.parent)
    short = make_run(world, tmp_path / "part" / "run", train={"steps": 2})
    save = checkpoint.save

    def as_before(*arguments, about, **more):
        old = {name: value for name, value in about.items() if name != "pictures"} | {"data": marks[-1]}
        return save(*arguments, about=old, **more)

    marks = []
    told = setup.pictures_told
    monkeypatch.setattr(setup, "pictures_told", lambda data: marks.append(setup.data_mark(data)) or told(data))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", as_before)
        train(short)
    resumed = make_run(world, tmp_path / "part" / "run")
    assert same_factors(factors(train(resumed, resume=True).file.parent), whole)


def test_training_tells_of_prompts_that_are_not_read(world, tmp_path):
    validation = {"prompts": ["a ([V] dog:1.4)", "[V] dog " + "and " * 90], "every": 0}
    told = Told()
    train(make_run(world, tmp_path / "run", train={"steps": 1}, validation=validation), progress=told)
    said = "\n".join(fields["text"] for fields in told.of("warning"))
    assert "prompt 'a (sks dog:1.4)': '(sks dog:1.4)' means something" in said
    assert "and the text encoder reads 75" in said
