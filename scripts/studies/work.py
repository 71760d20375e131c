"""What a table shows (Cell), what has to be done for it (Task), and doing it in one process: train, generate, measure.

A Task is a plain value that any process can take. What a process has loaded stays for its next tasks: libraries,
encoders, photos and, on a CPU, the sampling pipeline. Records are written as they come.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusekrona_train.common.run_folder import adapter_file, claimed, read_metrics, step_of
from diffusekrona_train.config.run import EMBEDDED
from diffusekrona_train.evaluation.inputs import Generated, photos_of
from diffusekrona_train.evaluation.metrics import METRICS, cosines
from scripts.studies import records
from scripts.studies.study import Series, Value


@dataclass(frozen=True)
class Cell:
    """One number of one study: a value in a series for a subject and a seed, and the key of its record."""

    series: Series
    value: Value
    subject: str
    seed: int
    key: str
    images: str = ""
    """All photos of the subject."""
    group: str = ""
    """The subject's group in its suite."""
    strength: float = 1.0
    """At which it is sampled, where the study tries several."""


@dataclass
class Task:
    """One training run and all that is measured of it."""

    run: str
    """Name of the run folder; `base` for the model without an adapter."""
    config: dict[str, Any]
    of: dict[str, Any]
    subject: str
    group: str
    images: str
    """All photos of the subject, which the scores compare with."""
    seed: int
    """Of training; what a task without training draws has seeds of its own."""
    needs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Record key -> {step, seed, sampling, of: what the key is a hash of}."""
    studies: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    """Prompts of all tasks, identifiers filled in and taken out: encoded once in a process."""
    batch_size: int = 1
    threads: int | None = None

    @property
    def steps(self) -> list[int]:
        """The steps at which something is measured; empty where nothing is trained."""
        return sorted({need["step"] for need in self.needs.values()} - {0})


def texts_of(tasks: Sequence[Task]) -> list[str]:
    """Every text that the tasks draw, each once."""
    return list(dict.fromkeys(text for task in tasks for need in task.needs.values() for text in filled(task, need)))


def filled(task: Task, need: dict[str, Any]) -> list[str]:
    """The prompts of a need as they are drawn: with the identifier, or without it where nothing was trained."""
    subject = task.config["subject"]
    token = subject["token"] if need["step"] else ""
    texts = [text.replace("[V]", token).replace("{class}", subject["class"]) for text in need["sampling"]["prompts"]]
    return [" ".join(text.split()) for text in texts]


SETTINGS = ("steps", "guidance", "negative", "scheduler", "noise", "strength_schedule")
"""What a record's sampling says of SampleSettings, by the same names."""
STRIP_SIDE = 256
"""Pictures of a strip are at most this wide, in pixels."""


def perform(task: Task, runs: Path) -> list[tuple[records.Record, bytes]]:
    """Trains what is missing and measures every need; the records are written as they come.

    Returns (record, strip) of each. Whatever training prints goes to the run's log.txt.
    """
    if task.threads:
        import torch

        torch.set_num_threads(task.threads)
    done = {key: found for key in task.needs if (found := records.read(runs, key)) is not None}
    todo = {key: need for key, need in task.needs.items() if key not in done}
    folder = runs / "trained" / task.run
    trains = any(need["step"] for need in todo.values())
    set_up, diverged = ensure_trained(task, folder) if trains else (0.0, False)
    for key, need in todo.items():
        if diverged and need["step"] and not adapter_of(folder, need["step"]).is_file():
            record, strip = _diverged(task, key, need), None
        else:
            record, strip = _measured(task, key, need, folder)
        record["seconds"]["set_up"], set_up = round(set_up, 3), 0.0
        records.keep(runs, record, strip)
        done[key] = record
    strips = {key: records.strip_of(runs, key) for key in done}
    return [(record, strips[key].read_bytes() if strips[key].is_file() else b"") for key, record in done.items()]


# ---- training ------------------------------------------------------------------------------------------------------


def ensure_trained(task: Task, folder: Path) -> tuple[float, bool]:
    """Adapters of all the task's steps in `folder`: the seconds spent on everything but the loop, and did it diverge.

    A run that diverges leaves the adapters of the steps before.
    """
    from diffusekrona_train.config import make_config
    from diffusekrona_train.training import checkpoint

    wanted = task.steps
    if all(adapter_of(folder, step).is_file() for step in wanted):
        return 0.0, False
    config = make_config(
        {**task.config, "output": str(folder)},
        [f"train.steps={wanted[-1]}", f"train.checkpoint_every={math.gcd(*wanted)}", "train.keep_resume_states=1"],
    )
    reached = next((step_of(path) for path in checkpoint.states(folder)), 0)
    goes_on = reached and all(adapter_of(folder, step).is_file() for step in wanted if step <= reached)
    folder.mkdir(parents=True, exist_ok=True)
    if not stays(task.config["model"]):
        forget_studio()
    began = time.monotonic()
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        diverged = _train(config, bool(goes_on))
    with contextlib.suppress(ValueError), claimed(folder):  # another call that trains on in it keeps it
        shutil.rmtree(folder / "resume", ignore_errors=True)  # three times the adapters, and needed no more
    return max(0.0, time.monotonic() - began - seconds_at(folder, wanted[-1])), diverged


def _train(config: Any, resume: bool) -> bool:
    """To the end, or True where it diverges. Begins anew where the state cannot go on, as after photos have moved."""
    from diffusekrona_train.training import Diverged, Progress, train

    progress = Progress(lambda event, fields: print(fields["text"]) if "text" in fields else None)
    try:
        try:
            train(config, progress=progress, resume=resume, overwrite=not resume)
        except ValueError as error:
            if not resume:
                raise
            print(f"started over: {error}")
            train(config, progress=progress, overwrite=True)
    except Diverged as error:
        print(error)
        return True
    return False


def adapter_of(folder: Path, step: int) -> Path:
    return adapter_file(folder, step)


def seconds_at(folder: Path, step: int) -> float:
    """Seconds that the loop had taken at a step, as metrics.jsonl says."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] == step and "time" in line]
    return float(lines[-1]["time"]) if lines else 0.0


# ---- drawing and measuring -----------------------------------------------------------------------------------------


def _measured(task: Task, key: str, need: dict[str, Any], folder: Path) -> tuple[records.Record, bytes]:
    from diffusekrona_train.common.device import pick_device, pick_dtype
    from diffusekrona_train.evaluation.measure import Judges, measure
    from diffusekrona_train.sampling.session import subjects_of

    step, token = need["step"], task.config["subject"]["token"]
    wearing = subjects_of([(adapter_of(folder, step), 1.0)]) if step else []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="krona-paper-") as room:
        drawn, strip = _draw(task, need, wearing, Path(room))
        between = time.monotonic()
        judges = open_judges(Judges, task.config["model"] in EMBEDDED)
        measured = measure(judges, open_photos(task.images), drawn, identifiers=(token,))
        ranked = rank_in_gallery(judges.dino, task.images, need["gallery"], drawn) if need["gallery"] else {}
    scores = {
        name: round(float(METRICS[name].reduce(np.asarray(values))), 6) for name, values in measured.values.items()
    } | ranked
    dtype = pick_dtype("auto", pick_device())
    groups = [tensors for subject in wearing for tensors in subject.file.groups.values()]
    record = {
        **_named(task, key, need),
        "scores": scores,
        "parameters": sum(tensor.numel() for own in groups for name, tensor in own.items() if name != "alpha"),
        "seconds": {
            "train": round(seconds_at(folder, step), 3) if step else 0.0,
            "sample": round(between - began, 3),
            "measure": round(time.monotonic() - between, 3),
        },
        "drawn_in": str(dtype).removeprefix("torch."),
        "measured_with": {"CLIP": judges.clip.identity, "DINO": judges.dino.identity},
    }
    return record, strip


def _named(task: Task, key: str, need: dict[str, Any]) -> records.Record:
    """What every record begins with."""
    whose = {"run": task.run, "subject": task.subject, "group": task.group, "seed": need["seed"]}
    return {"key": key, "of": need["of"], **whose}


def _diverged(task: Task, key: str, need: dict[str, Any]) -> records.Record:
    """The record of a run that came to no adapter of this step."""
    return {
        **_named(task, key, need),
        "diverged": True,
        "scores": {},
        "parameters": 0,
        "seconds": {"train": 0.0, "sample": 0.0, "measure": 0.0},
    }


def _draw(task: Task, need: dict[str, Any], wearing: list, room: Path) -> tuple[list, bytes]:
    """The pictures of a need as evaluate's Generated, in a temporary folder, and the strip of its first seed."""
    from diffusekrona_train.evaluation.inputs import Generated
    from diffusekrona_train.sampling.plan import plan_pictures
    from diffusekrona_train.sampling.render import SampleSettings

    asked, prompts = need["sampling"], filled(task, need)
    settings = SampleSettings(
        height=asked["side"],
        width=asked["side"],
        **{name: asked[name] for name in SETTINGS},
    )
    studio = open_studio(task, prompts)
    while studio.injections:
        studio.injections.pop().eject()
    _wear(studio, wearing)
    scale = asked["strength"] if wearing else None
    planned = plan_pictures(prompts, asked["seeds"], settings, scale=scale)
    paint = studio.painter([scale], varies=bool(asked["strength_schedule"]))
    studio.set_scale(scale, studio.memory.fuses)
    starts = range(0, len(planned), task.batch_size)
    pictures = [picture for i in starts for picture in paint(planned[i : i + task.batch_size])]
    drawn, first = [], []
    for item, picture in zip(planned, pictures, strict=True):
        picture.save(room / item.file)
        drawn.append(Generated(room / item.file, item.prompt, item.seed))
        if item.seed == asked["seeds"][0]:
            first.append(picture)
    return drawn, _strip(first)


def _wear(studio: Any, wearing: list) -> None:
    from diffusekrona_train.adapters.formats import inject_file

    studio.subjects = wearing
    studio.injections = [inject_file(studio.denoiser, subject.file) for subject in wearing]


def _strip(pictures: list[Image.Image]) -> bytes:
    side = min(STRIP_SIDE, max(pictures[0].size))
    sheet = Image.new("RGB", (side * len(pictures), side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (i * side, 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


# ---- what a process keeps ------------------------------------------------------------------------------------------

_studios: dict[tuple, Any] = {}


def stays(model: str) -> bool:
    """Whether the sampling pipeline may stay in memory while the next run trains: an embedded model's is small."""
    return model in EMBEDDED


def open_studio(task: Task, prompts: list[str]) -> Any:
    """The pipeline with every text that it may be asked for, from this process' last task where that fits."""
    from diffusekrona_train.common.device import pick_device
    from diffusekrona_train.models import open_model
    from diffusekrona_train.sampling.session import Memory, Studio

    names = ("model", "revision", "variant", "vae", "model_config_dir")
    where = {name: task.config[name] for name in names}
    texts = tuple(dict.fromkeys([*task.texts, *prompts, ""]))
    key = (tuple(where.values()), texts)
    if key not in _studios:
        forget_studio()
        _studios[key] = Studio(open_model(**where), [], texts, Memory(), pick_device())
        _studios[key].pipe.set_progress_bar_config(disable=True)
    return _studios[key]


def forget_studio() -> None:
    from diffusekrona_train.common.device import free

    _studios.clear()
    free()


@functools.cache
def open_judges(kind: Any, toybox: bool) -> Any:
    from diffusekrona_train.common.device import pick_device

    return kind.open(None, None, toybox=toybox, device=pick_device(), cache=None)


@functools.cache
def open_photos(images: str) -> list[Image.Image]:
    from diffusekrona_train.evaluation.inputs import photos_of

    return photos_of(images)


# ---- among look-alikes -----------------------------------------------------------------------------------------------


def needs_gallery(metrics: Sequence[str]) -> bool:
    return not {"gallery", "rank"}.isdisjoint(metrics)


def rank_in_gallery(encoder: Any, own: str, others: Sequence[str], generated: Sequence[Generated]) -> dict[str, float]:
    """Return `gallery` and `rank`, means over the generated images.

    own and others: where the photos of the subject and of each look-alike are. encoder.images gives unit rows.
    """
    images = encoder.images([image.open() for image in generated])
    nearest = [cosines(images, encoder.images(photos_of(each))).max(axis=1) for each in (own, *others)]
    ranks = ranks_of(np.stack(nearest))
    return {"gallery": round(float((ranks == 1).mean()), 6), "rank": round(float(ranks.mean()), 6)}


def ranks_of(nearest: np.ndarray) -> np.ndarray:
    """(1 + look-alikes, images) similarities, the subject's first -> (images,) its rank; a tie is not a win."""
    return 1 + (nearest[1:] >= nearest[0]).sum(axis=0)
