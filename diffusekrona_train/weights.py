"""The old name of `diffusekrona_train.adapters.formats`, kept for code written for version 0.1."""

from __future__ import annotations

import warnings

from diffusekrona_train.adapters.formats import *  # noqa: F403

warnings.warn(
    "diffusekrona_train.weights is deprecated; import from diffusekrona_train, such as "
    "`from diffusekrona_train import load_adapter, set_scale, unload`",
    DeprecationWarning,
    stacklevel=2,
)
