"""Config fields as a form shows them: made from the schema, so that a new field is there with its docstring."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusekrona_train.config.run import RunConfig
from diffusekrona_train.config.strict_yaml import parse_yaml

PREFIX = "set:"
"""Begins the name of a form field: set:train.steps."""
ASKED_ELSEWHERE = {"model", "output", "subject.images", "subject.files", "subject.class", "subject.token"}
DATA_SETS = {"subject.limit", "subject.split", "subject.image_column", "subject.caption_column", "subject.caption_key"}
"""About data sets and metadata files; the photos here were dropped."""


@dataclass(frozen=True)
class Field:
    """One field: its dotted key, what it means, its default as YAML, and its choices (none: free text)."""

    key: str
    help: str
    default: str
    choices: tuple[str, ...] = ()
    number: bool = False

    @property
    def name(self) -> str:
        """Return its name in the form."""
        return PREFIX + self.key

    @property
    def title(self) -> str:
        """Return the last part of its key in words."""
        return self.key.rpartition(".")[2].replace("_", " ")


@dataclass(frozen=True)
class Group:
    """A section of the config."""

    title: str
    help: str
    fields: tuple[Field, ...]


def groups_of(config: RunConfig) -> list[Group]:
    """Return the sections and fields of the schema, each with the value that `config` would give it."""
    whole = RunConfig.model_json_schema(by_alias=True)
    values = config.model_dump(mode="json", by_alias=True)
    top, groups = [], []
    for name, value in whole["properties"].items():
        inner = whole["$defs"].get(value.get("$ref", "").rpartition("/")[2])
        if inner is None or "properties" not in inner:
            top += _fields("", {name: value}, values)
        else:
            fields = tuple(_fields(f"{name}.", inner["properties"], values[name]))
            groups.append(Group(name, value.get("description", ""), fields))
    return [*groups, Group("model", "The base model's files.", tuple(top))]


def _fields(prefix: str, properties: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Field]:
    for name, spec in properties.items():
        key = prefix + name
        if key in ASKED_ELSEWHERE | DATA_SETS:
            continue
        kinds = {spec.get("type"), *(one.get("type") for one in spec.get("anyOf", ()))}
        choices = tuple(map(str, spec.get("enum", ()))) or (("true", "false") if kinds == {"boolean"} else ())
        default = json.dumps(values.get(name), ensure_ascii=False)
        plain = default.strip('"') if isinstance(values.get(name), str) else "" if default == "null" else default
        yield Field(key, spec.get("description", ""), plain, choices, kinds & {"integer", "number"} != set())


def overrides_of(fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the tree of the `set:` fields that are filled in, read as YAML; ValueError where one is none."""
    tree: dict[str, Any] = {}
    for name, text in fields.items():
        if not name.startswith(PREFIX) or not text.strip():
            continue
        key = name.removeprefix(PREFIX)
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        section, dot, inner = key.partition(".")
        if dot:
            tree.setdefault(section, {})[inner] = value
        else:
            tree[key] = value
    return tree
