"""From studies to cells and tasks, shared where equal; and the order of the tasks."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusekrona_train.config import RunConfig, make_config
from diffusekrona_train.config.run import EMBEDDED
from diffusekrona_train.data import collect
from diffusekrona_train.evaluation.inputs import Suite, SuiteRow, load_suite
from diffusekrona_train.evaluation.metrics.encoders import CLIP, DINO
from diffusekrona_train.models import open_model
from scripts.studies.records import key_of, model_mark, read, run_mark
from scripts.studies.study import Base, Sampling, Series, Study, Value
from scripts.studies.work import Cell, Task, needs_gallery

SETTLED = ("model", "subject.images", "subject.files", "subject.class", "subject.token")
"""Fields that --set may not change: records are named by what the base and its suite say of them."""


class Planner:
    """Expands studies for one model, its subjects and seeds."""

    def __init__(
        self,
        model: str,
        base: Base,
        runs: Path,
        *,
        seeds: int,
        subjects: Sequence[str] | None = None,
        photos: Path | None = None,
        sets: Sequence[str] = (),
        suite: Suite | None = None,
        look_alikes: Sequence[str] = (),
    ):
        self.base, self.runs, self.seeds, self.photos, self.sets = base, runs, seeds, photos, list(sets)
        self.suite, self.look_alikes = suite or load_suite(base.suite), list(look_alikes)
        known = [row.name for row in self.suite.rows]
        for name in subjects or base.subjects:
            if name not in known:
                raise ValueError(f"--subjects {name}: suite {self.suite.name} has {', '.join(known)}")
        for text in self.sets:
            if (field := text.split("=")[0].strip()) in SETTLED:
                raise ValueError(f"--set {field}: the base and its suite say that; give your own with --base FILE.yaml")
        self.asked = list(dict.fromkeys(subjects or []))
        self.model = str(base.config.get("model", model))
        source = open_model(self.model)
        self.mark = model_mark(source)
        names = ("toybox", "toybox") if source.identity in EMBEDDED else (CLIP, DINO)
        self.encoders = dict(zip(("CLIP", "DINO"), names, strict=True))
        self.tasks: dict[tuple[str, str], Task] = {}

    def rows_of(self, study: Study) -> list[SuiteRow]:
        names = self.asked or ([row.name for row in self.suite.rows] if study.subjects == "all" else self.base.subjects)
        return [row for name in names for row in self.suite.rows if row.name == name]

    def expand(self, name: str, study: Study, model: str) -> list[Cell]:
        """All cells of a study, seed by seed; its tasks join those of the studies before."""
        return [
            Cell(
                series,
                value,
                row.name,
                seed,
                self._need(name, study, series, value, row, seed, strength, model),
                self._images(row),
                row.group,
                strength,
            )
            for seed in range(self.seeds)
            for row in self.rows_of(study)
            for series in study.series
            for value in study.values_for(model)
            for strength in study.strengths
        ]

    def _need(
        self,
        name: str,
        study: Study,
        series: Series,
        value: Value,
        row: SuiteRow,
        seed: int,
        strength: float,
        model: str,
    ) -> str:
        """Note what the task of a cell has to measure; the key of its record."""
        images = self._images(row)
        fields = {**series.fields_for(model), **value.set}
        try:
            config = self._config(row, images, seed, fields)
        except ValueError as error:
            raise ValueError(f"study {name}, value {value.label!r}: {error}") from None
        if value.untrained:
            of_run = {"model": self.mark, "config": {"subject": row.class_noun, **self._source(config)}, "photos": ""}
            run, step = "base", 0
        else:
            of_run = run_mark(config, self.mark, self._hashes(images, config.subject.limit))
            run, step = key_of(of_run), config.train.steps
        own = [study.sample, series.sample, value.sample]
        sampling = self._sampling(study, own, row, seed, config.data.resolution)
        if not value.untrained:
            sampling["strength"] *= strength
        gallery = self._gallery(row) if needs_gallery(study.metrics) else []
        of = {
            "run": of_run,
            "step": step,
            "sampling": sampling,
            "photos": self._hashes(images, None),
            "encoders": self.encoders,
            "gallery": key_of({"photos": [self._hashes(each, None) for each in gallery]}) if gallery else "",
        }
        key = key_of(of)
        task = self.tasks.setdefault(
            (run, row.name if value.untrained else run),
            Task(
                run, config.model_dump(mode="json", by_alias=True), of_run, row.name, row.group, images, seed,
                batch_size=self.base.batch_size,
            ),
        )  # fmt: skip
        task.needs[key] = {"step": step, "seed": seed, "sampling": sampling, "gallery": gallery, "of": of}
        task.studies.add(name)
        return key

    @staticmethod
    def _source(config: RunConfig) -> dict[str, Any]:
        """What else says which model is drawn with."""
        return {name: getattr(config, name) for name in ("revision", "variant", "vae", "model_config_dir")}

    def _images(self, row: SuiteRow) -> str:
        return self.suite.images_of(row, self.photos)

    def _config(self, row: SuiteRow, images: str, seed: int, fields: dict[str, Any]) -> RunConfig:
        subject = {"images": images, "class": row.class_noun, "token": row.token}
        kept = self.base.config.get("subject") or {}
        tree = {**self.base.config, "subject": {**kept, **subject}, "output": str(self.runs / "trained" / "run")}
        quiet = {"prompts": [], "every": 0, "loss": False, "report": False}
        own = {**fields, "train.seed": seed, "validation": quiet, "data.cache_dir": str(self.runs / "cache")}
        return make_config(tree, [*self.sets, *(f"{key}={json.dumps(value)}" for key, value in own.items())])

    def _sampling(self, study: Study, own: Sequence[Sampling], row: SuiteRow, seed: int, side: int) -> dict[str, Any]:
        """Everything that decides the images of a value; the last of `own` that says something wins."""
        prompts = self.base.prompts if study.prompts == "base" else self._prompts_of_suite(row)
        chosen = {**self.base.sampling.model_dump(), "strength": 1.0, "strength_schedule": ""}
        for one in own:
            chosen |= one.model_dump(exclude_none=True)
        return {
            **chosen,
            "guidance": float(chosen["guidance"]),
            "side": side,
            "prompts": list(prompts),
            "seeds": [seed * self.base.pictures + i for i in range(self.base.pictures)],
            "negative": "",
            "scheduler": None,
            "noise": "prompt",
            "batch_size": self.base.batch_size,
        }

    def _gallery(self, row: SuiteRow) -> list[str]:
        """Where the photos of the look-alikes are: the suite's other subjects and those given beside it."""
        return [self._images(other) for other in self.suite.rows if other.name != row.name] + self.look_alikes

    def _prompts_of_suite(self, row: SuiteRow) -> list[str]:
        return self.suite.prompts[row.prompts] if isinstance(row.prompts, str) else row.prompts

    @functools.cached_property
    def _hashes(self) -> Any:
        """(images, limit) -> a hash of the photos' contents and captions, each folder read once."""

        @functools.cache
        def hashes(images: str, limit: int | None) -> str:
            subject = {"images": images, "class": "subject", **({"limit": limit} if limit else {})}
            config = make_config({"subject": subject, "output": "runs/photos"})
            found = collect(config).pictures
            captions = [text for picture in found for text in picture.captions]
            own = set(captions) != {config.subject.fill(config.subject.prompt)}
            return key_of({"photos": [picture.sha256 for picture in found], **({"captions": captions} if own else {})})

        return hashes


def order(tasks: Sequence[Task]) -> list[Task]:
    """Whole seeds first; within a seed the base model, then what most studies share."""
    return sorted(tasks, key=lambda task: (task.seed, task.run != "base", -len(task.studies)))


def unfinished(tasks: Sequence[Task], runs: Path) -> list[Task]:
    """Tasks with the needs alone that have no record yet."""
    left = []
    for task in tasks:
        needs = {key: need for key, need in task.needs.items() if read(runs, key) is None}
        if needs:
            left.append(Task(**{**vars(task), "needs": needs}))
    return left
