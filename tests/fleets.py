"""Many jobs on a tiny model, for the tests of `fleet`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.common.progress import Progress
from diffusekrona_train.fleet import personalise
from diffusekrona_train.fleet.service import Done
from diffusekrona_train.training import train
from tests.runs import factors

KRONA = {"a1": 4, "a2": 4}


def common(world: Path, adapter: Mapping[str, Any] = KRONA, **sections: Any) -> dict[str, Any]:
    """Return what jobs on a world of `tests.runs.make_world` have in common."""
    tree: dict[str, Any] = {
        "model": str(world / "model"),
        "adapter": dict(adapter),
        "data": {"resolution": 64, "cache_dir": str(world / "cache")},
        # with a smaller eps AdamW makes whole steps of gradients that are nothing but rounding
        "train": {
            "steps": 4,
            "batch_size": 1,
            "learning_rate": 1e-2,
            "checkpoint_every": 2,
            "log_every": 1,
            "eps": 1e-4,
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return tree


def jobs_of(world: Path, count: int = 3) -> list[dict[str, Any]]:
    """Return jobs that differ in all that a job may: photos, seed, steps, rate, loss, prior."""
    photos = [{"images": str(world / "photos"), "subject": {"files": [f"{i % 3}.png"]}} for i in range(count)]
    own: list[dict[str, Any]] = [
        {"seed": 3},
        {"seed": 4, "steps": 6, "learning_rate": 3e-3, "train.loss": "huber", "prompt": "A photo of a [V] {class}"},
        {"seed": 5, "steps": 2, "prior": {"kind": "teacher", "weight": 0.5}, "train.gradient_accumulation": 2},
        {"seed": 6, "steps": 5, "train.weighting": "min_snr", "train.schedule": "cosine", "train.warmup_steps": 2},
    ]
    return [{"id": f"job-{i}", "class": "dog", **photos[i], **own[i % len(own)]} for i in range(count)]


def trained(jobs: Iterable[Mapping[str, Any]], output: Path | str, world: Path, **options: Any) -> dict[str, Done]:
    """Train jobs; return how each ended, by id."""
    config = options.pop("config", None) or common(world)
    return {done.id: done for done in personalise(jobs, config=config, output=output, **options)}


def alone(job: Mapping[str, Any], output: Path, tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Train a job by `train`, as a run of its own; return its factors."""
    from diffusekrona_train.fleet.jobs import common_tree, make_job

    config = make_job(job, common_tree(None, dict(tree), ())).config(str(output / str(job["id"])))
    train(config)
    return factors(output / str(job["id"]))


class Killed(Progress):
    """Ends the process, as a power cut would, when the n-th event of a kind comes."""

    def __init__(self, event: str, count: int, **fields: Any) -> None:
        super().__init__()
        self.event, self.left, self.fields = event, count, fields

    def report(self, event: str, **fields: Any) -> None:
        import os
        import signal

        if event == self.event and all(fields.get(name) == value for name, value in self.fields.items()):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
