"""Colours and transparency of photos, against numbers computed by hand and by littleCMS itself."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusekrona_train.config import make_config
from diffusekrona_train.data import collect, open_image, plan_crops
from diffusekrona_train.data.training_set import _image_entries
from tests.test_cache import Source

D50 = (0.9642, 1.0, 0.8249)
# primaries as XYZ under D50, as the profiles of the makers have them
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def profile(primaries, gamma: float, space: str = "RGB ", name: str = "made here") -> bytes:
    """An ICC profile of version 2: a matrix and a power curve for RGB, a power curve for grey."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + b"\0" + b"\0" * 79
    tags = {b"desc": text + b"\0" * (-len(text) % 4), b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz(D50)}
    if space == "GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, values in zip(b"rgb", primaries, strict=True):
            tags[bytes([letter]) + b"XYZ"] = xyz(values)
            tags[bytes([letter]) + b"TRC"] = curve
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for key, content in tags.items():
        table += key + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", space.encode(), b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(fixed, D50)) + b"\0" * 48
    return head + struct.pack(">I", len(tags)) + table + body


def in_srgb(pixels: np.ndarray, primaries, gamma: float) -> np.ndarray:
    """(..., 3) 0 to 255 in a space of these primaries -> the same colours in sRGB, by the formulas of the standard."""
    to_xyz = np.array(primaries).T
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]])
    linear = (pixels / 255.0) ** gamma @ to_xyz.T @ np.linalg.inv(srgb).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def colours(seed: int = 0, low: int = 60, high: int = 190) -> np.ndarray:
    """(24, 32, 3) uint8 of colours that lie inside sRGB in any of the spaces."""
    return np.random.default_rng(seed).integers(low, high, (24, 32, 3), dtype=np.uint8)


def run(images, **subject):
    return make_config({"subject": {"images": str(images), "class": "dog"} | subject, "output": "runs/dog"})


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize(("primaries", "gamma"), [(P3, 2.2), (ADOBE, 2.199)], ids=["P3", "Adobe RGB"])
def test_colours_are_converted_by_the_profile(suffix, primaries, gamma, tmp_path):
    pixels = np.full((24, 32, 3), (180, 90, 70), dtype=np.uint8) if suffix == "jpg" else colours()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", icc_profile=profile(primaries, gamma), **options)
    opened = np.asarray(open_image(tmp_path / f"a.{suffix}", "a")).astype(float)
    expected = in_srgb(pixels, primaries, gamma)
    assert np.abs(opened - expected).max() < 2.5
    assert np.abs(pixels - expected).max() > 8, "the profile would not have mattered"
    (remark,) = collect(run(tmp_path)).remarks
    assert "made here" in remark[1] and "sRGB" in remark[1]


def test_an_srgb_profile_by_any_name_leaves_every_pixel(tmp_path):
    pixels = colours(low=0, high=256)
    embedded = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=embedded)
    collection = collect(run(tmp_path))
    assert np.array_equal(np.asarray(collection.pictures[0].open()), pixels)
    assert collection.remarks == [] and collection.pictures[0].colour == ""


def test_grey_profiles_and_grey_pictures_with_an_rgb_profile(tmp_path):
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (20, 1))
    Image.fromarray(ramp).save(tmp_path / "grey.png", icc_profile=profile(None, 1.0, "GRAY"))
    Image.fromarray(ramp).save(tmp_path / "rgb.png", icc_profile=profile(ADOBE, 1.0))
    linear = ramp / 255.0
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    for name in ("grey.png", "rgb.png"):
        opened = np.asarray(open_image(tmp_path / name, name)).astype(float)
        assert np.abs(opened - expected[..., None]).max() < 3, name
    deep = Image.fromarray((ramp.astype(np.uint16)) * 257)
    deep.save(tmp_path / "deep.png", icc_profile=profile(None, 1.0, "GRAY"))
    assert np.abs(np.asarray(open_image(tmp_path / "deep.png", "deep")) - expected[..., None]).max() < 3


def test_palettes_and_alpha_keep_their_transparency(tmp_path):
    pixels = colours()
    alpha = np.full(pixels.shape[:2], 255, dtype=np.uint8)
    alpha[:, :10] = 0
    whole = Image.fromarray(np.dstack([pixels, alpha]))
    whole.save(tmp_path / "a.png", icc_profile=profile(P3, 2.2))
    opened = np.asarray(open_image(tmp_path / "a.png", "a")).astype(float)
    assert (opened[:, :10] == 255).all()
    assert np.abs(opened[:, 10:] - in_srgb(pixels, P3, 2.2)[:, 10:]).max() < 2.5
    few = Image.new("P", (20, 20), 0)
    few.putpalette([180, 90, 70, 60, 160, 90])
    few.paste(1, (0, 0, 10, 20))
    few.save(tmp_path / "p.png", transparency=0, icc_profile=profile(P3, 2.2))
    palette = np.asarray(open_image(tmp_path / "p.png", "p")).astype(float)
    assert (palette[5, 15] == 255).all()
    assert np.abs(palette[5, 5] - in_srgb(np.array([60, 160, 90]), P3, 2.2)).max() < 2.5


def ink_profile() -> bytes:
    """A CMYK profile made here: an 8-bit table of two points an ink, whose colours are Lab values."""
    corners = []
    for index in range(16):
        cyan, magenta, yellow, black = (index >> 3 & 1, index >> 2 & 1, index >> 1 & 1, index & 1)
        light = 100 * (1 - 0.35 * cyan) * (1 - 0.45 * magenta) * (1 - 0.1 * yellow) * (1 - 0.9 * black)
        a, b = (60 * magenta - 30 * cyan) * (1 - black), (70 * yellow - 40 * cyan - 10 * magenta) * (1 - black)
        corners.append((round(light * 2.55), round(a + 128), round(b + 128)))
    table = b"".join(bytes(corner) for corner in corners)
    straight = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 if i % 4 == 0 else 0) for i in range(9))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + straight * 4 + table + straight * 3
    lut += b"\0" * (-len(lut) % 4)
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + b"\0" * 79 + b"\0" * 3,
        b"wtpt": b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in D50),
        b"A2B0": lut,
    }
    body, entries, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for key, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        entries += key + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28
    head += b"".join(struct.pack(">i", round(value * 65536)) for value in D50) + b"\0" * 48
    return head + struct.pack(">I", len(tags)) + entries + body


def test_cmyk_is_converted_by_its_profile_and_plain_cmyk_as_before(tmp_path):
    """Pure magenta ink: by the profile it is what its Lab value says, and not PIL's (255, 0, 255)."""
    inks = Image.new("CMYK", (20, 20), (0, 255, 0, 0))
    inks.save(tmp_path / "a.tiff", icc_profile=ink_profile())
    opened = np.asarray(open_image(tmp_path / "a.tiff", "a")).astype(float)[5, 5]
    light, a, b = 55.0, 60.0, -10.0
    fy = (light + 16) / 116
    xyz = np.array([D50[0] * (fy + a / 500) ** 3, fy**3, D50[2] * (fy - b / 200) ** 3])
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]])
    linear = (np.linalg.inv(srgb) @ xyz).clip(0, 1)
    assert np.abs(opened - 255 * (1.055 * linear ** (1 / 2.4) - 0.055)).max() < 4
    inks.save(tmp_path / "b.tiff")
    assert np.asarray(open_image(tmp_path / "b.tiff", "b"))[5, 5].tolist() == [255, 0, 255]


def test_lab_pixels_are_colours(tmp_path):
    """Lab (50, 0, 0) is the middle grey of 118 or 119."""
    Image.new("LAB", (20, 20), (128, 128, 128)).save(tmp_path / "a.tiff")
    pixel = np.asarray(open_image(tmp_path / "a.tiff", "a")).astype(int)[5, 5]
    assert np.abs(pixel - 119).max() <= 2


@pytest.mark.parametrize(
    ("embedded", "mode", "said"),
    [
        (b"no profile at all" * 30, "RGB", "profile is damaged"),
        (profile(P3, 2.2)[:200], "RGB", "profile is damaged"),
        (profile(None, 1.0, "GRAY"), "RGB", "for GRAY and not for its pixels"),
        (ink_profile(), "RGB", "for CMYK and not for its pixels"),
        (profile(P3, 2.2), "CMYK", "for RGB and not for its pixels"),
    ],
    ids=["noise", "cut", "grey", "inks", "RGB on inks"],
)
def test_a_profile_that_cannot_be_used_is_a_remark(embedded, mode, said, tmp_path):
    image = Image.fromarray(colours()).convert(mode)
    image.save(tmp_path / "a.tiff", icc_profile=embedded)
    collection = collect(run(tmp_path))
    assert [what for _, what in collection.remarks if said in what], collection.remarks
    assert np.array_equal(np.asarray(collection.pictures[0].open()), np.asarray(image.convert("RGB")))


def test_only_photos_that_come_out_otherwise_are_encoded_again(tmp_path):
    """Version 0.1 kept entries by content alone: a photo in sRGB hits its old one, a converted one does not."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(colours(1)).save(photos / "plain.png")
    Image.fromarray(colours(2)).save(photos / "wide.png", icc_profile=profile(P3, 2.2))
    tree = {"subject": {"images": str(photos), "class": "dog"}, "output": str(tmp_path / "runs" / "dog")}
    config = make_config(tree | {"data": {"resolution": 16}})
    crops = [row[0] for row in plan_crops(collect(config).pictures, config.data, 0)]
    plain, wide = _image_entries(config, Source(), crops, {})
    assert plain.made_from.keys() == {
        "model", "parts", "revision", "variant", "vae", "precision", "scaled", "top_left", "size", "flipped", "photo"
    }  # fmt: skip
    assert wide.made_from.keys() - plain.made_from.keys() == {"colour"}


# --- transparency and several pictures in a file -----------------------------------------------------------------


def test_transparency_is_told_and_an_opaque_alpha_is_not(tmp_path):
    image = Image.fromarray(colours()).convert("RGBA")
    image.save(tmp_path / "opaque.png")
    image.putpixel((3, 3), (0, 0, 0, 0))
    image.save(tmp_path / "hole.png")
    assert collect(run(tmp_path)).remarks == [("hole.png", "transparent, laid over white")]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (20, 20), (10, 20, 30, 0)),
        Image.new("LA", (20, 20), (10, 0)),
        Image.new("RGBA", (20, 20), (255, 255, 255, 128)),
    ],
    ids=["clear", "clear grey", "white on nothing"],
)
def test_a_picture_of_which_nothing_is_left_is_refused(image, tmp_path):
    image.save(tmp_path / "ghost.png")
    with pytest.raises(ValueError, match=r"^ghost\.png: is transparent and nothing of it is left over white"):
        collect(run(tmp_path))
    Image.new("RGB", (20, 20), "white").save(tmp_path / "ghost.png")  # white all over, and meant so
    assert len(collect(run(tmp_path)).pictures) == 1


def test_a_phones_second_picture_is_no_animation_and_pages_are_pages(tmp_path):
    first, second = Image.fromarray(colours(1)), Image.fromarray(colours(2))
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second], quality=100)
    with Image.open(tmp_path / "phone.jpg") as file:
        assert (file.format, file.n_frames) == ("MPO", 2)
        whole = np.asarray(file.convert("RGB"))
    collection = collect(run(tmp_path))
    assert collection.remarks == [] and np.array_equal(np.asarray(collection.pictures[0].open()), whole)
    first, second = Image.fromarray(colours(1)), Image.fromarray(colours(2))  # PIL keeps the JPEG's settings in them
    first.save(tmp_path / "scan.tiff", save_all=True, append_images=[second])
    assert collect(run(tmp_path)).remarks == [("scan.tiff", "has 2 pages; the first is used")]
