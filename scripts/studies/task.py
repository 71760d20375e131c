"""What a table shows (Cell) and what has to be done for it (Task), as plain values that any process can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
