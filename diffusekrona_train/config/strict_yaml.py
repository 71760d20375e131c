"""Read YAML as a config needs it: numbers are numbers, keys are unique, nothing is executed, nothing explodes.

PyYAML speaks YAML 1.1, where `1e-4` is text, `no` is false and `12:30` is 750; here the core schema of YAML 1.2 holds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from diffusekrona_train.common.files import decode_text

MAX_BYTES = 1_000_000


class StrictLoader(yaml.SafeLoader):
    """Mappings, lists, text, numbers, booleans and null; no aliases, no duplicate keys, no other tags."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor} is not taken; write the value out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.MarkedYAMLError(problem="expected a mapping", problem_mark=node.start_mark)
    result: dict = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)
        if key in result:
            raise yaml.MarkedYAMLError(problem=f"duplicate key {_short(key)}", problem_mark=key_node.start_mark)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _sequence(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list:
    return loader.construct_sequence(node, deep=True)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = loader.construct_scalar(node)
    if len(text) > 100:
        raise yaml.MarkedYAMLError(problem="a number of more than 100 digits", problem_mark=node.start_mark)
    if node.tag.endswith(":int"):
        return int(text)
    return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return loader.construct_scalar(node)


def _other(loader: yaml.SafeLoader, node: yaml.Node) -> NoReturn:
    raise yaml.MarkedYAMLError(
        problem=f"the tag {_short(node.tag)} is not taken; a config holds text, numbers, lists and mappings",
        problem_mark=node.start_mark,
    )


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    StrictLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)
StrictLoader.add_constructor(_TAG + "null", lambda loader, node: None)
StrictLoader.add_constructor(_TAG + "bool", lambda loader, node: node.value.lower() == "true")
StrictLoader.add_constructor(_TAG + "int", _number)
StrictLoader.add_constructor(_TAG + "float", _number)
StrictLoader.add_constructor(_TAG + "str", _text)
StrictLoader.add_constructor(_TAG + "seq", _sequence)
StrictLoader.add_constructor(_TAG + "map", _mapping)
StrictLoader.add_constructor(None, _other)  # type: ignore[arg-type]


def parse_yaml(text: str) -> Any:
    """Return the tree that `text` writes; ValueError of one line that says where the mistake is."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except RecursionError:
        raise ValueError("lists or mappings are nested too deeply for a config") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_describe(error, text)) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ValueError, TypeError, AttributeError) as error:
        # an explicit tag on text that is not of that kind: `!!int dog`, `!!str [a]`
        raise ValueError(f"a tag does not fit its value ({error})") from None


def _describe(error: yaml.MarkedYAMLError, text: str) -> str:
    mark, place = error.problem_mark or error.context_mark, ""
    if mark is not None:
        place = f"line {mark.line + 1}, column {mark.column + 1}: "
        if any("\t" in line[: mark.column + 1] for line in text.splitlines()[mark.line : mark.line + 1]):
            return f"line {mark.line + 1}: a tab in the indentation; YAML accepts only spaces"
    problem = " ".join((error.problem or error.context or "not YAML").split())
    if "escape" in problem:  # "C:\\Users\\me"
        problem += "; in double quotes a backslash begins an escape: use single quotes or forward slashes"
    return place + problem


def read_yaml(
    path: str | Path, needs: str = "a config needs at least subject (images, class) and output"
) -> dict[str, Any]:
    """Return the mapping in the file at `path` (at most 1 MB of UTF-8); ValueError of one line naming the file.

    `needs` is the message for an empty file.
    """
    path = Path(path)
    shown = _short(str(path), quote=False)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{shown}: is a link that leads nowhere")
    if not path.exists():
        near = sorted(path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"; there is {_short(str(near[0]), quote=False)}" if near else ""
        raise ValueError(f"{shown}: no such file{hint}")
    if not path.is_file():
        raise ValueError(f"{shown}: is {'a folder' if path.is_dir() else 'no regular file'}; a config is a YAML file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{shown}: {path.stat().st_size:,} bytes are too many for a config (at most {MAX_BYTES:,})")
    try:
        text = decode_text(path.read_bytes(), shown, "save the file as UTF-8")
    except OSError as error:
        raise ValueError(f"{shown}: cannot be read ({error.strerror})") from None
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if tree is None:
        raise ValueError(f"{shown}: is empty; {needs}")
    if not isinstance(tree, dict):
        raise ValueError(f"{shown}: holds a {type(tree).__name__} and not `key: value` lines")
    return tree


def _short(value: object, limit: int = 60, quote: bool = True) -> str:
    text = repr(value)
    text = text if quote or not isinstance(value, str) else text[1:-1]
    return text if len(text) <= limit or not quote else text[: limit - 1] + "…"
