"""Read what is measured: generated images with prompts and seeds, the subject's photos, suites of subjects."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, ValidationError, model_validator

from diffusekrona_train.common.files import ASSETS, read_text
from diffusekrona_train.config import make_config, one_line, read_yaml
from diffusekrona_train.config.base import Strict
from diffusekrona_train.data import collect, is_image, open_image, printable
from diffusekrona_train.data.names import find_below, plain

SUITES = ASSETS / "suites"


@dataclass(frozen=True)
class Generated:
    """A generated image on disk, its prompt (identifier filled in), and its seed."""

    file: Path
    prompt: str
    seed: int

    def open(self) -> Image.Image:
        return open_image(self.file, self.file.name)


def photos_of(images: str) -> list[Image.Image]:
    """Load the subject's photos, upright: a folder, an image file, a data set, or toybox:NAME."""
    config = make_config({"subject": {"images": images, "class": "subject"}, "output": "evaluation"})
    return [picture.open() for picture in collect(config).pictures]


def without_words(prompt: str, words: Sequence[str]) -> str:
    """Remove the identifiers from `prompt`: 'a sks dog' -> 'a dog'; [V], [V1], [V2] … too."""
    for word in (*words, *re.findall(r"\[V[0-9]*\]", prompt)):
        prompt = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", " ", prompt)
    return " ".join(prompt.split())


def read_generated(folder: Path, prompts: Sequence[str] = ()) -> list[Generated]:
    """Read the images in `folder` with prompt and seed, in order of name.

    The prompt of an image: its line in manifest.jsonl, its own metadata, a .txt beside it, or the one of `prompts`
    whose number its name begins with (00, 01, …); one prompt alone serves all. ValueError where none says it.
    """
    if not folder.is_dir():
        raise ValueError(f"{printable(str(folder))} is not a folder of images")
    manifest = _manifest(folder / "manifest.jsonl")
    files = sorted(path for path in folder.iterdir() if is_image(path) and not path.name.startswith("sheet-"))
    if not files:
        raise ValueError(f"{printable(str(folder))} contains no image")
    return [_generated(path, i, manifest.get(plain(path.name)), prompts) for i, path in enumerate(files)]


def _generated(path: Path, index: int, row: dict[str, Any] | None, prompts: Sequence[str]) -> Generated:
    row = row or _own_record(path) or {}
    sidecar = find_below(path.parent, f"{path.stem}.txt")
    number = re.match(r"\d+", path.stem)
    prompt = row.get("prompt")
    if prompt is None and sidecar is not None and sidecar.is_file():
        prompt = read_text(sidecar).strip()
    if prompt is None and len(prompts) == 1:
        prompt = prompts[0]
    if prompt is None and number and int(number[0]) < len(prompts):
        prompt = prompts[int(number[0])]
    if not isinstance(prompt, str):
        raise ValueError(
            f"{printable(path.name)}: its prompt is not known; give a manifest.jsonl, a .txt beside it, or prompts and "
            "names that begin with the prompt's number (00, 01, …)"
        )
    seed = re.search(r"(\d+)$", path.stem)
    return Generated(path, prompt, int(row.get("seed", seed[1] if seed else index)))


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for line in read_text(path).splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            rows[plain(row["file"])] = row
        except (ValueError, KeyError, TypeError):
            continue  # a line cut by a killed process
    return rows


def _own_record(path: Path) -> dict[str, Any] | None:
    """Read what krona-sample wrote into a PNG."""
    try:
        with Image.open(path) as image:
            found = json.loads(getattr(image, "text", {}).get("krona", "null"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class SuiteRow(Strict):
    PATHS = ("images",)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the subject: of its run, and of its folder of photos."""
    group: str = "all"
    """Scores are also given by group."""
    class_noun: str = Field(alias="class", min_length=1)
    """What the subject is."""
    token: str = "sks"
    """The identifier that it is trained with."""
    images: str | None = None
    """Its photos: a path within the photos' folder, or toybox:NAME (none: a folder of its name)."""
    prompts: str | list[str] = "all"
    """Prompts with [V] and {class}, or the name of one of the suite's lists."""


class Suite(Strict):
    name: str
    """Name of the suite."""
    source: str = ""
    """Where subjects and prompts come from, and their licence."""
    prompts: dict[str, list[str]] = {}
    """Lists of prompts that rows refer to by name."""
    rows: Annotated[list[SuiteRow], Field(min_length=1)]
    """The subjects."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Suite:
        names = [row.name for row in self.rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"rows: duplicate name {twice[0]}")
        for row in self.rows:
            if isinstance(row.prompts, str) and row.prompts not in self.prompts:
                raise ValueError(
                    f"rows: {row.name} asks for prompts {row.prompts!r}; there are {', '.join(self.prompts)}"
                )
        return self

    def prompts_of(self, row: SuiteRow) -> list[str]:
        """Return the row's prompts, [V] and {class} filled in."""
        texts = self.prompts[row.prompts] if isinstance(row.prompts, str) else row.prompts
        return [text.replace("[V]", row.token).replace("{class}", row.class_noun) for text in texts]

    def images_of(self, row: SuiteRow, photos: Path | None) -> str:
        """Return where the row's photos are; ValueError if the suite has none and no folder of photos is given."""
        where = row.images or row.name
        if where.startswith("toybox:"):
            return where
        if photos is None:
            raise ValueError(f"suite {self.name} has no photos: give the folder that holds {where}/ with --photos")
        return str(photos / where)


def load_suite(name: str) -> Suite:
    """Load a bundled suite by its name (dreambench, toybox) or a YAML file; ValueError of one line."""
    bundled = sorted(path.stem for path in SUITES.glob("*.yaml"))
    path = SUITES / f"{name}.yaml" if name in bundled else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"suite {printable(name)} is neither a file nor bundled; bundled are {', '.join(bundled)}")
    try:
        return Suite.model_validate(read_yaml(path, "a suite needs at least name and rows (name, class)"))
    except ValidationError as error:
        raise ValueError(f"suite {printable(name)}: {one_line(error, Suite)}") from None
