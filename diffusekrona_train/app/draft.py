"""The subject that is being prepared: photos, captions and fields in one folder, which becomes the run folder.

An upload is looked at in memory: its format by its first bytes, its size, and whether it decodes. Only then a file is
written, under a name made here.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from diffusekrona_train.app.form import overrides_of
from diffusekrona_train.app.runs import ASKED, HOME
from diffusekrona_train.common.files import atomic, read_text
from diffusekrona_train.config import RunConfig, make_config
from diffusekrona_train.data import Crop, collect, crop_pixels, plan_crops, printable, toybox_subjects
from diffusekrona_train.data.images import inspect_image

MOST_PHOTOS, LARGEST_PHOTO, LONGEST_CAPTION = 60, 64 * 2**20, 2000
FORMATS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "AVIF": ".avif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".gif",
    "HEIF": ".heic",
}
"""Formats that are taken -> suffix. Pillow reads many more, some through other programs."""
STARTS: dict[str, dict[str, Any]] = {
    "toybox": {
        "train": {"steps": 300, "learning_rate": 2e-3, "checkpoint_every": 50},
        "validation": {"every": 50},
    },
    "toybox-flow": {"train": {"steps": 300, "checkpoint_every": 50}, "validation": {"every": 50}},
}
"""What a new subject begins with beyond the config's defaults: the embedded models learn in fewer steps."""
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.I)  # names that Windows keeps for itself


@dataclass(frozen=True)
class Photo:
    """A photo of the draft: file name, caption ('' without one), size in pixels, and its crop as trained."""

    name: str
    caption: str
    width: int
    height: int
    crop: Crop

    @property
    def box(self) -> str:
        """Return the crop as CSS: a rectangle in percent of the photo."""
        left, top, right, bottom = self.crop.box()
        sides = left / self.width, top / self.height, (right - left) / self.width, (bottom - top) / self.height
        return "left:{:.2%};top:{:.2%};width:{:.2%};height:{:.2%}".format(*sides)

    @property
    def about(self) -> str:
        """Return size and crop in words."""
        height, width = self.crop.size_hw
        kept = f"{self.crop.share:.0%} kept" if self.crop.share < 0.995 else "all of it"
        grown = f", enlarged {self.crop.upscaling:.1f}×" if self.crop.upscaling > 1.01 else ""
        return f"{self.width} × {self.height} → {width} × {height}, {kept}{grown}"


def safe_name(name: str, fallback: str, limit: int = 60) -> str:
    """Return letters, digits, `-` and `_` of a name, at most `limit`; `fallback` where nothing is left."""
    words = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:limit].strip("-")
    return f"{fallback}-{words}" if DEVICES.fullmatch(words) else words or fallback


class Draft:
    """The draft of a folder of runs; every change is written at once."""

    def __init__(self, root: Path):
        self.root, self.folder = root, root / HOME / "new"
        self.photos_folder = self.folder / "photos"

    # ---- photos and captions ----

    def names(self) -> list[str]:
        """Return the file names of its photos, in order."""
        files = self.photos_folder.iterdir() if self.photos_folder.is_dir() else []
        return sorted(path.name for path in files if path.suffix in FORMATS.values() and path.is_file())

    def add(self, name: str, content: bytes) -> str:
        """Check an upload and write it; return its new name. ValueError of one line where it cannot be used."""
        shown = printable(Path(name.replace("\\", "/")).name or "photo", limit=60)
        if len(content) > LARGEST_PHOTO:
            raise ValueError(f"{shown}: {len(content) / 2**20:.0f} MiB; a photo may have {LARGEST_PHOTO // 2**20}")
        if len(self.names()) >= MOST_PHOTOS:
            raise ValueError(f"{shown}: there are {MOST_PHOTOS} photos already; 3 to 10 are enough")
        suffix = suffix_of(content, shown)
        inspect_image(content, shown if suffix != ".heic" else f"{shown}.heic")
        stem = safe_name(Path(shown).stem, "photo")
        taken = {Path(other).stem.lower() for other in self.names()}
        free = next(one for one in (stem, *(f"{stem}-{n}" for n in range(2, 999))) if one.lower() not in taken)
        with atomic(self.photos_folder / f"{free}{suffix}") as temporary:
            temporary.write_bytes(content)
        return f"{free}{suffix}"

    def path_of(self, name: str) -> Path:
        """Return the file of a photo; LookupError where the draft has none of that very name."""
        if name not in self.names():
            raise LookupError(f"{printable(name)}: no such photo")
        return self.photos_folder / name

    def remove(self, name: str) -> None:
        """Remove a photo and its caption."""
        path = self.path_of(name)
        path.unlink()
        path.with_suffix(".txt").unlink(missing_ok=True)

    def write_caption(self, name: str, text: str) -> None:
        """Write the caption of a photo; an empty one is removed."""
        path, words = self.path_of(name).with_suffix(".txt"), " ".join(text.split())
        if len(words) > LONGEST_CAPTION:
            raise ValueError(f"the caption of {name} has {len(words)} letters; {LONGEST_CAPTION} are the most")
        if not words:
            path.unlink(missing_ok=True)
            return
        with atomic(path) as temporary:
            temporary.write_text(words + "\n", encoding="utf-8")

    def take_example(self, subject: str = "poodle") -> None:
        """Begin anew with the photos of an embedded subject."""
        found = toybox_subjects()[subject]
        shutil.rmtree(self.folder, ignore_errors=True)
        config = make_config({"subject": {"images": f"toybox:{subject}", "class": found["class"]}, "output": "x"})
        for picture in collect(config).pictures:
            assert picture.path is not None
            self.add(f"{subject}-{picture.name}", picture.path.read_bytes())
        self.write_fields({"class": found["class"], "name": subject, "model": "toybox"})

    # ---- fields ----

    def fields(self) -> dict[str, str]:
        """Return what was typed in, by the names of the form."""
        try:
            found = json.loads(read_text(self.folder / "fields.json"))
        except (OSError, ValueError):
            found = {}
        return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}

    def write_fields(self, fields: Mapping[str, str]) -> None:
        """Keep what was typed in."""
        with atomic(self.folder / "fields.json") as temporary:
            temporary.write_text(json.dumps(dict(fields), ensure_ascii=False))

    def tree(self) -> dict[str, Any]:
        """Return the config that the fields make, as YAML gives it; ValueError where a field cannot be read."""
        fields = self.fields()
        folder = self.root / (safe_name(fields.get("name", ""), "") or self.free_name(fields.get("class", "")))
        model = fields.get("other_model", "").strip() or fields.get("model") or "toybox"
        tree: dict[str, Any] = {
            "model": model,
            "subject": {"images": str(folder / "photos"), "class": fields.get("class", "").strip() or "thing"},
        }
        if token := fields.get("token", "").strip():
            tree["subject"]["token"] = token
        for source in (STARTS.get(model, {}), overrides_of(fields)):
            for section, values in source.items():
                tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
        return {**tree, "output": str(folder)}

    def config(self) -> RunConfig:
        """Return the config on the draft's own photos; ValueError of one line where a field is wrong."""
        tree = self.tree()
        return make_config({**tree, "subject": {**tree["subject"], "images": str(self.photos_folder)}})

    def yaml(self) -> str:
        """Return the YAML that the fields make: only what differs from the defaults."""
        return yaml.safe_dump(self.tree(), sort_keys=False, allow_unicode=True, width=100)

    def free_name(self, wanted: str) -> str:
        """Return a name for the run that no folder has yet: dog, dog-2 …"""
        stem = safe_name(wanted.lower(), "subject", 40)
        return next(one for one in (stem, *(f"{stem}-{n}" for n in range(2, 9999))) if not (self.root / one).exists())

    def photos(self, config: RunConfig) -> list[Photo]:
        """Return the photos with the crops that `config` plans."""
        pictures = collect(config).pictures if self.names() else []
        crops = plan_crops(pictures, config.data, config.train.seed)
        found = []
        for picture, (crop, *_) in zip(pictures, crops, strict=True):
            text = self.photos_folder / Path(picture.name).with_suffix(".txt")
            caption = read_text(text).strip() if text.is_file() else ""
            found.append(Photo(picture.name, caption, picture.width, picture.height, crop))
        return found

    def begin(self) -> str:
        """Turn the draft into a run folder, in one rename; return its name. ValueError where something is missing."""
        if not self.names():
            raise ValueError("photos: there are none yet; drop three to ten photos of the subject")
        if not self.fields().get("class", "").strip():
            raise ValueError("class: say what the subject is, in one or two words, such as dog")
        self.config()
        tree = self.tree()
        folder = Path(tree["output"])
        if folder.exists():
            raise ValueError(f"name: there is a run called {folder.name!r} already; choose another name")
        make_config(tree)
        with atomic(self.folder / ASKED) as temporary:
            temporary.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
        self.folder.rename(folder)
        return folder.name


def suffix_of(content: bytes, shown: str) -> str:
    """Return the suffix of an image's real format; ValueError for what is no photo."""
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"mif1", b"hevc", b"msf1"):
        return ".heic"
    try:
        with Image.open(
            io.BytesIO(content), formats=[name for name in FORMATS if name not in ("HEIF", "MPO")]
        ) as image:
            return FORMATS[str(image.format)]
    except Image.DecompressionBombError:
        raise ValueError(f"{shown}: has too many pixels for a photo; scale it down") from None
    except Exception:  # decoders raise what they like
        raise ValueError(f"{shown}: is not a photo; JPEG, PNG, WebP, AVIF, HEIC, TIFF, BMP and GIF are read") from None


def thumbnail(image: Image.Image, side: int = 480) -> tuple[bytes, str]:
    """Return (bytes, media type) of an RGB image, made anew: small ones as PNG, others as JPEG of at most `side`."""
    buffer, small = io.BytesIO(), max(image.size) <= 128
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 86}))
    return buffer.getvalue(), "image/png" if small else "image/jpeg"


def crop_image(crop: Crop) -> Image.Image:
    """Return a crop as it will be trained."""
    return Image.fromarray(crop_pixels(crop))
