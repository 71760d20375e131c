"""Put an adapter file into a model or any diffusers pipeline, and take it out again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import nn

from diffusekrona_train.adapters.formats.adapterfile import AdapterFile, identify, read_adapter
from diffusekrona_train.adapters.formats.authors import import_diffusekrona
from diffusekrona_train.adapters.formats.names import family_name, layers_per_block
from diffusekrona_train.adapters.inject import Injection, inject
from diffusekrona_train.models import layers as tables
from diffusekrona_train.models import open_model
from diffusekrona_train.models.layers import Layer, find_layers, find_others


class Pipeline(Protocol):
    """A pipeline of diffusers: its `unet` or `transformer` is what gets an adapter."""

    @property
    def components(self) -> Mapping[str, object]: ...


def known_layers(model: str, model_config_dir: str | None = None) -> tuple[list[Layer], str, int]:
    """Return the linears that a file may adapt, family and layers per block of a model (alias, hub name, folder,
    file); loads no weights."""
    if model in tables.TABLES:
        return tables.layer_table(model), tables.FAMILY_OF[model], tables.layers_per_block(model)
    source = open_model(model, model_config_dir=model_config_dir)
    layers = [*source.layers(), *source.others()]
    return layers, source.family.name, layers_per_block(source.denoiser_config)


def open_adapter(
    path: str | Path, model: str | None = None, *, authors: bool = False, model_config_dir: str | None = None
) -> AdapterFile:
    """Read an adapter file with its layers known: from the file itself, or else from `model`.

    `authors`: a checkpoint of the DiffuseKronA authors. Raises a one-line ValueError where a model is needed.
    """
    file = AdapterFile(str(path), {}) if authors else read_adapter(path)
    if model is None:
        if file.layers:
            return file
        raise ValueError(f"{path}: does not name its base model; give --model sdxl, sd15, sd21 or a pipeline folder")
    layers, family, per_block = known_layers(model, model_config_dir)
    return (
        import_diffusekrona(path, layers, family, per_block) if authors else identify(file, layers, family, per_block)
    )


def inject_file(model: nn.Module, file: AdapterFile) -> Injection:
    """Put the adapter of a file into a denoiser; ValueError where it does not fit (the model is then unchanged)."""
    file = identified(model, file)
    assert file.spec is not None
    injection = inject(model, file.spec, options=file.options)
    try:
        fill(injection, file)
    except ValueError:
        injection.eject()
        raise
    return injection


def identified(model: nn.Module, file: AdapterFile) -> AdapterFile:
    """Return the file with its adapter's type, layers and options known, as they are in this model."""
    layers = [*find_layers(model, None), *find_others(model)]
    return identify(file, layers, family_name(model), layers_per_block(getattr(model, "config", None)))


def fill(injection: Injection, file: AdapterFile) -> None:
    """Load the factors of an identified file into adapters of the same shapes; ValueError where they are others."""
    try:
        if other := injection.adapters.keys() ^ file.groups.keys():
            raise ValueError(f"{min(other)} is adapted in one of the two and not in the other")
        for name, adapter in injection.adapters.items():
            adapter.load_file_tensors(file.groups[name])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file.path}: {error}") from None


def load_adapter(pipe_or_model: Pipeline | nn.Module, path: str | Path, strength: float = 1.0) -> Injection:
    """Put an adapter file into a diffusers pipeline (or its UNet); several files may be stacked.

    Raises a one-line ValueError for a damaged file and for one of another model.
    """
    model = _denoiser(pipe_or_model)
    injection = inject_file(model, read_adapter(path))
    injection.set_strength(strength)
    for parameter in injection.parameters():
        parameter.requires_grad_(False)  # for rendering; training injects by itself
    _loaded(model).append(injection)
    return injection


def set_scale(pipe_or_model: Pipeline | nn.Module, strength: float, index: int | None = None) -> None:
    """Set the strength of all loaded adapters, or of the one at `index` in loading order; 0 is exactly the base."""
    loaded = _loaded(_denoiser(pipe_or_model))
    if not loaded:
        raise ValueError("no adapter is loaded; call load_adapter first")
    for injection in loaded if index is None else [loaded[index]]:
        injection.set_strength(strength)


def unload(pipe_or_model: Pipeline | nn.Module) -> None:
    """Take out every adapter that load_adapter put in; the model is then bit-identical to before."""
    loaded = _loaded(_denoiser(pipe_or_model))
    while loaded:
        loaded.pop().eject()


def _denoiser(pipe_or_model: Pipeline | nn.Module) -> nn.Module:
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe_or_model, name, None), nn.Module):
            return getattr(pipe_or_model, name)
    if not isinstance(pipe_or_model, nn.Module):
        raise ValueError(f"a {type(pipe_or_model).__name__} is neither a pipeline with a unet nor a model")
    return pipe_or_model


def _loaded(model: nn.Module) -> list[Injection]:
    if not hasattr(model, "krona_loaded"):
        model.krona_loaded = []  # type: ignore[assignment]
    return model.krona_loaded  # type: ignore[return-value]
