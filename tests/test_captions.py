"""Captions are found however their files are called, taken by turns where there are several, and never lost unsaid."""

from __future__ import annotations

import json
import unicodedata

import pytest
import torch
from PIL import Image

from diffusekrona_train.config import make_config
from diffusekrona_train.data import collect, collect_prior
from diffusekrona_train.data.training_set import build_training_set
from diffusekrona_train.training import draw as drawing
from diffusekrona_train.training.check import photo_lines, prompt_lines
from diffusekrona_train.training.check.needs import step_lines
from tests.test_cache import Source

E_NFC, E_NFD = "Köter", unicodedata.normalize("NFD", "Köter")


def run(images, data=None, **subject):
    tree = {"subject": {"images": str(images), "class": "dog"} | subject, "output": "runs/dog"}
    return make_config(tree | ({"data": data} if data else {}))


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (40 * seed % 256, 90, 200 - seed)).save(path)
    return path


def captions_of(config):
    return {picture.name: picture.captions for picture in collect(config).pictures}


def refusal(config):
    with pytest.raises(ValueError) as caught:
        collect(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- text files beside photos ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("IMG_0.JPG", "IMG_0.TXT"),
        ("IMG_0.JPG", "IMG_0.txt"),
        ("IMG_0.JPG", "img_0.txt"),
        ("a.png", "a.caption"),
        ("a.png", "a.CAPTION"),
        ("a.png", "a.png.txt"),
        ("A.PNG", "A.PNG.TXT"),
        ("a.png", "a.png.caption"),
        ("a.b.png", "a.b.txt"),
        (f"{E_NFC}.png", f"{E_NFD}.txt"),
        (f"{E_NFD}.png", f"{E_NFC}.TXT"),
    ],
)
def test_a_caption_file_is_found_however_it_is_spelt(image, text, tmp_path):
    photo(tmp_path / image)
    (tmp_path / text).write_text("a [V] asleep")
    collection = collect(run(tmp_path))
    assert [picture.caption for picture in collection.pictures] == ["a sks asleep"] and collection.skipped == []
    alone = collect(run(tmp_path / image))
    listed = collect(run(tmp_path, files=[image]))
    assert alone.pictures[0].caption == listed.pictures[0].caption == "a sks asleep"


def test_a_caption_belongs_to_the_photo_of_exactly_its_name(tmp_path):
    photo(tmp_path / "A.png", 1)
    photo(tmp_path / "a.png", 2)
    (tmp_path / "a.txt").write_text("small")
    assert captions_of(run(tmp_path)) == {"A.png": ("A sks dog",), "a.png": ("small",)}


def test_of_several_caption_files_one_is_taken_and_the_others_are_named(tmp_path):
    photo(tmp_path / "a.png")
    for name, text in {"a.txt": "one", "a.caption": "two", "a.png.txt": "three", "b.txt": "of nobody"}.items():
        (tmp_path / name).write_text(text)
    collection = collect(run(tmp_path))
    assert collection.pictures[0].captions == ("one",)
    other = "another caption of a.png; a.txt is used"
    assert dict(collection.skipped) == {
        "a.caption": other, "a.png.txt": other, "b.txt": "a caption without an image"
    }  # fmt: skip
    (tmp_path / "a.txt").write_text(" \n")  # an empty file does not hide the next one
    assert collect(run(tmp_path)).pictures[0].captions == ("two",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_captions(encoding, tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", 1)
    photo(tmp_path / "c.png", 2)
    (tmp_path / "a.txt").write_bytes("[V] Köter".encode(encoding))
    rows = 'file_name,text\r\nb.png,"[V], b"\r\n'
    (tmp_path / "metadata.csv").write_bytes(rows.encode(encoding))
    assert captions_of(run(tmp_path)) == {"a.png": ("sks Köter",), "b.png": ("sks, b",), "c.png": ("A sks dog",)}
    (tmp_path / "metadata.jsonl").write_bytes(b"" + '{"file_name": "b.png", "text": "by line"}\n'.encode(encoding))
    collection = collect(run(tmp_path))
    assert collection.pictures[1].caption == "by line"
    assert ("metadata.csv", "metadata.jsonl is read") in collection.skipped


# --- metadata ----------------------------------------------------------------------------------------------------


def metadata(folder, *rows, name="metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_captions_under_another_key_are_named_and_taken_where_asked(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png", 1)
    metadata(
        tmp_path,
        {"file_name": "a.png", "blip": "a [V]", "width": 32, "tags": ["x", "y"]},
        {"file_name": "b.png", "text": "b [V]", "blip": "lost?"},
    )
    collection = collect(run(tmp_path))
    (note,) = collection.notes
    assert "metadata.jsonl: 1 lines have no caption under text, caption or prompt; not used: blip, tags" in note
    assert "subject.caption_key" in note and "width" not in note
    assert note in photo_lines(run(tmp_path), collection)
    assert captions_of(run(tmp_path, caption_key="blip")) == {"a.png": ("a sks",), "b.png": ("lost?",)}
    assert "no line of metadata.jsonl has 'blib'; its keys are blip, width, tags, text" in refusal(
        run(tmp_path, caption_key="blib")
    )
    quiet = collect(run(tmp_path, captions=False))
    assert quiet.notes == [] and {picture.caption for picture in quiet.pictures} == {"A sks dog"}


def test_what_is_lost_is_said_by_training_too(tmp_path):
    photo(tmp_path / "photos" / "a.png")
    metadata(tmp_path / "photos", {"file_name": "a.png", "blip": "a [V]"})
    config = run(tmp_path / "photos", data={"resolution": 16, "cache_dir": str(tmp_path / "cache")})
    said = []
    build_training_set(config, Source(), device="cpu", log=said.append)
    assert any("not used: blip" in line for line in said)


@pytest.mark.parametrize("key", ["Text", "CAPTION", "prompt"])
def test_keys_are_known_whatever_their_capitals(key, tmp_path):
    photo(tmp_path / "a.png")
    metadata(tmp_path, {"File_Name": "a.png", key: "mine"})
    assert captions_of(run(tmp_path)) == {"a.png": ("mine",)}


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ('file_name,text\na.png,"one, two"\nsub/b.png,b\n', {"a.png": "one, two", "sub/b.png": "b"}),
        ("file_name;text\r\na.png;one, two\r\n", {"a.png": "one, two"}),
        ("text\tfile_name\nhello there\ta.png\n", {"a.png": "hello there"}),
        ('file_name,text\n\na.png,"two\nlines"\n', {"a.png": "two lines"}),
        ("file_name,width,caption\na.png,32,c\n", {"a.png": "c"}),
        ("file_name,text\nsub\\b.png,from Windows\n", {"a.png": "A sks dog", "sub/b.png": "from Windows"}),
        ("file_name,text\nA.PNG,other capitals\n", {"a.png": "other capitals"}),
    ],
)
def test_metadata_csv(content, captions, tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "sub" / "b.png", 1)
    (tmp_path / "metadata.csv").write_text(content)
    collection = collect(run(tmp_path))
    assert {picture.name: picture.caption for picture in collection.pictures} == captions
    assert "metadata.csv" not in dict(collection.skipped)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file_name,text\na.png,one, two\n", "line 2: has 3 values for 2 columns; a caption that holds ',' goes into"),
        ("name,text\na.png,x\n", "line 2: should read file_name,text in its first line"),
        ("file_name,text\n../out.png,x\n", "line 2: ../out.png leads out of the folder"),
        ("file_name,text\n..\\out.png,x\n", r"line 2: ..\out.png leads out of the folder"),
        ("file_name,text\ngone.png,x\n", "line 2: gone.png is not there"),
        ('file_name,text\na.png,"open\n', "is not CSV"),
        (b"file_name,text\na.png,caf\xe9\n", "metadata.csv: byte 24 is not UTF-8"),
    ],
)
def test_wrong_lines_of_metadata_csv(content, said, tmp_path):
    photo(tmp_path / "in" / "a.png")
    photo(tmp_path / "out.png")
    (tmp_path / "in" / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(run(tmp_path / "in"))


def test_unused_columns_of_a_csv_are_named_and_a_key_needs_metadata(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,description,size\na.png,a [V],32\n")
    assert "not used: description (subject" in collect(run(tmp_path)).notes[0]
    assert captions_of(run(tmp_path, caption_key="description")) == {"a.png": ("a sks",)}
    (tmp_path / "metadata.csv").unlink()
    assert "holds neither metadata.jsonl nor metadata.csv" in refusal(run(tmp_path, caption_key="description"))


def test_a_text_file_that_loses_to_metadata_is_named(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("beside")
    metadata(tmp_path, {"file_name": "a.png", "text": "listed"})
    collection = collect(run(tmp_path))
    assert collection.pictures[0].caption == "listed"
    assert collection.skipped == [("a.txt", "metadata.jsonl has the caption of a.png")]


def test_names_meet_in_any_unicode_form(tmp_path):
    home = tmp_path / E_NFD
    photo(home / f"{E_NFD}.png")
    metadata(home, {"file_name": f"{E_NFC}.png", "text": "hers"})
    for images, files in ((home, None), (tmp_path / E_NFC, None), (tmp_path / E_NFC, [f"{E_NFC}.png"])):
        config = run(images, **({"files": files} if files else {}))
        assert len(collect(config).pictures) == 1
    assert list(captions_of(run(tmp_path / E_NFC)).values()) == [("hers",)]
    metadata(home, {"file_name": f"{E_NFC}.png", "text": "x"}, {"file_name": f"{E_NFD}.png", "text": "y"})
    assert "has a line already" in refusal(run(home))


def test_the_hubs_cache_keeps_its_files_as_links_to_blobs(tmp_path):
    repository = tmp_path / "datasets--me--dog"
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "more").mkdir(parents=True)
    photo(repository / "blobs" / "x.png").rename(repository / "blobs" / "b0")
    photo(tmp_path / "secret.png", 3)
    (snapshot / "a.png").symlink_to("../../blobs/b0")
    (snapshot / "more" / "b.png").symlink_to("../../../blobs/b0")
    (repository / "blobs" / "meta").write_text('{"file_name": "a.png", "text": "ay"}\n{"file_name": "more/b.png"}\n')
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/meta")
    assert captions_of(run(snapshot)) == {"a.png": ("ay",), "more/b.png": ("A sks dog",)}
    (snapshot / "out.png").symlink_to("../../../secret.png")
    (repository / "blobs" / "meta").write_text('{"file_name": "out.png", "text": "x"}\n')
    assert "out.png leads out of the folder" in refusal(run(snapshot))
    for name in ("../../blobs/b0", str(repository / "blobs" / "b0")):
        (repository / "blobs" / "meta").write_text(json.dumps({"file_name": name}) + "\n")
        assert "leads out of the folder" in refusal(run(snapshot))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.png").symlink_to(repository / "blobs" / "b0")  # a link to blobs from a folder that is no snapshot
    metadata(plain, {"file_name": "a.png"})
    assert "leads out of the folder" in refusal(run(plain))


# --- several captions of one photo -------------------------------------------------------------------------------


def several(tmp_path, how):
    """Two photos, of which the second has three captions; the same whatever they are kept in."""
    folder = tmp_path / "photos"
    photo(folder / "a.png", 1)
    photo(folder / "b.png", 2)
    texts = ["[V] one", "[V] two", "[V] three"]
    if how == "lines of a text file":
        (folder / "b.txt").write_text("\ufeff[V] one\r\n\r\n[V]   two\n[V] three\n", encoding="utf-8")
    elif how == "a list in metadata":
        metadata(folder, {"file_name": "b.png", "text": texts})
    else:
        import datasets

        table = datasets.Dataset.from_dict(
            {"image": [str(folder / "a.png"), str(folder / "b.png")], "caption": [[], texts]}
        )
        table.cast_column("image", datasets.Image()).map(lambda row: row, keep_in_memory=True).save_to_disk(
            str(tmp_path / "set")
        )
        return tmp_path / "set"
    return folder


@pytest.mark.parametrize("how", ["lines of a text file", "a list in metadata", "a list in a column"])
def test_several_captions_take_turns_and_both_photos_are_seen_equally_often(how, tmp_path):
    config = run(several(tmp_path, how), data={"resolution": 16, "cache_dir": str(tmp_path / "cache")})
    collection = collect(config)
    assert [picture.captions for picture in collection.pictures] == [
        ("A sks dog",),
        ("sks one", "sks two", "sks three"),
    ]
    assert any("captions by turns" in note for note in collection.notes)
    assert sum("caption of 1: 'sks" in line for line in prompt_lines(config, collection)) == 3
    data = build_training_set(config, Source(), device="cpu", log=lambda text: None)
    (bucket,) = data.instances
    shelf, uniform = drawing.Shelf(2, 1, (3, 2, 2)), lambda generator: torch.randint(10, (), generator=generator)
    seen = {0: [], 1: []}
    for step in range(12):
        drawn = drawing.draw(0, step, range(1), 1, [shelf], draw_t=uniform)
        (index,) = bucket.captions_of(drawn.picture, drawn.turn).tolist()
        seen[int(drawn.picture)].append(data.captions[index])
    assert seen == {0: ["A sks dog"] * 6, 1: ["sks one", "sks two", "sks three"] * 2}


def test_a_repeated_photo_shows_several_of_its_captions_in_one_pass(tmp_path):
    photo(tmp_path / "photos" / "2_sks dog" / "b.png")
    (tmp_path / "photos" / "2_sks dog" / "b.txt").write_text("one\ntwo\nthree")
    config = run(tmp_path / "photos", data={"resolution": 16, "cache_dir": str(tmp_path / "cache")})
    data = build_training_set(config, Source(), device="cpu", log=lambda text: None)
    (bucket,) = data.instances
    both = torch.tensor([0, 1])
    shown = [[data.captions[i] for i in bucket.captions_of(both, torch.tensor([turn, turn]))] for turn in range(3)]
    assert shown == [["one", "two"], ["two", "three"], ["three", "one"]]


def test_class_images_take_turns_too(tmp_path):
    photo(tmp_path / "c.png")
    (tmp_path / "c.txt").write_text("a dog\na brown dog")
    (picture,) = collect_prior(run(tmp_path), tmp_path).pictures
    assert picture.captions == ("a dog", "a brown dog")


# --- what is not a photo of the subject --------------------------------------------------------------------------


def test_masks_are_left_out_and_named(tmp_path):
    masks = ("0-masklabel", "1-CONDLABEL", "0_mask", "1-masks", "mask_0")
    for index, name in enumerate(("0", "1", *masks, "mask_7", "pug with mask", "masked ball", "mask")):
        photo(tmp_path / f"{name}.png", index)
    photo(tmp_path / "masks" / "0.png", 9)
    collection = collect(run(tmp_path))
    photos = ["0.png", "1.png", "mask.png", "mask_7.png", "masked ball.png", "pug with mask.png"]
    assert [picture.name for picture in collection.pictures] == photos
    told = dict(collection.skipped)
    for name in masks:
        assert told[f"{name}.png"] == "a mask, by its name"
    assert "a folder of masks" in told["masks"]
    (line,) = [line for line in photo_lines(run(tmp_path), collection) if line.endswith(": a mask, by its name")]
    assert all(name in line for name in masks)


def test_masks_that_metadata_or_kohyas_folders_bring_are_left_out_too(tmp_path):
    photo(tmp_path / "listed" / "a.png")
    photo(tmp_path / "listed" / "masks" / "a.png", 1)
    metadata(tmp_path / "listed", {"file_name": "a.png", "text": "x"}, {"file_name": "masks/a.png", "text": "y"})
    collection = collect(run(tmp_path / "listed"))
    assert [picture.name for picture in collection.pictures] == ["a.png"]
    assert "masks/a.png" in dict(collection.skipped)
    photo(tmp_path / "kohya" / "3_sks dog" / "a.png")
    photo(tmp_path / "kohya" / "3_sks dog_mask" / "a.png", 1)
    collection = collect(run(tmp_path / "kohya"))
    assert [picture.name for picture in collection.pictures] == ["3_sks dog/a.png"]
    assert "a folder of masks" in dict(collection.skipped)["3_sks dog_mask"]


def test_a_subject_that_is_a_mask_keeps_its_photos(tmp_path):
    for index, name in enumerate(("front_mask", "side_mask", "side")):
        photo(tmp_path / f"{name}.png", index)
    config = make_config({"subject": {"images": str(tmp_path), "class": "carnival mask"}, "output": "runs/mask"})
    assert [picture.name for picture in collect(config).pictures] == ["front_mask.png", "side.png"]


@pytest.mark.parametrize(
    ("name", "repeats", "caption", "noted"),
    [
        ("10_sks dog", 10, "sks dog", False),
        ("500_sks dog", 500, "sks dog", False),
        ("501_sks dog", 1, "sks dog", True),
        ("2023_summer", 1, "A sks dog", True),
        ("1999_a dog", 1, "A sks dog", True),
        ("20230714_trip", 1, "A sks dog", True),
        ("99999999999999999999999_x", 1, "A sks dog", True),
    ],
)
def test_a_year_is_no_number_of_repeats(name, repeats, caption, noted, tmp_path):
    photo(tmp_path / name / "a.png")
    collection = collect(run(tmp_path))
    (picture,) = collection.pictures
    assert (picture.repeats, picture.caption) == (repeats, caption)
    assert bool(collection.notes) == noted and (not noted or "each photo counts once" in collection.notes[0])


def test_kohyas_folders_may_hold_metadata(tmp_path):
    photo(tmp_path / "10_sks dog" / "a.png")
    photo(tmp_path / "10_sks dog" / "b.png", 1)
    photo(tmp_path / "10_sks dog" / "c.png", 2)
    metadata(tmp_path / "10_sks dog", {"file_name": "a.png", "text": "inner"})
    metadata(tmp_path, {"file_name": "10_sks dog/b.png", "text": "outer"})
    found = captions_of(run(tmp_path))
    assert list(found.values()) == [("inner",), ("outer",), ("sks dog",)]


def test_kohyas_counting_takes_the_folders_own_repeats(tmp_path):
    for index in range(3):
        photo(tmp_path / "10_sks dog" / f"{index}.png", index)
    config = make_config(
        {
            "subject": {"images": str(tmp_path), "class": "dog"},
            "train": {"steps": 30, "batch_size": 2},
            "output": "runs/dog",
        }
    )
    line = step_lines(config, collect(config))[1]
    assert "10 repeats x 3 photos / batch 2 = 15 steps an epoch, 2.0 epochs" in line
    for index in range(2):
        photo(tmp_path / "2_sks dog outside" / f"{index}.png", 5 + index)
    line = step_lines(config, collect(config))[1]  # (2 x 2 + 10 x 3) / 2
    assert "(2 repeats x 2 photos + 10 repeats x 3 photos) / batch 2 = 17 steps an epoch, 1.8 epochs" in line
    (tmp_path / "10_sks dog").rename(tmp_path / "1_sks dog")
    (tmp_path / "2_sks dog outside").rename(tmp_path / "1_sks dog outside")
    line = step_lines(config, collect(config))[1]
    assert "1 repeats x 5 photos / batch 2 = 3 steps an epoch, 10.0 epochs" in line
