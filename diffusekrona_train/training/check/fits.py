"""Which of the known models fit this machine, and what each needs: estimates from layer tables, no weights."""

from __future__ import annotations

from dataclasses import dataclass

from diffusekrona_train.config import EMBEDDED, MODEL_ALIASES, make_config

WORDS = {
    "sdxl": ("Stable Diffusion XL", "The most detail."),
    "sd15": ("Stable Diffusion 1.5", "Small, quick, with many fine-tuned bases."),
    "sd14": ("Stable Diffusion 1.4", "The base of many papers."),
    "sd21": ("Stable Diffusion 2.1", "Between 1.5 and XL."),
    "toybox": ("Toybox", "Embedded: learns in minutes on any computer, to try things out."),
    "toybox-flow": ("Toybox Flow", "Embedded too: a small flow-matching transformer."),
}
"""Alias -> title and a sentence; an alias without a row shows its name."""
SURE = "Fits every computer; nothing is downloaded."


@dataclass(frozen=True)
class Fit:
    """A model: whether it fits this machine, what it needs in words, and the side of its images in pixels."""

    alias: str
    title: str
    about: str
    fits: bool
    needs: str
    pixels: int = 0


def quick_fits() -> list[Fit]:
    """Return the known models before anything was looked at, the embedded ones first; imports no torch."""
    found = [
        Fit(alias, *WORDS.get(alias, (alias, "")), alias in EMBEDDED, SURE if alias in EMBEDDED else "Looking …")
        for alias in MODEL_ALIASES
    ]
    return sorted(found, key=lambda one: not one.fits)


def fits_here() -> list[Fit]:
    """Return `model_fits` of this machine."""
    from diffusekrona_train.training.check.starter import free_gib

    return model_fits(free_gib())


def model_fits(free: float | None) -> list[Fit]:
    """Return the known models: those that fit in `free` GiB of GPU memory (None: no GPU) first, by image size."""
    return sorted((_fit(alias, free) for alias in MODEL_ALIASES), key=lambda one: (not one.fits, -one.pixels))


def _fit(alias: str, free: float | None) -> Fit:
    title, about = WORDS.get(alias, (alias, ""))
    try:
        plain, least, pixels = _needs(alias)
    except Exception:  # its configs come with its weights, which are not here yet
        return Fit(alias, title, about, False, "Downloaded at the first run; what it needs is known then.")
    about = f"{pixels} × {pixels} pixels. {about}"
    if alias in EMBEDDED:
        return Fit(alias, title, about, True, SURE, pixels)
    needs = f"about {plain:.0f} GB of GPU memory, {least:.0f} in 4 bits (estimated)"
    if free is None:
        return Fit(alias, title, about, False, f"Needs {needs}.", pixels)
    return Fit(alias, title, about, least <= free, f"Needs {needs}; {free:.0f} GB are free.", pixels)


def _needs(alias: str) -> tuple[float, float, int]:
    """(GiB with gradient checkpointing, GiB at the lowest level, pixels of a side), with the model's own defaults."""
    import torch

    from diffusekrona_train.models import configured_model
    from diffusekrona_train.training.check.needs import base_parameters
    from diffusekrona_train.training.memory import estimate, levels

    config = make_config({"model": alias, "subject": {"images": "toybox:poodle", "class": "dog"}, "output": "x"})
    source = configured_model(config)
    megapixels = config.train.batch_size * (config.data.resolution / 1024) ** 2
    parameters, figures = base_parameters(source), source.family.memory
    needs = [estimate(level, parameters, megapixels, torch.bfloat16, figures) for level in levels(config)]
    return needs[1], min(needs), config.data.resolution
