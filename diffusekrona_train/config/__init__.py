"""A run's configuration: read from YAML, checked before torch is imported, written back complete.

    config = load_config("dog.yaml", ["train.steps=300"])

Imports only pydantic and YAML. The manual of all fields: `sections.py`, `training.py`, `run.py`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from diffusekrona_train.common.files import read_text
from diffusekrona_train.common.nearest import did_you_mean, nearest
from diffusekrona_train.config.base import parse_count
from diffusekrona_train.config.factors import check_factors
from diffusekrona_train.config.paths import user_path
from diffusekrona_train.config.run import EMBEDDED, MODEL_ALIASES, MODEL_DEFAULTS, RunConfig
from diffusekrona_train.config.sections import (
    PROJECTIONS,
    AdapterConfig,
    DataConfig,
    PriorConfig,
    SubjectConfig,
)
from diffusekrona_train.config.strict_yaml import parse_yaml, read_yaml
from diffusekrona_train.config.training import TrainConfig, ValidationConfig

__all__ = [
    "EMBEDDED",
    "MODEL_ALIASES",
    "MODEL_DEFAULTS",
    "PROJECTIONS",
    "AdapterConfig",
    "DataConfig",
    "PriorConfig",
    "RunConfig",
    "SubjectConfig",
    "TrainConfig",
    "ValidationConfig",
    "dump_config",
    "load_config",
    "make_config",
    "one_line",
    "parse_count",
    "parse_yaml",
    "read_yaml",
    "schema",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config in the YAML file `path` after `overrides` such as "train.steps=300"; ValueError of one line."""
    tree = read_yaml(path)
    try:
        return make_config(tree, overrides)
    except ValueError as error:
        raise ValueError(f"{repr(str(path))[1:-1]}: {error}") from None


def make_config(tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config of a tree as YAML gives it, with the model's defaults under its values; ValueError of one
    line."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        _override(tree, override)
    # a section whose lines are all commented out reads as null
    tree = {key: value for key, value in tree.items() if value is not None or key not in _sections()}
    try:
        config = RunConfig.model_validate(_merge(defaults_of(tree), tree))
    except ValidationError as error:
        raise ValueError(one_line(error)) from None
    check_factors(config)
    return config


def dump_config(config: RunConfig) -> str:
    """Return the complete YAML of `config`: what load_config reads back as an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=110)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema(by_alias=True)}


def defaults_of(tree: dict[str, Any]) -> dict[str, Any]:
    """Defaults that the models of a tree bring: how images are generated comes from the one that generates them."""
    defaults, sample = model_defaults(tree.get("model", "sdxl")), tree.get("sample")
    if isinstance(sample, dict) and sample.get("model"):
        own = model_defaults(sample["model"]).get("validation", {})
        return {**{name: values for name, values in defaults.items() if name != "validation"}, "validation": own}
    return defaults


def model_defaults(model: object) -> dict[str, Any]:
    """Return defaults that `model` brings, by alias, by hub name, or from the sample size that a local folder
    states."""
    if not isinstance(model, str):
        return {}
    for alias, hub_name in MODEL_ALIASES.items():
        if model in (alias, hub_name):
            return MODEL_DEFAULTS.get(alias, {})
    try:
        folder = Path(user_path(model, "model")).expanduser()
        unet, vae = (json.loads(read_text(folder / part / "config.json")) for part in ("unet", "vae"))
        resolution = int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"data": {"resolution": resolution}} if resolution >= 16 and resolution % 8 == 0 else {}


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key in `tree` to a YAML value."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {override!r} should read key=value, as train.steps=300 does")
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"--set {override!r}: {error}") from None
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--set {override!r}: {key} holds a value and not a section")
    tree[keys[-1]] = parsed


def one_line(error: ValidationError, root: type[BaseModel] = RunConfig) -> str:
    """Say in one line what pydantic found in a tree for the model `root`: field, value, what would be right.

    Two mistakes are named, and how many more there are.
    """
    lines = list(dict.fromkeys(_describe(item, root) for item in error.errors(include_url=False)))
    more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
    return "; ".join(lines[:2]) + more


def _describe(item: Any, root: type[BaseModel]) -> str:
    # a union adds the name of its branch, a mapping's key the word [key], to the place
    parts = [part for part in item["loc"] if isinstance(part, int) or re.fullmatch(r"[^\[\]]*", part)]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    place = _cut(repr(place)[1:-1])
    if item["type"] == "extra_forbidden":
        return _unknown_key(item["loc"], root)
    if item["type"] == "missing" and isinstance(parts[-1], int):  # the second of a pair
        about = _docstring(parts[:-1], root)
        return f"{place.rpartition('[')[0]}: {_cut(repr(item['input']))} lacks value {parts[-1] + 1}; it is: {about}"
    if item["type"] == "missing":
        return f"{place} is missing: {_docstring(parts, root)}"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        # the validators of a section begin with the field's name
        return f"{place}.{message}" if place else message
    if item["type"] == "model_type":
        return f"{place}: {_cut(repr(item['input']))} is not a section; write `key: value` lines under {place}"
    message = re.sub(r"^Input |^(List|Tuple|String|Value) ", "", item["msg"])
    if item["type"] == "literal_error":
        hint = did_you_mean(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]), 0.5)
        message += f"; {hint}" if hint else ""
    return f"{place}: {_cut(repr(item['input']))} {message}"


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _section(parts: Sequence[Any], root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the model that holds the field at `parts`; a number among them is a row of a list of models."""
    model = root
    for part in parts[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return None
        model = inner[0]
    return model


def _sections() -> dict[str, type[BaseModel]]:
    """Return the sections of a config by their key."""
    fields = RunConfig.model_fields.items()
    return {
        name: field.annotation
        for name, field in fields
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _unknown_key(parts: Sequence[Any], root: type[BaseModel]) -> str:
    key, place = str(parts[-1]), ".".join(map(str, parts))
    model = _section(parts, root)
    known = _keys(model) if model else []
    # of two `steps`, train's is meant
    sections = sorted(_sections().items(), key=lambda item: item[0] == "train") if root is RunConfig else []
    elsewhere = {name: f"{section}.{name}" for section, inner in sections for name in _keys(inner)}
    moved = [f"did you mean {elsewhere[name]}?" for name in nearest(key, elsewhere, 0.8)]
    hint = did_you_mean(key, known) or "".join(moved) or f"known are {', '.join(known)}"
    shown = _cut(repr(place)[1:-1]) if place.strip() else repr(place)
    return f"{shown} is not a known key; {hint}"


def _docstring(parts: Sequence[Any], root: type[BaseModel]) -> str:
    model = _section(parts, root)
    for name, field in model.model_fields.items() if model else ():
        if parts[-1] in (name, field.alias):
            return field.description or ""
    return ""
