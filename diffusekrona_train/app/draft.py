"""The subject that is being prepared: photos, captions and fields in one folder, which becomes the run folder.

An upload is looked at in memory: its format by its first bytes, its size, and whether it decodes. Only then a file is
written, under a name made here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from diffusekrona_train.app.jobs import HOME
from diffusekrona_train.common.files import atomic, read_text
from diffusekrona_train.config import RunConfig, make_config
from diffusekrona_train.config.fields import overrides_of
from diffusekrona_train.data import Crop, collect, crop_pixels, plan_crops, printable, toybox_subjects
from diffusekrona_train.data.images import FORMATS, inspect_image, true_suffix
from diffusekrona_train.data.names import safe_name
from diffusekrona_train.report.page import Figure, picture
from diffusekrona_train.training.status import ASKED, json_lines

MOST_PHOTOS, LARGEST_PHOTO, LONGEST_CAPTION = 60, 64 * 2**20, 2000
STARTS: dict[str, dict[str, Any]] = {
    "toybox": {"train": {"steps": 300, "learning_rate": 2e-3, "checkpoint_every": 50}, "validation": {"every": 50}},
    "toybox-flow": {"train": {"steps": 300, "checkpoint_every": 50}, "validation": {"every": 50}},
}
"""What a new subject begins with beyond the config's defaults: the embedded models learn in fewer steps."""


@dataclass(frozen=True)
class Photo:
    """A photo of the draft with its caption ('' without one) and its crop as it will be trained."""

    name: str
    caption: str
    photo: Figure
    trained: Figure
    box: str
    """The crop as CSS: a rectangle in percent of the photo."""
    about: str


class Draft:
    """The draft in a folder of runs; every change is written at once."""

    def __init__(self, root: Path):
        self.root, self.folder = root, root / HOME / "new"
        self.photos_folder = self.folder / "photos"

    def names(self) -> list[str]:
        """Return the file names of its photos, in order."""
        files = self.photos_folder.iterdir() if self.photos_folder.is_dir() else []
        return sorted(path.name for path in files if path.suffix in (*FORMATS.values(), ".heic") and path.is_file())

    def add(self, name: str, content: bytes) -> None:
        """Check an upload and write it under a safe name. ValueError of one line where it cannot be used."""
        shown = printable(Path(name.replace("\\", "/")).name or "photo", limit=60)
        if len(content) > LARGEST_PHOTO:
            raise ValueError(f"{shown}: a photo may have {LARGEST_PHOTO // 2**20} MiB")
        if len(self.names()) >= MOST_PHOTOS:
            raise ValueError(f"{shown}: there are {MOST_PHOTOS} photos already; three to ten are enough")
        suffix = true_suffix(content, shown)
        inspect_image(content, shown if suffix != ".heic" else f"{shown}.heic")
        stem = safe_name(Path(shown).stem, "photo")
        taken = {Path(other).stem.lower() for other in self.names()}
        free = next(one for one in (stem, *(f"{stem}-{n}" for n in range(2, 999))) if one.lower() not in taken)
        with atomic(self.photos_folder / f"{free}{suffix}") as temporary:
            temporary.write_bytes(content)

    def path_of(self, name: str) -> Path:
        """Return the file of a photo; LookupError where the draft has none of that very name."""
        if name not in self.names():
            raise LookupError(f"{printable(name)}: no such photo")
        return self.photos_folder / name

    def remove(self, name: str) -> None:
        """Remove a photo and its caption."""
        self.path_of(name).unlink()
        (self.photos_folder / name).with_suffix(".txt").unlink(missing_ok=True)

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
        noun = toybox_subjects()[subject]["class"]
        shutil.rmtree(self.folder, ignore_errors=True)
        for one in collect(
            make_config({"subject": {"images": f"toybox:{subject}", "class": noun}, "output": "x"})
        ).pictures:
            assert one.path is not None
            self.add(f"{subject}-{one.name}", one.path.read_bytes())
        self.write_fields({"class": noun, "name": self.free_name(subject), "model": "toybox"})

    def fields(self) -> dict[str, str]:
        """Return what was typed in, by the names of the form."""
        found = next(json_lines(self.folder / "fields.json", whole=True), {})
        return {key: value for key, value in found.items() if isinstance(value, str)}

    def write_fields(self, fields: Mapping[str, str]) -> None:
        """Keep what was typed in."""
        with atomic(self.folder / "fields.json") as temporary:
            temporary.write_text(json.dumps(dict(fields), ensure_ascii=False))

    def tree(self) -> dict[str, Any]:
        """Return the config that the fields make, as YAML gives it; ValueError where a field cannot be read."""
        fields = self.fields()
        folder = self.root / (safe_name(fields.get("name", ""), "") or self.free_name(fields.get("class", "")))
        model = fields.get("other_model") or fields.get("model") or "toybox"
        subject = {"images": str(folder / "photos"), "class": fields.get("class") or "thing"}
        tree: dict[str, Any] = {"model": model, "subject": subject}
        token = {"subject": {"token": fields["token"]}} if fields.get("token") else {}
        for source in (token, STARTS.get(model, {}), overrides_of(fields)):
            for section, values in source.items():
                tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
        return {**tree, "output": str(folder)}

    def here(self) -> dict[str, Any]:
        """Return the same config with the photos where they lie now."""
        tree = self.tree()
        return {**tree, "subject": {**tree["subject"], "images": str(self.photos_folder)}}

    def yaml(self) -> str:
        """Return the YAML that the fields make: only what differs from the defaults."""
        return yaml.safe_dump(self.tree(), sort_keys=False, allow_unicode=True, width=100)

    def free_name(self, wanted: str) -> str:
        """Return a name for the run that no folder has yet: dog, dog-2 …"""
        stem = safe_name(wanted.lower(), "subject", 40)
        return next(one for one in (stem, *(f"{stem}-{n}" for n in range(2, 9999))) if not (self.root / one).exists())

    def photos(self, config: RunConfig) -> list[Photo]:
        """Return the photos with the crops that `config` plans."""
        found = collect(config).pictures if self.names() else []
        crops = plan_crops(found, config.data, config.train.seed)
        return [self._photo(crop) for crop, *_ in crops]

    def _photo(self, crop: Crop) -> Photo:
        one, text = crop.picture, self.photos_folder / Path(crop.picture.name).with_suffix(".txt")
        left, top, right, bottom = crop.box()
        sides = left / one.width, top / one.height, (right - left) / one.width, (bottom - top) / one.height
        height, width = crop.size_hw
        kept = f"{crop.share:.0%} kept" if crop.share < 0.995 else "all of it"
        about = f"{one.width} × {one.height}, trained at {width} × {height}: {kept}"
        about += f", enlarged {crop.upscaling:.1f} times" if crop.upscaling > 1.01 else ""
        return Photo(
            one.name,
            read_text(text).strip() if text.is_file() else "",
            picture(one.open(), one.name, side=360),
            picture(Image.fromarray(crop_pixels(crop)), one.name, side=120),
            "left:{:.2%};top:{:.2%};width:{:.2%};height:{:.2%}".format(*sides),
            about,
        )

    def begin(self) -> str:
        """Turn the draft into a run folder, in one rename; return its name. ValueError where something is missing."""
        if not self.names():
            raise ValueError("photos: there are none yet; drop three to ten photos of the subject")
        if not self.fields().get("class"):
            raise ValueError("class: say what the subject is, in one or two words, such as dog")
        make_config(self.here())
        folder = Path(self.tree()["output"])
        if folder.exists():
            raise ValueError(f"name: there is a run called {folder.name!r} already; choose another name")
        with atomic(self.folder / ASKED) as temporary:
            temporary.write_text(self.yaml(), encoding="utf-8")
        self.folder.rename(folder)
        return folder.name
