"""Where images and captions come from, and which part of them is learnt from.

    collection = collect(config)                               # every image opened once, everything skipped is listed
    crops = plan_crops(collection.pictures, config.data, seed)  # per picture its variants
    pixels = crop_pixels(crops[0][0])                           # (H, W, 3) uint8

A source of images is a function and a row in `collect`. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffusekrona_train.common.files import ASSETS
from diffusekrona_train.common.nearest import did_you_mean, nearest
from diffusekrona_train.config import RunConfig, SubjectConfig
from diffusekrona_train.data.datasets import HUB_NAME, is_dataset, read_dataset, read_hub
from diffusekrona_train.data.folders import is_image, read_file, read_files, read_folder
from diffusekrona_train.data.images import open_image
from diffusekrona_train.data.names import existing, printable
from diffusekrona_train.data.pictures import (
    Candidate,
    Collection,
    Crop,
    Found,
    Picture,
    Wanted,
    bucket_sizes,
    crop_pixels,
    open_all,
    plan_crops,
)

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

Source = Callable[[str, SubjectConfig], Found]
TOYBOX_SUBJECTS = ASSETS / "toybox" / "subjects"


def collect(config: RunConfig) -> Collection:
    """Return all images of the subject with their captions, each decoded once; ValueError where one is unusable."""
    subject = config.subject
    found = _find(subject)
    if subject.limit is not None:
        found.skipped += [
            (item.name, f"beyond subject.limit: {subject.limit}") for item in found.candidates[subject.limit :]
        ]
        found.candidates = found.candidates[: subject.limit]
    if not found.candidates:
        skipped = found.skipped
        first = f" ({len(skipped)} skipped, as {printable(skipped[0][0])}: {skipped[0][1]})" if skipped else ""
        raise ValueError(f"subject.images: {printable(str(subject.images))} holds no image{first}")
    if not subject.captions:
        bare = [replace(item, captions=(), caption_source="subject.prompt") for item in found.candidates]
        found.candidates = bare
    return open_all(found, lambda caption: subject.fill(caption or subject.prompt), is_prior=False)


def collect_prior(config: RunConfig, folder: Path) -> Collection:
    """Return the class images in `folder`, at most `prior.count`, captioned as photos are or by the class prompt."""
    if not folder.is_dir():
        return Collection([])
    found = read_folder(folder, Wanted(subject=config.subject.class_noun))
    count, prompt = config.prior.count, config.prior.prompt
    found.skipped += [(item.name, f"beyond prior.count: {count}") for item in found.candidates[count:]]
    found.candidates = [
        replace(item, caption_source=item.caption_source.replace("subject.prompt", "prior.prompt"))
        for item in found.candidates[:count]
    ]
    return open_all(found, lambda caption: config.subject.fill(caption or prompt), is_prior=True)


def _find(subject: SubjectConfig) -> Found:
    where = subject.images
    if where is None:
        _refuse_fields(subject, _read_folder, "the list subject.files")
        return read_files(subject.files or [], None, _wanted(subject))
    try:
        source = next((read for is_it, read in SOURCES if is_it(where)), None)
        if source is not None:
            if subject.files and source is not _read_folder:
                raise ValueError(f"subject.files: can only be picked from a folder, and {printable(where)} is none")
            _refuse_fields(subject, source, printable(where))
            return source(where, subject)
    except OSError as error:
        raise ValueError(f"subject.images: {printable(where)} cannot be read ({error.strerror})") from None
    if _path(where).exists():
        raise ValueError(f"subject.images: {printable(where)} is not a folder, an image or a data set")
    hint = _nearest(_path(where)) or "; give a folder, an image or a data set"
    raise ValueError(f"subject.images: {printable(where)} is not there{hint}")


def _refuse_fields(subject: SubjectConfig, source: Source, shown: str) -> None:
    """Raise ValueError where a field is set that this source of images would pass over."""
    is_table = source in (_read_dataset, _read_hub)
    for name in ("image_column", "caption_column", "split"):
        if getattr(subject, name) is not None and not is_table:
            raise ValueError(f"subject.{name} is for data sets, and {shown} is none; take it out")
    if subject.caption_key is not None and (source is not _read_folder or subject.files):
        instead = "; a data set takes subject.caption_column" if is_table else ""
        raise ValueError(f"subject.caption_key is for a folder's metadata.jsonl or metadata.csv{instead}")


def _wanted(subject: SubjectConfig) -> Wanted:
    return Wanted(subject.captions, subject.caption_key, subject.class_noun)


def _path(where: str) -> Path:
    return existing(Path(where).expanduser())


def _read_folder(where: str, subject: SubjectConfig) -> Found:
    folder, wanted = _path(where), _wanted(subject)
    return read_files(subject.files, folder, wanted) if subject.files else read_folder(folder, wanted)


def _read_image(where: str, subject: SubjectConfig) -> Found:
    return read_file(_path(where), _wanted(subject))


def _read_dataset(where: str, subject: SubjectConfig) -> Found:
    return read_dataset(_path(where), subject)


def _read_hub(where: str, subject: SubjectConfig) -> Found:
    return read_hub(where.removeprefix("hub:"), subject)


def _read_toybox(where: str, subject: SubjectConfig) -> Found:
    """Return the embedded pictures of one of the held-out subjects."""
    name = where.removeprefix("toybox:")
    subjects = toybox_subjects()
    if name not in subjects:
        known = did_you_mean(name, subjects, shown="toybox:{}") or f"there are {', '.join(subjects)}"
        raise ValueError(f"subject.images: {printable(where)} is not an embedded subject; {known}")
    folder = TOYBOX_SUBJECTS / name
    files = subjects[name].get("files") or sorted(path.name for path in folder.glob("*.png"))
    return Found([Candidate(Path(file).name, folder / Path(file).name) for file in files])


def toybox_subjects() -> dict[str, dict]:
    """Return name -> {"class": noun, "files": [...]} of the subjects in the package."""
    table = TOYBOX_SUBJECTS / "subjects.json"
    return json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {}


def _is_hub(where: str) -> bool:
    # a mistyped photos/dog must not go looking on the network: its first folder exists here
    return where.startswith("hub:") or bool(HUB_NAME.fullmatch(where) and not Path(where).parent.is_dir())


SOURCES: list[tuple[Callable[[str], bool], Source]] = [
    (lambda where: where.startswith("toybox:"), _read_toybox),
    (lambda where: is_image(_path(where)), _read_image),
    (lambda where: is_dataset(_path(where)), _read_dataset),
    (lambda where: _path(where).is_dir(), _read_folder),
    (_is_hub, _read_hub),
]
"""(is `subject.images` one?, read it), asked in this order."""


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"; the folder {printable(str(parent))} does not exist either"
    near = nearest(path.name, (entry.name for entry in parent.iterdir()))
    return f"; did you mean {printable(str(parent / near[0]))}?" if near else ""
