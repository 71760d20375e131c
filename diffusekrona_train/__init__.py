"""Personalise text-to-image diffusion models with Kronecker adapters (DiffuseKronA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusekrona_train.adapters.formats import load_adapter, set_scale, unload

__version__ = "0.2.0"
__all__ = ["__version__", "load_adapter", "set_scale", "unload"]


def __getattr__(name: str) -> Any:
    """What a pipeline needs, imported (with torch) when it is asked for: `diffusekrona_train.load_adapter`."""
    if name in ("load_adapter", "set_scale", "unload"):
        from diffusekrona_train.adapters import formats as weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
