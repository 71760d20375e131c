"""Which families there are, and which of them a denoiser's config belongs to. Imports a family when it is asked for."""

from __future__ import annotations

import importlib

from diffusekrona_train.models.contracts import Config, Family

FAMILIES: dict[str, str] = {
    "sd": "diffusekrona_train.models.sd:FAMILY",
    "sdxl": "diffusekrona_train.models.sdxl:FAMILY",
    "zimage": "diffusekrona_train.models.zimage:FAMILY",
}
"""Family name -> module and the object in it."""


def family_named(name: str) -> Family:
    """The family object of a row in FAMILIES; ValueError for another name."""
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is unknown; this version knows {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def known_family(denoiser_config: Config) -> Family | None:
    """The family that recognises a denoiser's config, None where none does."""
    return next((family for family in map(family_named, FAMILIES) if family.matches(denoiser_config)), None)


def family_of(denoiser_config: Config, model: str) -> Family:
    """The family that recognises a denoiser's config; ValueError naming the model when none does."""
    family = known_family(denoiser_config)
    if family is None:
        kind = denoiser_config.get("_class_name", "an unknown class")
        raise ValueError(
            f"model {model!r}: its denoiser ({kind}) belongs to none of the families {', '.join(FAMILIES)}"
        )
    return family
