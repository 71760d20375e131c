"""Personalise text-to-image diffusion models with Kronecker adapters (DiffuseKronA).

    from diffusekrona_train import load_config, sample, train
    result = train(load_config("dog.yaml"))
    images = [one.image for one in sample(result.file, "A [V] dog on the beach")]

Every name is imported (with torch) when it is asked for. Nothing here prints, exits or installs a signal handler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusekrona_train.adapters.formats import load_adapter, set_scale, unload
    from diffusekrona_train.common.progress import Diverged, Progress, Stopped, TrainResult
    from diffusekrona_train.config import load_config
    from diffusekrona_train.evaluation import evaluate
    from diffusekrona_train.fleet import personalise
    from diffusekrona_train.sampling import sample
    from diffusekrona_train.training import train

__version__ = "0.2.0"
__all__ = [
    "Diverged",
    "Progress",
    "Stopped",
    "TrainResult",
    "__version__",
    "evaluate",
    "load_adapter",
    "load_config",
    "personalise",
    "sample",
    "set_scale",
    "train",
    "unload",
]

_HOMES = {
    "adapters.formats": ("load_adapter", "set_scale", "unload"),
    "common.progress": ("Diverged", "Progress", "Stopped", "TrainResult"),
    "config": ("load_config",),
    "evaluation": ("evaluate",),
    "fleet": ("personalise",),
    "sampling": ("sample",),
    "training": ("train",),
}
"""Module of the package -> the public names that it defines."""


def __getattr__(name: str) -> object:
    """Import a public name from its module: `diffusekrona_train.train`."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
