"""Models that the package knows by name, and their configs: what it takes to plan a run before a download.

A model is a folder in assets/configs: `about.json` with the fields of Known, beside it the configs of the model's parts
in diffusers' layout (transformer/config.json, vae/config.json, …). To add one, add a folder: its name is the alias of
every command. Files that another model has too may be left out where `like` names that model.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusekrona_train.common.files import ASSETS

CONFIGS = ASSETS / "configs"


@dataclass(frozen=True)
class Known:
    """One model on the hub."""

    hub: str
    """Name of its repository, in diffusers' layout."""
    licence: str
    gated: bool
    """Whether its licence must be accepted on the hub before a download."""
    download_gb: float
    """All its parts, in 10^9 bytes, about."""
    like: str | None = None
    """Alias of the model whose configs it shares, except those in its own folder."""
    train_instead: str | None = None
    """Alias of the model to train where this one is distilled to few steps and only generates well."""
    prompt: dict[str, list[int]] = field(default_factory=dict)
    """What a prompt of usual length is encoded as, name -> shape: to count memory by."""
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Defaults of a run's config, by section."""


@functools.cache
def known_models() -> dict[str, Known]:
    """Return alias -> model, in alphabetical order; needs no network."""
    files = sorted(CONFIGS.glob("*/about.json"))
    return {file.parent.name: Known(**json.loads(file.read_text(encoding="utf-8"))) for file in files}


def known_model(name: str) -> Known | None:
    """Return the model of an alias or a hub name, None where the package does not know it."""
    models = known_models()
    return models.get(name) or next((model for model in models.values() if model.hub == name), None)


def config_file(alias: str, name: str) -> Path:
    """Return the packaged file `name` (such as vae/config.json) of a model, which need not exist."""
    file = CONFIGS / alias / name
    model = known_models().get(alias)
    return file if model is None or model.like is None or file.is_file() else config_file(model.like, name)
