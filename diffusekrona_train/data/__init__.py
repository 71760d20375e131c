"""Where images and captions come from, and which part of them is learnt from.

    collection = collect(config)                               # every image opened once, everything skipped is listed
    crops = plan_crops(collection.pictures, config.data, seed)  # per picture its variants
    pixels = crop_pixels(crops[0][0])                           # (H, W, 3) uint8

A source of images is a function and a row in `collect`. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffusekrona_train.common.files import ASSETS
from diffusekrona_train.config import RunConfig, SubjectConfig
from diffusekrona_train.data.crops import Crop, bucket_sizes, crop_pixels, plan_crops
from diffusekrona_train.data.datasets import HUB_NAME, is_dataset, read_dataset, read_hub
from diffusekrona_train.data.folders import Found, from_file, is_image, read_files, read_folder
from diffusekrona_train.data.images import open_image, printable
from diffusekrona_train.data.pictures import Candidate, Collection, Picture, open_all

__all__ = [
    "Collection",
    "Crop",
    "Picture",
    "bucket_sizes",
    "collect",
    "collect_prior",
    "crop_pixels",
    "is_image",
    "open_image",
    "plan_crops",
    "printable",
    "toybox_subjects",
]

TOYBOX_SUBJECTS = ASSETS / "toybox" / "subjects"


def collect(config: RunConfig) -> Collection:
    """All images of the subject with their captions, each decoded once; ValueError where one is unusable."""
    subject = config.subject
    candidates, skipped = _find(subject)
    if subject.limit is not None:
        skipped += [(item.name, f"beyond subject.limit: {subject.limit}") for item in candidates[subject.limit :]]
        candidates = candidates[: subject.limit]
    if not candidates:
        first = f" ({len(skipped)} skipped, as {printable(skipped[0][0])}: {skipped[0][1]})" if skipped else ""
        raise ValueError(f"subject.images: {printable(str(subject.images))} holds no image{first}")
    if not subject.captions:
        candidates = [replace(item, caption=None, caption_source="subject.prompt") for item in candidates]
    return open_all(candidates, skipped, lambda caption: subject.fill(caption or subject.prompt), is_prior=False)


def collect_prior(config: RunConfig, folder: Path) -> Collection:
    """The class images in `folder`, at most `prior.count`, captioned by their .txt or the class prompt; maybe none."""
    if not folder.is_dir():
        return Collection([])
    candidates, skipped = read_folder(folder)
    count, prompt = config.prior.count, config.prior.prompt
    skipped += [(item.name, f"beyond prior.count: {count}") for item in candidates[count:]]
    candidates = [
        replace(item, caption_source=item.caption_source.replace("subject.prompt", "prior.prompt"))
        for item in candidates[:count]
    ]
    return open_all(candidates, skipped, lambda caption: config.subject.fill(caption or prompt), is_prior=True)


def _find(subject: SubjectConfig) -> Found:
    where = subject.images
    if where is None:
        return read_files(subject.files or [], None)
    try:
        source = next((read for is_it, read in SOURCES if is_it(where)), None)
        if source is not None:
            if subject.files and source is not _read_folder:
                raise ValueError(f"subject.files: can only be picked from a folder, and {printable(where)} is none")
            return source(where, subject)
    except OSError as error:
        raise ValueError(f"subject.images: {printable(where)} cannot be read ({error.strerror})") from None
    if Path(where).expanduser().exists():
        raise ValueError(f"subject.images: {printable(where)} is no folder, image or data set")
    raise ValueError(f"subject.images: {printable(where)} is not there{_nearest(Path(where).expanduser())}")


def _read_folder(where: str, subject: SubjectConfig) -> Found:
    folder = Path(where).expanduser()
    return read_files(subject.files, folder) if subject.files else read_folder(folder)


def _read_image(where: str, subject: SubjectConfig) -> Found:
    path = Path(where).expanduser()
    return [from_file(path, path.name)], []


def _read_dataset(where: str, subject: SubjectConfig) -> Found:
    return read_dataset(Path(where).expanduser(), subject.limit)


def _read_toybox(where: str, subject: SubjectConfig) -> Found:
    """The embedded pictures of one of the held-out subjects."""
    name = where.removeprefix("toybox:")
    subjects = toybox_subjects()
    if name not in subjects:
        near = difflib.get_close_matches(name, subjects, n=1)
        known = f"did you mean toybox:{near[0]}?" if near else f"there are {', '.join(subjects)}"
        raise ValueError(f"subject.images: {printable(where)} is no embedded subject; {known}")
    folder = TOYBOX_SUBJECTS / name
    files = subjects[name].get("files") or sorted(path.name for path in folder.glob("*.png"))
    return [Candidate(Path(file).name, folder / Path(file).name) for file in files], []


def toybox_subjects() -> dict[str, dict]:
    """Name -> {"class": noun, "files": [...]} of the subjects in the package."""
    table = TOYBOX_SUBJECTS / "subjects.json"
    return json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}


def _is_hub(where: str) -> bool:
    # a mistyped photos/dog must not go looking on the network: its first folder exists here
    return where.startswith("hub:") or bool(HUB_NAME.fullmatch(where) and not Path(where).parent.is_dir())


SOURCES: list[tuple[Callable[[str], bool], Callable[[str, SubjectConfig], Found]]] = [
    (lambda where: where.startswith("toybox:"), _read_toybox),
    (lambda where: is_image(Path(where).expanduser()), _read_image),
    (lambda where: is_dataset(Path(where).expanduser()), _read_dataset),
    (lambda where: Path(where).expanduser().is_dir(), _read_folder),
    (_is_hub, lambda where, subject: read_hub(where.removeprefix("hub:"), subject.limit)),
]
"""(is `subject.images` one?, read it), asked in this order."""


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"; there is no folder {printable(str(parent))} either"
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f"; did you mean {printable(str(parent / near[0]))}?" if near else ""
