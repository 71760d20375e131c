"""Jobs: one JSON object a subject, over what is common to all; what a job may set, and its hash.

    {"id": "dog-17", "images": "photos/dog", "class": "dog", "steps": 400, "prior": {"kind": "teacher"}}

`id` is the name of the job's folder. A job may set every field of a config but those that change the base, the
resolution or the adapter, which are common to all jobs that are trained together.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusekrona_train.common.nearest import did_you_mean
from diffusekrona_train.config import RunConfig, make_config

Tree = dict[str, Any]

SHORT = {
    "images": "subject.images",
    "class": "subject.class",
    "token": "subject.token",
    "prompt": "subject.prompt",
    "captions": "subject.captions",
    "steps": "train.steps",
    "learning_rate": "train.learning_rate",
    "seed": "train.seed",
}
"""What a job may write for a field of its config."""
COMMON = (
    "model",
    "revision",
    "variant",
    "vae",
    "text_encoders",
    "model_config_dir",
    "prediction_type",
    "adapter",
    "data.resolution",
    "data.cache_dir",
    "data.vae_precision",
    "train.quantize",
    "train.memory",
    "train.mixed_precision",
    "train.compile",
    "train.cuda_graph",
    "train.tf32",
    "train.channels_last",
)
"""Fields that are the same for all jobs of a call, by --model, --set and --config."""
OWN = ("output",)
"""What the call sets itself."""
WITHOUT_INFLUENCE = (
    "output",
    "subject.images",  # the contents of the photos are hashed instead
    "subject.files",
    "prior.images",
    "data.cache_dir",
    "validation",
    "train.memory",
    "train.compile",
    "train.cuda_graph",
    "train.channels_last",
    "train.checkpoint_every",
    "train.keep_resume_states",
    "train.log_every",
    "train.trackers",
)
"""Fields of which the adapter does not depend, or only in its last digits."""
RESERVED = {"cache", "con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
"""Names that are the call's own, or that Windows keeps for devices."""
LONGEST_ID = 100


class JobError(ValueError):
    """A job that cannot be trained: `id` is its name, or its line where it has none."""

    def __init__(self, id: str, reason: str):
        super().__init__(reason)
        self.id = id


@dataclass(frozen=True)
class Job:
    """A checked job, whose photos have not been looked at yet."""

    id: str
    tree: Tree
    """Its config as YAML would give it, without `output`."""

    def config(self, output: str) -> RunConfig:
        """Return the config of its run; ValueError of one line where a field is wrong."""
        return make_config({**self.tree, "output": output})


def common_tree(model: str | None, base: Tree | None, overrides: Sequence[str]) -> Tree:
    """Return what is common to all jobs; ValueError of one line for what could not be trained with any job."""
    tree = copy.deepcopy({**(base or {}), **({"model": model} if model else {})})
    for name in OWN:
        tree.pop(name, None)
    for override in overrides:
        path, equals, value = override.partition("=")
        put(tree, path.strip(), _value(override, equals, value))
    for name, value in QUIET.items():
        tree.setdefault("validation", {}).setdefault(name, value)
    tree.setdefault("train", {}).setdefault("cuda_graph", False)
    config = make_config(placeholder(tree))
    for name, wrong in REFUSED.items():
        if wrong(config):
            raise ValueError(f"{name}: is for one run at a time; take it out")
    return tree


def placeholder(tree: Tree) -> Tree:
    """Return a whole config of what is common to all jobs, with a subject that stands for theirs."""
    subject = {"images": "photos", "class": "dog", **tree.get("subject", {})}
    return {**tree, "subject": subject, "output": "many"}


QUIET = {"every": 0, "loss": False, "report": False}
"""Validation that is off unless it is asked for: images of one job keep all others waiting."""

REFUSED = {
    "train.keep_best": lambda config: config.train.keep_best,
    "train.cuda_graph": lambda config: config.train.cuda_graph is True,
}
"""What a run alone can have -> whether a config has it."""


def _value(override: str, equals: str, text: str) -> Any:
    from diffusekrona_train.config import parse_yaml

    if not equals:
        raise ValueError(f"--set {override!r} should read key=value, as train.steps=300 does")
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {override!r}: {error}") from None


def put(tree: Tree, path: str, value: object) -> None:
    """Set a dotted field in a tree; ValueError where a part of the path is a value."""
    *sections, last = path.split(".")
    for section in sections:
        below = tree.get(section)
        if below is not None and not isinstance(below, dict):
            raise ValueError(f"{path}: {section} holds a value and not a section")
        tree = tree.setdefault(section, {})
    tree[last] = value


def read_line(text: str, number: int) -> Tree:
    """Return the object of one line of a jobs file; JobError where it is none."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise JobError(f"line {number}", f"line {number} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise JobError(f"line {number}", f'line {number} should be an object such as {{"id": "dog", "images": …}}')
    return found


def lines_of(path: Path) -> Iterator[Tree | JobError]:
    """Return the rows of a JSONL file; what is wrong with a line stands for it. ValueError where there is no file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a file with one JSON object a line, or - for a stream")
    return rows_of(path.read_text(encoding="utf-8-sig", errors="replace").splitlines())


def rows_of(lines: Iterable[str]) -> Iterator[Tree | JobError]:
    """Return the object of each line that is not empty and no comment."""
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield row_of(line, number)


def row_of(line: str, number: int) -> Tree | JobError:
    """Return the object of a line, or what is wrong with it."""
    try:
        return read_line(line, number)
    except JobError as error:
        return error


def make_job(row: Mapping[str, Any], common: Tree, number: int = 0) -> Job:
    """Check a job's own fields over the common ones; JobError with the field and what would be right."""
    row = dict(row)
    name = check_id(row.pop("id", None), number)
    tree: Tree = copy.deepcopy(common)
    try:
        for key, value in row.items():
            _set(tree, key, value)
        job = Job(name, tree)
        job.config(name)
    except ValueError as error:
        raise JobError(name, str(error)) from None
    return job


def _set(tree: Tree, key: str, value: object) -> None:
    """Set what a job says: a short name, a dotted field or a section."""
    path = SHORT.get(key, key)
    for dotted, one in _fields(path, value):
        shared = next((field for field in COMMON if dotted == field or dotted.startswith(field + ".")), None)
        if shared or dotted in OWN:
            raise ValueError(f"{dotted}: is common to all jobs of a call; set it with --set or --config")
        if "." not in dotted and dotted not in SHORT.values():
            known = [*SHORT, "id", "subject", "data", "prior", "train", "validation"]
            hint = did_you_mean(dotted, known) or f"known are {', '.join(known)}"
            raise ValueError(f"{dotted!r} is not a field of a job; {hint}")
        put(tree, dotted, one)


def _fields(path: str, value: object) -> Iterable[tuple[str, object]]:
    """Take a section apart into its dotted fields, one level down: deeper ones are values."""
    if isinstance(value, dict) and "." not in path:
        return [(f"{path}.{key}", one) for key, one in value.items()]
    return [(path, value)]


def check_id(name: object, number: int) -> str:
    """Return a job's id; JobError unless it is a file name that every system takes."""
    where = f"line {number}"
    if name is None:
        raise JobError(where, "id is missing: give each job a name of its own, such as dog-17")
    if not isinstance(name, str):
        raise JobError(where, f"id: {name!r} should be a text")
    good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and not name.endswith(".")
    if not good or len(name) > LONGEST_ID or name.split(".")[0].lower() in RESERVED:
        shown = name if len(name) <= 60 else name[:59] + "…"
        raise JobError(
            shown_id({"id": name}, number),
            f"id: {shown!r} should be a file name of at most {LONGEST_ID} letters, digits, dots, - and _, which begins "
            "with none of . and - and is not a name such as con or cache",
        )
    return name


def shown_id(row: Mapping[str, Any], number: int) -> str:
    """Return what a job is called in messages, whether its id is good or not."""
    name = row.get("id")
    return name if isinstance(name, str) and len(name) <= LONGEST_ID else f"line {number}"


def job_hash(config: RunConfig, model: str, photos: Iterable[Sequence[object]]) -> str:
    """Return the SHA-256 of what the adapter depends on: settings, the model's identity, photos with captions.

    Neither the device, nor how many jobs are trained together, nor any folder changes it.
    """
    settings = {
        name: value
        for name, value in _leaves(config.model_dump(mode="json", by_alias=True))
        if not any(name == field or name.startswith(field + ".") for field in (*WITHOUT_INFLUENCE, "model"))
    }
    told = {"model": model, "settings": settings, "photos": [list(row) for row in photos]}
    return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _leaves(tree: Tree, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
