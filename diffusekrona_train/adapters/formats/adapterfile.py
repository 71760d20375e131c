"""Read, check and write adapter files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from diffusekrona_train import __version__
from diffusekrona_train.adapters import ADAPTERS
from diffusekrona_train.adapters.formats import tensorfile
from diffusekrona_train.adapters.formats.joined import cut_joined
from diffusekrona_train.adapters.formats.names import (
    KEY,
    describe_groups,
    family_name,
    header,
    layers_per_block,
    split_keys,
    without_paths,
)
from diffusekrona_train.adapters.formats.peftnotes import with_scales
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import FAMILIES, family_named
from diffusekrona_train.models import layers as tables
from diffusekrona_train.models.layers import Layer


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a file, on the CPU. One that does not describe itself has no layers until `identify`."""

    path: str
    groups: dict[str, dict[str, Tensor]]
    """Layer -> suffix -> tensor, as stored; a layer by its dotted path where layers are known, else as in the file."""
    metadata: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    """Our own JSON; {} in other tools' files."""
    spec: AdapterConfig | None = None
    family: str | None = None
    layers: list[Layer] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers_per_block: int = 2

    @property
    def row_permutation(self) -> bool:
        """Return True for the DiffuseKronA authors' checkpoints: their rows of A ⊗ B have another order."""
        return any(option.get("row_permutation") for option in self.options.values())

    def said_prediction(self, model: str | None = None) -> str | None:
        """Return the prediction_type that the run's config had to give, because its base model's files did not.

        It holds for that base: with `model`, only where that has the name of the one it was trained on.
        """
        if model is not None and Path(model).name != str(self.info.get("model", "")).split(" sha256:")[0]:
            return None
        training = self.info.get("training")
        said = training.get("prediction_type") if isinstance(training, dict) else None
        return said if isinstance(said, str) else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return key in a file (`<name>.<suffix>`) -> tensor."""
        names = {layer.name: self.file_name(layer.name) for layer in self.layers}
        return {
            f"{names.get(name, name)}.{suffix}": tensor
            for name, group in self.groups.items()
            for suffix, tensor in group.items()
        }

    def file_name(self, layer: str) -> str:
        """Return the name of a layer (dotted path) in this family's files."""
        return tables.file_name(self.family or "", layer, self.layers_per_block)


# ---- out -----------------------------------------------------------------------------------------------------------


def save_adapter(path: str | Path, injection: Injection, info: dict[str, Any], dtype: str = "fp32") -> None:
    """Write the adapter of `injection` (strength left out) with `info` as its own JSON; see `write_adapter`.

    `info` may hold model, token, class, prompt, resolution, prediction_type, step, training (a config as dict); what
    rebuilds the adapter is added here. Local paths in it are cut to base names.
    """
    config = getattr(injection.model, "config", None)
    adapters = injection.adapters
    write_adapter(
        path,
        AdapterFile(
            path=str(path),
            groups={name: adapter.file_tensors() for name, adapter in adapters.items()},
            info=info,
            spec=injection.spec,
            family=info.get("family") or family_name(injection.model),
            layers=[getattr(adapter, "layer", None) or whole_module(name) for name, adapter in adapters.items()],
            options={name: dict(injection.options[name]) for name in adapters},
            layers_per_block=layers_per_block(config),
        ),
        dtype,
    )


def write_adapter(path: str | Path, file: AdapterFile, dtype: str = "fp32", *, own_json: bool = True) -> None:
    """Write an adapter in this project's format as "fp32", "fp16" or "bf16", atomically, after reading it back.

    With own_json False it is a plain LoKr, LoRA or LoHa file. Raises ValueError for NaN and for what fp16 cannot hold.
    """
    assert file.spec is not None and file.layers, "identify the file first"
    about = header(
        path,
        kind=file.spec.type,
        family=file.family or "",
        layers=file.layers,
        groups=file.groups,
        options=file.options,
        info=file.info,
    )
    if file.row_permutation:  # under names that no other tool takes for a plain LoKr
        groups = {name: {f"rows_{key}": value for key, value in group.items()} for name, group in file.groups.items()}
        file = replace(file, groups=groups)
    if own_json:
        about[KEY] = json.dumps(_own_json(file), ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    tensorfile.write(path, tensorfile.cast(file.tensors, dtype), about)


def _own_json(file: AdapterFile) -> dict[str, Any]:
    assert file.spec is not None
    return {
        **without_paths(file.info),
        "version": __version__,
        "adapter": file.spec.model_dump(mode="json"),
        "family": file.family,
        "layers_per_block": file.layers_per_block,
        "layers": [layer.name for layer in file.layers],
        "widths": [[layer.in_features, layer.out_features] for layer in file.layers],
        "options": file.options,
    }


# ---- in ------------------------------------------------------------------------------------------------------------


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter file of this project, or a LoKr, LoRA or LoHa file of another tool.

    A file of this project is checked against its own description: nothing missing, nothing extra, every shape. Raises a
    one-line ValueError that starts with the path and says what is wrong.
    """
    tensors, metadata = tensorfile.read(path)
    try:
        groups = split_keys(tensors)
        if KEY not in metadata:
            return AdapterFile(path=str(path), groups=with_scales(Path(path), groups, metadata), metadata=metadata)
        return _described(str(path), groups, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _described(path: str, groups: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> AdapterFile:
    try:
        info = json.loads(metadata[KEY])
        spec = AdapterConfig.model_validate(info["adapter"])
        family, options = info["family"], dict(info["options"])
        per_block = int(info["layers_per_block"])
        is_known = family in FAMILIES
        describe = whole_module if spec.is_whole or not is_known else tables.describer(family)
        widths = [(int(width_in), int(width_out)) for width_in, width_out in info["widths"]]
        rows = [describe(name, *pair) for name, pair in zip(info["layers"], widths, strict=True)]
        layers = [row for row in rows if row is not None]
        if len(layers) < len(rows):
            raise ValueError(f"{info['layers'][rows.index(None)]} is not a layer of family {family}")
        shapes = {
            layer.name: ADAPTERS[spec.type].shapes(layer, options[layer.name], spec)
            for layer in layers
            if layer.name in options and layer.kind != "all"
        }
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        what = (
            f"{error.errors()[0]['loc']}" if isinstance(error, ValidationError) else f"{type(error).__name__} {error}"
        )
        raise ValueError(f"its JSON under {KEY!r} is damaged or of another version ({what})") from None
    if not is_known:
        raise ValueError(f"is for family {family!r}; this version knows {', '.join(FAMILIES)}")
    names = tables.file_names(family, [layer.name for layer in layers], per_block)
    groups = {
        name: {key.removeprefix("rows_"): value for key, value in group.items()} for name, group in groups.items()
    }
    if missing := [name for name in names if names[name] not in groups]:
        raise ValueError(f"layer {missing[0]} is missing ({len(missing)} of {len(names)} that it lists)")
    if extra := sorted(groups.keys() - names.values()):
        raise ValueError(f"layer {extra[0]} is extra: its own description does not list it ({len(extra)} such)")
    by_layer = {name: groups[names[name]] for name in names}
    options = {name: options[name] for name in names if name in options}  # JSON objects keep no order
    for layer in layers:
        if layer.name not in options:
            raise ValueError(f"its JSON under {KEY!r} has no options for layer {layer.name}")
        if layer.kind == "all":
            continue
        _check_shapes(layer, by_layer[layer.name], shapes[layer.name])
    own = {key: value for key, value in info.items() if key not in ("options", "widths")}
    return AdapterFile(path, by_layer, metadata, own, spec, family, layers, options, per_block)


def _check_shapes(layer: Layer, group: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    for suffix, shape in expected.items():
        if suffix not in group:
            raise ValueError(f"layer {layer.name}: tensor {suffix} is missing")
        if tuple(group[suffix].shape) != tuple(shape) and not (suffix == "alpha" and group[suffix].numel() == 1):
            raise ValueError(f"layer {layer.name}: {suffix} has shape {tuple(group[suffix].shape)}, not {tuple(shape)}")
    if extra := [suffix for suffix in group if suffix not in expected and suffix != "alpha"]:
        raise ValueError(f"layer {layer.name}: tensor {extra[0]} is extra")


def whole_module(name: str, *widths: int) -> Layer:
    """Return the row of a module that full fine-tuning of everything (`targets: all`) changes, whatever it is."""
    return Layer(name, 0, 0, "all", "all")


def identify(file: AdapterFile, layers: list[Layer], family: str, layers_per_block: int = 2) -> AdapterFile:
    """Return the file with its layers known, given all layers of the model that it is for.

    A file that describes itself is checked against the model instead. Raises ValueError for another family, unknown
    layers and shapes that do not fit.
    """
    layers = list({layer.name: layer for layer in [*layers, *tables.projections_of(layers)]}.values())
    by_name = {layer.name: layer for layer in layers}
    try:
        if file.layers:
            _check_same_model(file, by_name, family)
            return file
        known = tables.known_names(by_name, layers_per_block, family)
        cut = cut_joined(file.groups, layers, family)
        _refuse_unknown([name for name, path, _ in cut if path not in known], len(cut), family)
        _refuse_doubled([(name, known[path]) for name, path, _ in cut])
        groups = {known[path]: group for _, path, group in cut}
        found = [layer for layer in layers if layer.name in groups]
        spec, options, groups = describe_groups(found, groups)
        for layer in found:
            _check_shapes(layer, groups[layer.name], ADAPTERS[spec.type].shapes(layer, options[layer.name], spec))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return replace(
        file,
        groups=groups,
        spec=spec,
        family=family,
        layers=found,
        options=options,
        layers_per_block=layers_per_block,
    )


def _refuse_unknown(unknown: list[str], count: int, family: str) -> None:
    """Raise ValueError for layers that are not among those that can be adapted, whether of this model or of another."""
    if not unknown:
        return
    is_unet = family_named(family).parts.denoiser.cls.startswith("UNet")
    others = [name for name in unknown if is_unet and _OUTSIDE.search(name)]
    if len(others) == len(unknown):
        raise ValueError(
            f"layer {others[0]} is a convolution or another layer outside attention ({len(others)} of {count} are); "
            "only linear layers of transformer blocks and their proj_in and proj_out can be read"
        )
    raise ValueError(
        f"layer {unknown[0]} is not in this model of family {family!r} ({len(unknown)} of {count} are not): "
        "is the file for another model?"
    )


def _refuse_doubled(adapted: list[tuple[str, str]]) -> None:
    """Raise ValueError where two layers of a file, (name in it, layer of the model), are one of the model's."""
    seen: dict[str, str] = {}
    for name, layer in adapted:
        if layer in seen:
            raise ValueError(f"layers {seen[layer]} and {name} both adapt {layer}; a layer is adapted once in a file")
        seen[layer] = name


_OUTSIDE = re.compile(
    r"resnets|in_layers|out_layers|emb_layers|skip_connection|samplers|_op$|\.op$|_conv$|\.conv$|conv_?(in|out|shortcut|\d)"
    r"|time_emb|label_emb|add_embedding|norm|_blocks_\d+_0_|unet_out_[02]$"
)
"""Layers of a UNet that are not attention's or a feed-forward's, by the names of either layout."""


def _check_same_model(file: AdapterFile, by_name: dict[str, Layer], family: str) -> None:
    made_for = f"family {file.family!r} ({file.info.get('model', 'model unknown')})"
    if file.family != family:
        raise ValueError(f"is for {made_for}; this model is of family {family!r}")
    for layer in (layer for layer in file.layers if layer.kind != "all"):
        here = by_name.get(layer.name)
        if here is None:
            raise ValueError(f"is for {made_for}; this model has no layer {layer.name}")
        if (here.in_features, here.out_features) != (layer.in_features, layer.out_features):
            raise ValueError(
                f"is for {made_for}; layer {layer.name} is {layer.in_features} -> {layer.out_features} there "
                f"and {here.in_features} -> {here.out_features} in this model"
            )
