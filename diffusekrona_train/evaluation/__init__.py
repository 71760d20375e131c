"""Measure what was learnt: images of any origin, suites of subjects, several adapters, the checkpoints of a run.

evaluate("runs/dog", output="scores")["rows"][0]["scores"]["dino"]["value"]
best_checkpoint("runs/dog")["chosen_step"]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusekrona_train.common.device import free
from diffusekrona_train.common.process import as_found
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.evaluation.adapters import RULE, Plan
from diffusekrona_train.evaluation.best import best_checkpoint
from diffusekrona_train.evaluation.compare import compare
from diffusekrona_train.evaluation.inputs import load_suite, photos_of, read_generated
from diffusekrona_train.evaluation.suite import evaluate_images, evaluate_suite
from diffusekrona_train.sampling.session import Memory, find_adapter

__all__ = [
    "RULE",
    "Plan",
    "best_checkpoint",
    "compare",
    "evaluate",
    "evaluate_images",
    "evaluate_suite",
    "load_suite",
    "photos_of",
    "read_generated",
]


def evaluate(
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    photos: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    steps: int | None = None,
    guidance: float | None = None,
    model: str | None = None,
    clip: str | None = None,
    dino: str | None = None,
    memory: Memory | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Generate with adapter files or run folders of one subject and return their scores, the best DINO first.

    Writes scores.json, report.html and the images to `output` and returns what scores.json holds: rows (name, scores,
    images), base, rule, settings; None on all processes but the first. `photos` (a folder, a data set, toybox:NAME)
    and `prompts` are those of the run that the first adapter lies in, if omitted. ValueError of one line for what the
    user can put right. Everything global is as before when it returns, and the models are freed.
    """
    files = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    try:
        with as_found():
            plan = Plan(seeds, prompts, clip, dino, memory=memory or Memory(), progress=progress or Progress()).shared()
            found = [find_adapter(Path(file).expanduser()) for file in files]
            real = photos_of(str(photos)) if photos is not None else None
            settings = {"steps": steps, "guidance": guidance}
            return compare(found, real, plan, Path(output).expanduser(), model=model, settings=settings)
    finally:
        free()
