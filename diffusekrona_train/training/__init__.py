"""Train a subject: `train(load_config("dog.yaml"))` writes runs/dog/dog.safetensors.

Importing this package is cheap: torch comes with the first call, so that `--check` and `--help` answer at once.
"""

from __future__ import annotations

from pathlib import Path

from diffusekrona_train.common.progress import Diverged
from diffusekrona_train.config import RunConfig

__all__ = ["Diverged", "train"]


def train(config: RunConfig, *, resume: bool = False, resume_from: str | None = None, overwrite: bool = False) -> Path:
    """Train what the config describes and return the final adapter file; see `training.run.train`."""
    from diffusekrona_train.training import run

    return run.train(config, resume=resume, resume_from=resume_from, overwrite=overwrite)
