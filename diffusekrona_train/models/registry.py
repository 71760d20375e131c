"""List the model families and find that of a denoiser's config. A family is imported when it is needed."""

from __future__ import annotations

import importlib

from diffusekrona_train.models.contracts import Config, Family

FAMILIES: dict[str, str] = {
    "sd": "diffusekrona_train.models.sd:FAMILY",
    "sdxl": "diffusekrona_train.models.sdxl:FAMILY",
    "zimage": "diffusekrona_train.models.zimage:FAMILY",
    "flux2-klein": "diffusekrona_train.models.flux2:KLEIN",
    "flux2": "diffusekrona_train.models.flux2:DEV",
    "qwenimage": "diffusekrona_train.models.qwenimage:FAMILY",
    "krea2": "diffusekrona_train.models.krea2:FAMILY",
    "flux1": "diffusekrona_train.models.flux1:FLUX1",
    "chroma": "diffusekrona_train.models.flux1:CHROMA",
    "sd3": "diffusekrona_train.models.sd3:FAMILY",
    "anima": "diffusekrona_train.models.anima:FAMILY",
}
"""Family name -> module and the object in it."""


def family_named(name: str) -> Family:
    """Return the family object of a row in FAMILIES; ValueError for another name."""
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is unknown; this version knows {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def known_family(denoiser_config: Config) -> Family | None:
    """Return the family that recognises a denoiser's config, None if there is none."""
    return next((family for family in map(family_named, FAMILIES) if family.matches(denoiser_config)), None)


def family_of(denoiser_config: Config, model: str) -> Family:
    """Return the family that recognises a denoiser's config; ValueError naming the model if there is none."""
    family = known_family(denoiser_config)
    if family is None:
        kind = denoiser_config.get("_class_name", "an unknown class")
        raise ValueError(
            f"model {model!r}: its denoiser ({kind}) belongs to none of the families {', '.join(FAMILIES)}"
        )
    return family
