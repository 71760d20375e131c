"""Model families: where a model comes from and which family describes it.

`open_model` finds a model (alias, hub name, folder or single file) and its family from the model's own config, without
loading a weight and without importing diffusers. A new family is one file here and one row in registry.FAMILIES.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusekrona_train.common.nearest import did_you_mean, nearest
from diffusekrona_train.config import EMBEDDED, MODEL_ALIASES, RunConfig
from diffusekrona_train.config.known import known_models
from diffusekrona_train.config.paths import user_path
from diffusekrona_train.models.checkpointfile import PICKLES, SAFETENSORS
from diffusekrona_train.models.checks import check_denoiser
from diffusekrona_train.models.contracts import DENOISERS, Config, Place
from diffusekrona_train.models.hub import HubModel
from diffusekrona_train.models.local import LocalModel, embedded
from diffusekrona_train.models.registry import FAMILIES, family_named, family_of
from diffusekrona_train.models.source import ModelSource

__all__ = [
    "FAMILIES",
    "ModelSource",
    "configured_model",
    "family_named",
    "family_of",
    "generating_arguments",
    "generating_model",
    "near_miss",
    "open_model",
]

PACKAGED = {MODEL_ALIASES[alias]: alias for alias in ("sdxl", "sd15", "sd14", "sd21", *known_models())} | {
    "stabilityai/stable-diffusion-2-1": "sd21",  # withdrawn from the hub in November 2025, in caches still
}
"""Hub names whose configs the package carries: these open without a network."""


def open_model(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    model_config_dir: str | None = None,
    prediction_type: str | None = None,
    text_precision: str | None = None,
    text_encoders: Sequence[str] | None = None,
) -> ModelSource:
    """Find a model by alias, hub name, diffusers folder or single .safetensors file.

    Reads configs and file headers only; weights come with `ModelSource.load`. Raises a one-line ValueError that names
    what was given and what would be right: an unknown alias, a missing folder or part, a gated or missing hub model.
    """
    if not model:
        raise ValueError(f"model is empty; give a hub name, a folder, a .safetensors file or one of {_aliases()}")
    resolved = MODEL_ALIASES.get(model, user_path(model, "model"))
    vae = vae and user_path(vae, "vae")
    model_config_dir = model_config_dir and user_path(model_config_dir, "model_config_dir")
    path = Path(resolved).expanduser()
    if resolved in EMBEDDED:
        place = embedded(resolved)
    elif path.is_dir():
        place = LocalModel(path, variant=variant)
    elif path.is_file():
        place = _file(path, model_config_dir, own_vae=vae is None)
    elif _looks_local(resolved):
        raise ValueError(f"model {model!r}: no such file or folder{near_miss(path)}")
    elif "/" in resolved:
        alias = PACKAGED.get(resolved)
        place = HubModel(resolved, revision=revision, variant=variant, alias=alias)
    else:
        hint = did_you_mean(model.lower(), MODEL_ALIASES, 0.5, "'{}'")
        raise ValueError(
            f"model {model!r} is not known: {hint}{' ' if hint else ''}give an alias ({_aliases()}), a hub name like "
            "owner/name, a diffusers folder or a .safetensors file"
        )
    config = denoiser_config(place)
    family = family_of(config, model)
    check_denoiser(model, config)
    texts = [_text_file(user_path(name, "text_encoders")) for name in text_encoders or ()]
    return ModelSource(
        model=model,
        place=place,
        family=family,
        vae=vae,
        predicts=prediction_type,
        text_encoders=texts,
        text_precision=text_precision or "auto",
    )


def _file(path: Path, configs: str | None, own_vae: bool) -> Place:
    """Open a single file: a transformer that is told by its tensors, else a complete Stable Diffusion checkpoint."""
    from diffusekrona_train.models.checkpointfile import CheckpointFile
    from diffusekrona_train.models.singlefile import SingleFile
    from diffusekrona_train.models.transformerfile import open_transformer, recognised

    file = CheckpointFile(path)
    found = recognised(file)
    if found is None:
        return SingleFile(path, config_folder=configs, own_vae=own_vae)
    base = None
    if configs is not None:
        folder, hub = Path(configs).expanduser(), MODEL_ALIASES.get(configs, configs)
        if not folder.is_dir() and (hub in EMBEDDED or hub.count("/") != 1 or _looks_local(hub)):
            raise ValueError(f"model_config_dir {configs!r} is not a folder, an alias or a hub name")
        base = LocalModel(folder) if folder.is_dir() else HubModel(hub, alias=PACKAGED.get(hub))
    return open_transformer(path, file, found, base)


def _text_file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"text_encoders: {name!r}: no such file{near_miss(path)}")
    return name


def denoiser_config(place: Place) -> Config:
    """Return the config of the denoiser, whichever folder it is in; ValueError if there is none."""
    failure = None
    for folder in DENOISERS:
        try:
            return place.config(folder)
        except ValueError as error:
            failure = failure or error
    raise failure or ValueError("no denoiser")


def configured_model(config: RunConfig) -> ModelSource:
    """Open the base model that a run's config names; ValueError as `open_model`."""
    return open_model(
        config.model,
        revision=config.revision,
        variant=config.variant,
        vae=config.vae,
        model_config_dir=config.model_config_dir,
        prediction_type=config.prediction_type,
        text_precision=config.data.text_precision,
        text_encoders=config.text_encoders,
    )


def generating_model(config: RunConfig, trained: ModelSource) -> ModelSource:
    """Open the model that a run generates images with: `trained`, or sample.model. ValueError where it has other layers
    or another text encoder than the trained one, whose adapter and embeddings it is to use."""
    if config.sample.model is None:
        return trained
    found = open_model(**generating_arguments(config))
    what = f"sample.model: {config.sample.model!r}"
    if found.family.name != trained.family.name:
        raise ValueError(f"{what} is of family {found.family.name}, and model of {trained.family.name}; name its kin")
    if found.layers() != trained.layers():
        raise ValueError(f"{what} has other layers than model: {config.model!r}; name its distilled or its base model")
    return found


def generating_arguments(config: RunConfig) -> dict[str, Any]:
    """Return open_model's arguments for sample.model: a file goes with the run's own VAE and text encoders."""
    assert config.sample.model is not None
    given: dict[str, Any] = {"model": config.sample.model, "text_precision": config.data.text_precision}
    if not Path(user_path(config.sample.model, "sample.model")).expanduser().is_file():
        return given
    folder = config.model_config_dir if config.model_config_dir and Path(config.model_config_dir).is_dir() else None
    return given | {"vae": config.vae, "text_encoders": config.text_encoders, "model_config_dir": folder}


def near_miss(path: Path) -> str:
    """Return '; did you mean …?' if the parent folder holds a similar name, else ''."""
    if not path.parent.is_dir():
        return f" ({str(path.parent)!r} does not exist either)"
    close = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def _looks_local(name: str) -> bool:
    suffixes = (*SAFETENSORS, *PICKLES)
    return name.startswith((".", "/", "~")) or name.lower().endswith(suffixes) or name.count("/") > 1 or "\\" in name


def _aliases() -> str:
    return ", ".join(MODEL_ALIASES)
