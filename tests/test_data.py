"""Data: every source, every image mode, EXIF against pixels, crops against their numbers, whatever lies in a folder."""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from diffusekrona_train import data
from diffusekrona_train.config import DataConfig, make_config
from diffusekrona_train.data import (
    bucket_sizes,
    collect,
    collect_prior,
    crop_pixels,
    open_image,
    plan_crops,
)
from diffusekrona_train.data.images import to_rgb
from diffusekrona_train.data.pictures import Picture
from diffusekrona_train.training.check.advice import advise, tilt


def run(images, **subject):
    return make_config({"subject": {"images": str(images), "class": "dog"} | subject, "output": "runs/dog"})


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width, height):
    """Red tells the column, green the row, in steps that survive scaling."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // max(1, width - 1), rows * 255 // max(1, height - 1), rows * 0], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def folder_of(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        target = path / name.replace("__", ".")
        if isinstance(content, Image.Image):
            content.save(target)
        else:
            target.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def names(collection):
    return [picture.name for picture in collection.pictures]


def refusal(config):
    with pytest.raises(ValueError) as caught:
        collect(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- image modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "avif", "bmp", "tiff", "gif"])
def test_every_format_opens_as_rgb(suffix, tmp_path):
    picture = Image.new("RGB", (40, 24), (200, 100, 50))
    picture.save(tmp_path / f"a.{suffix}")
    image = open_image(tmp_path / f"a.{suffix}", "a")
    assert image.mode == "RGB" and image.size == (40, 24)
    assert np.abs(np.asarray(image).astype(int).mean((0, 1)) - (200, 100, 50)).max() < 6


def test_transparency_lies_over_white(tmp_path):
    half = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 10, 20))
    half.putpixel((15, 5), (0, 0, 0, 128))
    half.save(tmp_path / "a.png")
    pixels = np.asarray(open_image(tmp_path / "a.png", "a"))
    assert pixels[5, 5].tolist() == [0, 0, 255] and pixels[5, 12].tolist() == [255, 255, 255]
    assert pixels[5, 15].tolist() == [127, 127, 127]
    half.quantize(8).save(tmp_path / "p.png")
    palette = np.asarray(open_image(tmp_path / "p.png", "p")).astype(int)
    assert palette[5, 12].tolist() == [255, 255, 255] and palette[5, 5].tolist() == [0, 0, 255]
    grey = Image.new("LA", (20, 20), (10, 0))
    grey.putpixel((3, 4), (10, 255))
    grey.save(tmp_path / "la.png")
    expected = np.full((20, 20, 3), 255)
    expected[4, 3] = 10
    assert np.array_equal(np.asarray(open_image(tmp_path / "la.png", "la")), expected)


def test_palette_with_one_transparent_colour(tmp_path):
    image = Image.new("P", (20, 20), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (0, 0, 10, 20))
    image.save(tmp_path / "a.png", transparency=0)
    pixels = np.asarray(open_image(tmp_path / "a.png", "a"))
    assert pixels[0, 0].tolist() == [200, 0, 0] and pixels[0, 15].tolist() == [255, 255, 255]


def test_greyscale_one_bit_and_16_bit(tmp_path):
    ramp = np.linspace(0, 65535, 20 * 20).reshape(20, 20).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    deep = np.asarray(open_image(tmp_path / "deep.png", "deep"))
    assert np.abs(deep[..., 0].astype(float) - ramp / 257).max() <= 0.51
    Image.new("1", (20, 20), 1).save(tmp_path / "bit.png")
    assert np.asarray(open_image(tmp_path / "bit.png", "bit")).min() == 255
    Image.new("L", (20, 20), 77).save(tmp_path / "grey.png")
    assert np.asarray(open_image(tmp_path / "grey.png", "grey")).tolist()[0][0] == [77, 77, 77]


@pytest.mark.parametrize(
    ("top", "mode"), [(1.0, "F"), (255.0, "F"), (65535.0, "F"), (1e6, "F"), (255, "I"), (65535, "I")]
)
def test_floats_and_long_integers(top, mode):
    values = np.linspace(0, top, 400).reshape(20, 20).astype(np.float32 if mode == "F" else np.int32)
    rgb = np.asarray(to_rgb(Image.fromarray(values)))[..., 0].astype(float)
    assert np.abs(rgb - np.linspace(0, 255, 400).reshape(20, 20)).max() <= 1.0


def test_cmyk(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg", "a")).astype(int)[9, 9] - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_against_pixels(orientation, tmp_path):
    """The stored pixels are the upright ones moved back by the inverse; PIL's own transpose agrees."""
    upright = noise(40, 24)
    inverse = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(inverse(np.asarray(upright))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    opened = open_image(tmp_path / "a.png", "a")
    assert np.array_equal(np.asarray(opened), np.asarray(upright))
    with Image.open(tmp_path / "a.png") as file:
        assert np.array_equal(np.asarray(opened), np.asarray(ImageOps.exif_transpose(file)))
    (picture,) = collect(run(tmp_path)).pictures
    assert (picture.width, picture.height) == (40, 24)


def test_corrupt_exif_is_no_reason_to_refuse(tmp_path):
    noise(32, 32).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    collection = collect(run(tmp_path))
    assert (collection.pictures[0].width, len(collection.pictures)) == (32, 1)


def test_animated_image_gives_its_first_frame_and_a_remark(tmp_path):
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    collection = collect(run(tmp_path))
    assert "first frame" in collection.remarks[0][1]
    assert np.asarray(collection.pictures[0].open())[5, 5].tolist() == [255, 0, 0]


def test_heic_without_its_extra_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder_of(tmp_path, a__HEIC=b"0000ftypheic")
    assert "diffusekrona-train[heic]" in refusal(run(tmp_path))


def test_heic_with_its_extra_is_opened_by_it(tmp_path, monkeypatch):
    called = []
    fake = type(sys)("pillow_heif")
    fake.register_heif_opener = lambda: called.append(True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    noise(20, 20).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.heic")
    assert names(collect(run(tmp_path))) == ["a.heic"] and called


# --- broken files ------------------------------------------------------------------------------------------------


def test_truncated_image_is_named_before_training(tmp_path):
    noise(64, 64).save(tmp_path / "good.jpg")
    for index, keep in enumerate((20, 600, 3000)):
        noise(64, 64).save(tmp_path / f"bad{index}.jpg", quality=95)
        content = (tmp_path / f"bad{index}.jpg").read_bytes()
        (tmp_path / f"bad{index}.jpg").write_bytes(content[:keep])
    message = refusal(run(tmp_path))
    assert message.startswith("bad0.jpg: ") and "2 more images" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "0 bytes"),
        (b"GIF89a", "is not an image"),
        (b"hello, this is text", "is not an image"),
        (b"\x89PNG\r\n", "not an image"),
    ],
)
def test_what_is_no_image_despite_its_suffix(content, said, tmp_path):
    folder_of(tmp_path, a__png=content)
    assert said in refusal(run(tmp_path))


def test_wrong_suffix_of_a_real_image_is_read_by_content(tmp_path):
    noise(32, 32).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert names(collect(run(tmp_path))) == ["a.jpg"]


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_decompression_bomb(tmp_path):
    body = b"IDAT" + zlib.compress(b"\0" * 1000)
    idat = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    folder_of(tmp_path, a__png=png_header(60_000, 60_000) + idat)
    assert "too many pixels" in refusal(run(tmp_path))


def test_one_pixel_is_refused_and_a_long_strip_is_not_blown_up(tmp_path):
    folder_of(tmp_path / "dot", a__png=noise(1, 1))
    assert "1 x 1 pixels are too few" in refusal(run(tmp_path / "dot"))
    folder_of(tmp_path / "strip", a__png=noise(20_000, 20))
    pictures = collect(run(tmp_path / "strip")).pictures
    ((crop,),) = plan_crops(pictures, DataConfig(resolution=64), 0)
    assert crop.scaled_hw == (64, 64_000) and crop_pixels(crop).shape == (64, 64, 3)
    assert any("64x" in line or "3.2x" in line for line in advise([[crop]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))
def test_any_damaged_byte_gives_an_image_or_one_line(position, value, kind):
    stream = io.BytesIO()
    noise(24, 24).save(stream, kind)
    content = bytearray(stream.getvalue())
    content[position % len(content)] = value
    try:
        image = open_image(bytes(content), "a")
        assert image.mode == "RGB"
    except ValueError as error:
        assert "\n" not in str(error)


# --- folders -----------------------------------------------------------------------------------------------------


def test_stray_files_are_skipped_and_listed(tmp_path):
    folder_of(
        tmp_path,
        b__PNG=noise(20, 20),
        a__jpg=noise(20, 20),
        __DS_Store="x",
        Thumbs__db="x",
        notes__md="x",
        orphan__txt="x",
    )
    (tmp_path / "more").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "one.jpg").symlink_to(tmp_path / "two.jpg")
    (tmp_path / "two.jpg").symlink_to(tmp_path / "one.jpg")
    folder_of(tmp_path, _hidden__png=b"")
    (tmp_path / "_hidden.png").rename(tmp_path / ".hidden.png")
    collection = collect(run(tmp_path))
    assert names(collection) == ["a.jpg", "b.PNG"]
    skipped = dict(collection.skipped)
    assert skipped[".hidden.png"] == "hidden" and "link" in skipped["gone.jpg"] and "link" in skipped["one.jpg"]
    assert skipped["orphan.txt"] == "a caption without an image" and "folder" in skipped["more"]
    listed = {*names(collection), *skipped}
    assert listed == {entry.name for entry in tmp_path.iterdir()}


def test_folder_that_contains_itself_by_a_link(tmp_path):
    folder_of(tmp_path, a__png=noise(20, 20))
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(collect(run(tmp_path))) == ["a.png"]


def test_a_name_with_a_newline_stays_on_one_line(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "a\nb.png").write_bytes(b"")
    assert "a\\nb.png: the file is empty" in refusal(run(tmp_path))


@pytest.mark.parametrize("name", ["with space.png", "quote'\".png", "дом.png", "🐕.png", "%41.png", "-rf.png"])
def test_strange_names(name, tmp_path):
    noise(20, 20).save(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("a [V] dog")
    (picture,) = collect(run(tmp_path)).pictures
    assert (picture.name, picture.caption) == (name, "a sks dog")


def test_empty_folder_missing_folder_and_near_miss(tmp_path):
    folder_of(tmp_path / "photos" / "dog")
    assert "holds no image" in refusal(run(tmp_path / "photos" / "dog"))
    (tmp_path / "photos" / "dog" / "a.txt").write_text("x")
    assert "a.txt: a caption without an image" in refusal(run(tmp_path / "photos" / "dog"))
    assert "did you mean" in refusal(run(tmp_path / "photos" / "dgo"))
    assert "does not exist either" in refusal(run(tmp_path / "fotos" / "dog"))
    assert "cannot be read" in refusal(run("x" * 5000)) or "is not there" in refusal(run("x" * 5000))


def test_no_permission(tmp_path, monkeypatch):
    folder_of(tmp_path, a__png=noise(20, 20))

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    assert "Permission denied" in refusal(run(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(Image, "open", lambda *_: refuse("a.png"))
    assert "no permission" in refusal(run(tmp_path))


def test_ten_thousand_strays_do_not_hide_an_image(tmp_path):
    for index in range(2_000):
        (tmp_path / f"{index}.jpg").symlink_to("nowhere")
    folder_of(tmp_path, z__png=noise(20, 20))
    collection = collect(run(tmp_path))
    assert len(collection.pictures) == 1 and len(collection.skipped) == 2_000


def test_limit_takes_the_first_and_lists_the_rest(tmp_path):
    folder_of(tmp_path, c__png=noise(20, 20), a__png=noise(20, 20), b__png=noise(20, 20))
    collection = collect(run(tmp_path, limit=2))
    assert names(collection) == ["a.png", "b.png"] and collection.skipped == [("c.png", "beyond subject.limit: 2")]


def test_a_single_image_and_explicit_files(tmp_path):
    folder_of(tmp_path, a__png=noise(20, 20), b__png=noise(20, 20), b__txt="a [V] {class} asleep")
    assert names(collect(run(tmp_path / "a.png"))) == ["a.png"]
    collection = collect(run(tmp_path, files=["b.png", "a.png"]))
    assert [(p.name, p.caption) for p in collection.pictures] == [("b.png", "a sks dog asleep"), ("a.png", "A sks dog")]
    alone = make_config(
        {"subject": {"files": [str(tmp_path / "b.png")], "class": "dog"}, "output": "runs/dog"},
    )
    assert names(collect(alone)) == ["b.png"]
    assert "files[1]: " in refusal(run(tmp_path, files=["a.png", "c.png"]))
    assert "is named twice" in refusal(run(tmp_path, files=["a.png", "./a.png"]))
    assert "is a folder" in refusal(run(tmp_path, files=["."]))


# --- captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ("a photo of [V] dog\n", "a photo of sks dog"),
        ("one  line\tand spaces\n\n", "one line and spaces"),
        ("", "A sks dog"),
        (" \n", "A sks dog"),
        ("фото [V] 犬", "фото sks 犬"),
        ("word " * 10_000, ("word " * 10_000).strip()),
        ("utf-16 [V]".encode("utf-16"), "utf-16 sks"),
        ("\ufeffa bom".encode(), "a bom"),
    ],
)
def test_sidecar_captions(content, caption, tmp_path):
    folder_of(tmp_path, a__png=noise(20, 20), a__txt=content)
    collection = collect(run(tmp_path))
    assert collection.pictures[0].caption == caption and not collection.skipped
    off = collect(run(tmp_path, captions=False))
    assert off.pictures[0].caption == "A sks dog" and dict(off.caption_source) == {"subject.prompt": 1}


def test_caption_sources_are_counted(tmp_path):
    folder_of(tmp_path, a__png=noise(20, 20), a__txt="x", b__png=noise(20, 20), c__png=noise(20, 20), c__txt="")
    counts = dict(collect(run(tmp_path)).caption_source)
    assert counts == {".txt files": 1, "subject.prompt": 1, "subject.prompt (.txt file is empty)": 1}


def test_caption_that_is_no_text(tmp_path):
    folder_of(tmp_path, a__png=noise(20, 20), a__txt=b"\xff\xff\xff")
    assert "a.txt: byte 0 is not UTF-8" in refusal(run(tmp_path))


def test_metadata_jsonl(tmp_path):
    folder_of(tmp_path, a__png=noise(20, 20), a__txt="loses", b__png=noise(20, 20), c__png=noise(20, 20), c__txt="own")
    folder_of(tmp_path / "sub", d__png=noise(20, 20))
    rows = [
        {"file_name": "a.png", "text": "a [V] dog"},
        {"file_name": "sub/d.png", "caption": "d"},
        {"file_name": "c.png", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    collection = collect(run(tmp_path))
    found = {picture.name: picture.caption for picture in collection.pictures}
    assert found == {"a.png": "a sks dog", "b.png": "A sks dog", "c.png": "own", "sub/d.png": "d"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 2: is not JSON"),
        ("[1]", "line 2: should read"),
        ("{}", "line 2: should read"),
        ('{"file_name": 3}', "line 2: should read"),
        ('{"file_name": "gone.png"}', "line 2: gone.png is not there"),
        ('{"file_name": "../out.png"}', "leads out of the folder"),
        ('{"file_name": "/etc/passwd"}', "leads out of the folder"),
        ('{"file_name": "link.png"}', "leads out of the folder"),
        ('{"file_name": "notes.md"}', "is not an image"),
        ('{"file_name": "a.png", "text": "again"}', "has a line already"),
        ('{"file_name": "b.png", "text": 7}', "caption should be text and is int"),
        ('{"file_name": "b.png", "text": ["x", 7]}', "caption should be text and is int"),
        ('{"file_name": "b.png", "text": {"en": "x"}}', "caption should be text and is dict"),
        ('{"file_name": "a\\u0000.png"}', "should read"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_wrong_metadata_lines(line, said, tmp_path):
    folder = folder_of(tmp_path / "in", a__png=noise(20, 20), b__png=noise(20, 20), notes__md="x")
    folder_of(tmp_path, out__png=noise(20, 20))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    line = line if isinstance(line, bytes) else line.encode()
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "x"}\n' + line)
    assert said in refusal(run(folder))


def test_kohya_folders(tmp_path):
    folder_of(tmp_path / "10_sks dog", a__png=noise(20, 20), b__png=noise(20, 20), b__txt="own words", x__md="")
    folder_of(tmp_path / "2_sks dog outside", c__png=noise(20, 20))
    folder_of(tmp_path, readme__md="")
    collection = collect(run(tmp_path))
    assert [(p.name, p.caption, p.repeats) for p in collection.pictures] == [
        ("10_sks dog/a.png", "sks dog", 10),
        ("10_sks dog/b.png", "own words", 10),
        ("2_sks dog outside/c.png", "sks dog outside", 2),
    ]
    assert {name for name, _ in collection.skipped} == {"readme.md", "10_sks dog/x.md"}
    folder_of(tmp_path / "0_dog", d__png=noise(20, 20))
    assert "0 repeats" in refusal(run(tmp_path))


# --- data sets ---------------------------------------------------------------------------------------------------


def rows(tmp_path, **columns):
    import datasets

    pictures = []
    for index in range(3):
        noise(24, 20, index).save(tmp_path / f"source{index}.png")
        pictures.append(str(tmp_path / f"source{index}.png"))
    table = datasets.Dataset.from_dict({"photo": pictures} | columns)
    return table.cast_column("photo", datasets.Image()).map(lambda row: row, keep_in_memory=True)


def test_arrow_folder_parquet_file_and_parquet_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = rows(tmp_path, text=["a [V] one", "", None])
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "pq" / "data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "pq" / "data" / "train-0.parquet"))
    expected = [np.asarray(noise(24, 20, index)) for index in range(3)]
    for place in (tmp_path / "saved", tmp_path / "pq", tmp_path / "pq" / "data" / "train-0.parquet"):
        collection = collect(run(place))
        assert [p.caption for p in collection.pictures] == ["a sks one", "A sks dog", "A sks dog"]
        for picture, pixels in zip(collection.pictures, expected, strict=True):
            assert np.array_equal(np.asarray(picture.open()), pixels)
        assert names(collect(run(place, limit=1))) == ["row 0"]


def test_data_set_without_images_and_a_damaged_one(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    assert "has no column of images; it has text" in refusal(run(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    assert "cannot be read as a data set" in refusal(run(tmp_path / "b.parquet"))


def test_hub_name_goes_to_datasets_and_no_network_is_one_line(tmp_path, monkeypatch):
    import datasets

    table = rows(tmp_path, prompt=["x", "y", "z"])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    assert [p.caption for p in collect(run("google/dreambooth")).pictures] == ["x", "y", "z"]
    assert asked == [("google/dreambooth", "train")]

    def unreachable(name, split):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "is not a folder here, and the hub did not give" in refusal(run("hub:google/dreambooth"))


def test_a_mistyped_local_folder_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "is not there" in refusal(run("photos/dog"))


def test_toybox_subjects(tmp_path, monkeypatch):
    folder_of(tmp_path / "poodle", a__png=noise(64, 64), b__png=noise(64, 64))
    (tmp_path / "subjects.json").write_text('{"poodle": {"class": "dog", "files": ["b.png", "a.png"]}}')
    monkeypatch.setattr(data, "TOYBOX_SUBJECTS", tmp_path)
    assert names(collect(run("toybox:poodle"))) == ["b.png", "a.png"]
    assert "did you mean toybox:poodle?" in refusal(run("toybox:poddle"))


def test_class_images(tmp_path):
    config = run(tmp_path)
    config = config.model_copy(update={"prior": config.prior.model_copy(update={"count": 2})})
    assert collect_prior(config, tmp_path / "none").pictures == []
    folder_of(tmp_path, a__png=noise(20, 20), b__png=noise(20, 20), b__txt="another dog", c__png=noise(20, 20))
    collection = collect_prior(config, tmp_path)
    assert [(p.name, p.caption, p.is_prior) for p in collection.pictures] == [
        ("a.png", "A dog", True),
        ("b.png", "another dog", True),
    ]
    assert collection.skipped == [("c.png", "beyond prior.count: 2")]


# --- crops -------------------------------------------------------------------------------------------------------


def pictures_of(tmp_path, *sizes):
    for index, (width, height) in enumerate(sizes):
        gradient(width, height).save(tmp_path / f"{index:03d}.png")
    return collect(run(tmp_path)).pictures


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (64, 64), (40, 50), (65, 64)])
@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_numbers_are_those_of_the_pixels(size, crop, flip, tmp_path):
    """The gradient tells where each pixel lay: where top_left in the (mirrored) scaled photo says."""
    pictures = pictures_of(tmp_path, size)
    variants = 4 if flip or crop == "random" else 1
    ((*row,),) = plan_crops(pictures, DataConfig(resolution=64, crop=crop, flip=flip, variants=variants), seed=3)
    assert {planned.flipped for planned in row} == ({False, True} if flip else {False})
    for planned in row:
        pixels = crop_pixels(planned).astype(float)
        assert pixels.shape == (64, 64, 3) and planned.original_hw == (size[1], size[0])
        scaled_h, scaled_w = planned.scaled_hw
        assert min(scaled_h, scaled_w) == 64 and abs(scaled_w / scaled_h - size[0] / size[1]) < 0.02
        top, left = planned.top_left
        assert 0 <= top <= scaled_h - 64 and 0 <= left <= scaled_w - 64
        columns = (left + np.arange(64) + 0.5) / scaled_w
        expected = (1 - columns if planned.flipped else columns) * 255
        assert np.abs(pixels[32, :, 0] - expected).max() < 6
        assert np.abs(pixels[:, 32, 1] - (top + np.arange(64) + 0.5) / scaled_h * 255).max() < 6


def test_center_crop_equals_scaling_the_whole_photo_first(tmp_path):
    noise(150, 90).save(tmp_path / "a.png")
    (picture,) = collect(run(tmp_path)).pictures
    ((crop,),) = plan_crops([picture], DataConfig(resolution=64), 0)
    scaled = picture.open().resize((crop.scaled_hw[1], crop.scaled_hw[0]), Image.Resampling.LANCZOS)
    top, left = crop.top_left
    assert np.abs(crop_pixels(crop).astype(int) - np.asarray(scaled)[top : top + 64, left : left + 64]).max() <= 1


def test_a_photo_of_the_right_size_is_not_resampled(tmp_path):
    noise(80, 64).save(tmp_path / "a.png")
    (picture,) = collect(run(tmp_path)).pictures
    ((crop,),) = plan_crops([picture], DataConfig(resolution=64), 0)
    assert np.array_equal(crop_pixels(crop), np.asarray(noise(80, 64))[:, 8:72])


def test_plans_depend_on_seed_and_content_alone(tmp_path):
    pictures = pictures_of(tmp_path, (200, 100), (300, 100))
    settings_ = DataConfig(resolution=64, crop="random", variants=8)
    plan = plan_crops(pictures, settings_, 1)
    assert plan == plan_crops(pictures, settings_, 1) and plan != plan_crops(pictures, settings_, 2)
    renamed = [replace(picture, name="other", path=None) for picture in pictures]
    positions = [[crop.top_left for crop in row] for row in plan]
    assert positions == [[crop.top_left for crop in row] for row in plan_crops(renamed[::-1], settings_, 1)[::-1]]
    assert len(set(positions[0])) > 4


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
def test_bucket_sizes(resolution):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes and len(sizes) > 2
    for height, width in sizes:
        assert height * width <= resolution**2 and (width, height) in sizes
        assert height % 16 == 0 and width % 16 == 0 and 0.5 <= height / width <= 2


def test_buckets_keep_every_picture_and_cut_less_than_squares(tmp_path):
    sizes = [(200, 100), (100, 200), (120, 90), (64, 64), (300, 290), (1000, 20)]
    pictures = pictures_of(tmp_path, *sizes)
    buckets = plan_crops(pictures, DataConfig(resolution=64, buckets=True), 0)
    squares = plan_crops(pictures, DataConfig(resolution=64), 0)
    assert [row[0].picture for row in buckets] == pictures
    for ours, square in zip(buckets, squares, strict=True):
        assert ours[0].size_hw in bucket_sizes(64) and crop_pixels(ours[0]).shape[:2] == ours[0].size_hw
        assert ours[0].share >= square[0].share - 1e-9


def test_an_exact_fit_is_never_rebucketed():
    for size in bucket_sizes(1024):
        picture = Picture(None, "", False, "00" * 32, size[1], size[0], "a")
        ((crop,),) = plan_crops([picture], DataConfig(buckets=True), 0)
        assert crop.size_hw == crop.scaled_hw == size and crop.top_left == (0, 0)


# --- advice ------------------------------------------------------------------------------------------------------


def test_advice_names_what_is_wrong(tmp_path):
    from PIL import ImageFilter

    photo = noise(300, 300, 1).filter(ImageFilter.GaussianBlur(1))
    folder_of(
        tmp_path, a__png=photo, b__png=photo.crop((1, 1, 299, 299)), c__png=photo.filter(ImageFilter.GaussianBlur(8))
    )
    folder_of(tmp_path, d__png=noise(700, 200, 2), e__png=noise(40, 40, 3))
    lines = advise(plan_crops(collect(run(tmp_path)).pictures, DataConfig(resolution=128), 0))
    text = "\n".join(lines)
    assert "small: e.png" in text and "3.2x" in text
    assert "cropped: d.png" in text
    assert "blurred: c.png" in text
    assert "near-duplicates: a.png and b.png" in text


def test_good_photos_get_no_advice_and_one_photo_gets_its_own(tmp_path):
    folder_of(tmp_path, a__png=noise(300, 300, 1), b__png=noise(300, 300, 2), c__png=noise(300, 310, 3))
    crops = plan_crops(collect(run(tmp_path)).pictures, DataConfig(resolution=128), 0)
    assert advise(crops) == []
    assert advise(crops[:1]) == [
        "one photo: the subject is learnt only in this pose; 3 to 5 photos from several sides show more"
    ]


@pytest.mark.parametrize("turned", [-15, -6, 6, 15])
def test_a_photo_that_leans_is_advised_against_with_its_angle(tmp_path, turned):
    house = ImageOps.expand(noise(5, 5, 1).resize((300, 300), 0), 300, "grey")
    for seed, (left, top) in enumerate([(330, 60), (60, 360), (620, 500)], 5):
        house.paste(noise(3, 3, seed).resize((220, 180), 0), (left, top))
    leaning = house.rotate(-turned, Image.Resampling.BICUBIC).crop((150, 150, 750, 750))  # PIL turns counter-clockwise
    assert tilt(house) == 0 and tilt(leaning) == pytest.approx(turned, abs=1)
    folder_of(tmp_path, leaning__png=leaning, house__png=house)
    lines = advise(plan_crops(collect(run(tmp_path)).pictures, DataConfig(resolution=128), 0))
    (line,) = [line for line in lines if line.startswith("tilted")]
    said = float(line.removeprefix("tilted: leaning.png by ").split("°")[0])
    assert said == pytest.approx(abs(turned), abs=1)


def test_a_photo_turned_on_purpose_or_without_straight_edges_does_not_lean():
    house = noise(20, 20, 1).resize((600, 600), 0)
    assert tilt(house.rotate(40, Image.Resampling.BICUBIC).crop((150, 150, 450, 450))) == 0
    assert tilt(noise(300, 300, 1)) == tilt(Image.new("RGB", (300, 300), "grey")) == tilt(house.resize((100, 100))) == 0


def striped(degrees):
    """A photo of (side * side) tiles, each of waves that run at its angle."""
    side = round(len(degrees) ** 0.5)
    y, x = np.mgrid[: 512 // side, : 512 // side]
    tiles = [np.sin((x * np.cos(angle) + y * np.sin(angle)) / 3) for angle in np.radians(degrees)]
    grey = np.block([tiles[row * side : (row + 1) * side] for row in range(side)])
    return Image.fromarray((128 + 100 * grey).astype(np.uint8))


def test_edges_of_many_directions_or_with_level_ones_among_them_are_no_tilt():
    assert tilt(striped([12] * 4)) == pytest.approx(12, abs=1)
    assert tilt(striped([12, 12, 12, 0])) == pytest.approx(12, abs=1)
    assert tilt(striped([12, 12, 0, 0])) == 0, "half of it is level"
    assert tilt(striped([*np.linspace(8, 82, 63), 12])) == 0, "few edges agree"


def test_no_torch_is_needed():
    import subprocess

    code = "import sys, diffusekrona_train.data; print({'torch', 'datasets', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
