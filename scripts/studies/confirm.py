"""Subjects that nobody tuned on: a folder of photos for each, named subject-class, as a suite of their own."""

from __future__ import annotations

import re
from pathlib import Path

from diffusekrona_train.data import is_image, printable
from diffusekrona_train.evaluation.inputs import Suite, SuiteRow, load_suite
from scripts.studies.study import Base

NAME = "confirm"
FEWEST, MOST = 3, 10
"""Photos of a subject."""
SHAPE = "name it subject-class, such as rex-toy_dinosaur (the class follows the last hyphen, _ is a space)"


def suite_of(folder: Path | None, base: Base) -> Suite:
    """Return the subjects of a folder as a suite; ValueError of one line where a folder is no subject.

    Hidden entries and files beside the folders are left out.
    """
    if folder is None:
        raise ValueError(f"{NAME} needs --photos FOLDER, with a folder of {FEWEST} to {MOST} photos for each subject")
    if not folder.is_dir():
        raise ValueError(f"--photos {printable(str(folder))}: is not a folder")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"--photos {printable(str(folder))}: holds no folder of photos; {SHAPE}")
    rows = [_row(path) for path in found]
    return Suite(name=NAME, prompts={"all": base.prompts}, rows=rows)


def _row(folder: Path) -> SuiteRow:
    name, shown = folder.name, f"--photos: {printable(folder.name)}"
    subject, hyphen, noun = name.rpartition("-")
    noun = noun.replace("_", " ").strip()
    if not hyphen or not subject or not noun or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{shown}: does not say what the subject is; {SHAPE}")
    count = sum(is_image(path) for path in folder.iterdir())
    if not FEWEST <= count <= MOST:
        raise ValueError(f"{shown}: holds {count} photos; give {FEWEST} to {MOST}")
    return SuiteRow.model_validate({"name": name, "class": noun})


def look_alikes() -> list[str]:
    """Return where the photos of toybox's sprites are; they join the folder's other subjects in the gallery."""
    return [row.images for row in load_suite("toybox").rows if row.images]
