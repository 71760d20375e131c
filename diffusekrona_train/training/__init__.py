"""Train a subject: `train("dog.yaml")` writes runs/dog/dog.safetensors.

Importing this package is cheap: torch comes with the first call, so that `--check` and `--help` answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusekrona_train.common.progress import Diverged, Progress, Stopped, TrainResult
from diffusekrona_train.config import RunConfig, load_config, make_config

__all__ = ["Diverged", "Progress", "Stopped", "TrainResult", "train"]


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    resume_from: str | Path | None = None,
    overwrite: bool = False,
) -> TrainResult:
    """Train what the config describes (read already, a tree as YAML gives it, or a YAML file); write its run folder.

    `resume` continues from the newest state in the output folder and starts anew where there is none, `resume_from`
    from the given state; `overwrite` replaces the run that is there. `progress` receives what the run reports.

    Raises a one-line ValueError for what the user can put right, Stopped (after a checkpoint) where `progress` or a
    file `stop` in the run folder asked for it, Diverged where the loss was not finite, and RuntimeError for a fault.
    Prints nothing. However it ends, torch's settings, random states, the environment and log levels are as before, and
    the model is freed.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config) if isinstance(config, str | Path) else make_config(dict(config))
    from diffusekrona_train.common.device import free
    from diffusekrona_train.common.process import as_found
    from diffusekrona_train.training import run

    if config.train.compile:
        import torch._dynamo  # noqa: F401, so that its settings are among those that are put back
    state = Path(resume_from) if resume_from is not None else None
    try:
        with as_found():
            return run.train(config, progress or Progress(), resume=resume, resume_from=state, overwrite=overwrite)
    finally:
        free()
