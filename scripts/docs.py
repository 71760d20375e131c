"""Collect the pages of the documentation in build/docs, where zensical builds the site from; none is committed twice.

    python -m scripts.docs && zensical build --strict      # the site, in build/site
    python -m scripts.docs configuration                   # one generated page as Markdown, on the terminal

The pages in docs/ are copied. index.md and the pages about the project are the files of the repository with their
links made to fit; configuration.md comes from the JSON schema of a config, commands.md from the typer commands.
"""

from __future__ import annotations

import importlib
import json
import posixpath
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changes.md": "CHANGELOG.md",
    "toybox.md": "diffusekrona_train/assets/toybox/README.md",
    "toybox-flow.md": "diffusekrona_train/assets/toybox-flow/README.md",
}
"""Page of the site -> file of the repository that it shows."""
COMMANDS = {
    "krona-train": "train",
    "krona-sample": "sample",
    "krona-eval": "evaluate",
    "krona-inspect": "inspect",
    "krona-convert": "convert",
    "krona-studio": "studio",
}
"""Command -> its module in `diffusekrona_train.cli`."""
NAMES = {"string": "text", "number": "number", "boolean": "true or false"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def main() -> None:
    if len(sys.argv) > 1:
        print(PAGES[f"{sys.argv[1]}.md"]())
        return
    collect(ROOT / "build" / "docs")


def collect(folder: Path, settings: Path = ROOT / "zensical.toml") -> None:
    """Write every page to `folder`, which is replaced; ValueError for a page of the navigation that does not exist."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    for page in folder.rglob("*.md"):
        page.write_text(inside_only(page.read_text(encoding="utf-8"), page.relative_to(folder)), encoding="utf-8")
    for name, make in PAGES.items():
        (folder / name).write_text(make(), encoding="utf-8")
    nav = tomllib.loads(settings.read_text(encoding="utf-8"))["project"]["nav"]
    for page in (page for entry in nav for page in entry.values()):
        if not (folder / page).is_file():
            raise ValueError(f"{settings.name}: nav names {page}, which does not exist")


def inside_only(markdown: str, page: Path) -> str:
    """A page of docs/ whose links out of docs/ are plain text: the site does not have those files."""

    def kept(found: re.Match[str]) -> str:
        target = found[3].partition("#")[0]
        if not target or "://" in target:
            return found[0]
        path = (ROOT / "docs" / page.parent / target).resolve()
        return found[0] if path.is_relative_to(ROOT / "docs") and not path.is_dir() else found[2]

    return LINK.sub(kept, markdown)


# ---- pages ----------------------------------------------------------------------------------------------------------


def copied(source: str) -> str:
    """A page from a file of the repository: links to docs/ and to other copied files lead to their pages."""
    pages, folder = {file: page for page, file in COPIED.items()}, posixpath.dirname(source)

    def moved(found: re.Match[str]) -> str:
        target, mark, anchor = found[3].partition("#")
        if target and "://" not in target:
            target = posixpath.normpath(posixpath.join(folder, target))
        known = pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if known is None:
            return found[0] if not target or "://" in target else found[2]
        return f"{found[1]}[{found[2]}]({known}{mark}{anchor})"

    return LINK.sub(moved, (ROOT / source).read_text(encoding="utf-8"))


def configuration() -> str:
    """Every section and field of a config, from its JSON schema."""
    from diffusekrona_train.config import schema

    whole = schema()
    sections = {name: _section_of(value, whole) for name, value in whole["properties"].items()}
    lines = [
        "# Configuration",
        "",
        "A run is one YAML file. Only `subject` and `output` are required. `--set train.steps=1000` changes any field",
        "for one run, and `krona-train schema > krona.schema.json` lets an editor complete them.",
        "",
        "## Top level",
        "",
        *_fields({name: field for name, field in whole["properties"].items() if sections[name] is None}, whole),
    ]
    for name, section in sections.items():
        if section is not None:
            lines += ["", f"## {name}", "", section.get("description", ""), "", *_fields(section["properties"], whole)]
    return "\n".join(lines) + "\n"


def _section_of(value: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any] | None:
    """The definition that a property of the top level refers to; None for a plain value."""
    names = [part["$ref"].rpartition("/")[2] for part in (value, *value.get("allOf", ())) if "$ref" in part]
    return whole["$defs"][names[0]] if names else None


def _fields(properties: dict[str, Any], whole: dict[str, Any]) -> Iterator[str]:
    yield "| field | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in properties.items():
        default = f"`{_shown(field['default'])}`" if "default" in field else "required"
        yield f"| `{name}` | {_type(field, whole)} | {default} | {_cell(field.get('description', ''))} |"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).strip('"')


def _type(field: dict[str, Any], whole: dict[str, Any]) -> str:
    """What a field takes, in words: 'integer, at least 1'."""
    if "$ref" in field:
        return _type(whole["$defs"][field["$ref"].rpartition("/")[2]], whole)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one, whole) for one in field["anyOf"]))
    kind: str = field.get("type", "any")
    if kind == "null":
        return "nothing"
    if kind == "array":
        return f"list of {_type(field['items'], whole)}" if "items" in field else "list"
    if kind == "object":
        inner = field.get("additionalProperties")
        return f"mapping to {_type(inner, whole)}" if isinstance(inner, dict) else "mapping"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {field[key]}" for key, word in words.items() if key in field]
    return ", ".join([NAMES.get(kind, kind), *bounds])


def commands() -> str:
    """Every command with its arguments and options, from the typer applications."""
    from typer.main import get_command

    lines = ["# Command line", "", "A mistake is one line and exit status 2; `--debug` shows the traceback.", ""]
    for name, module in COMMANDS.items():
        app = importlib.import_module(f"diffusekrona_train.cli.{module}").app
        lines += _command(get_command(app), name, 2)
    return "\n".join(lines) + "\n"


def _command(command: Any, name: str, level: int, parent: Any = None) -> Iterator[str]:
    context = command.make_context(name.rpartition(" ")[2], [], parent=parent, resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("#" * level + f" {name}", "", _text(command.help or ""), "", "```text", f"{name} {usage}", "```", "")
    rows = [row for row in (_parameter(one, context) for one in command.get_params(context)) if row]
    if rows:
        yield from ("| argument or option | default | meaning |", "|---|---|---|", *rows, "")
    for inner, child in getattr(command, "commands", {}).items():
        yield from _command(child, f"{name} {inner}", level + 1, context)


def _parameter(parameter: Any, context: Any) -> str | None:
    """One row of the table; None for --help."""
    if "--help" in parameter.opts:
        return None
    record = parameter.get_help_record(context)
    name = record[0] if parameter.param_type_name == "option" and record else parameter.metavar or parameter.name
    default = parameter.default
    silent = default is None or default is False or callable(default) or default in ([], "")
    shown = "required" if parameter.required else "" if silent else f"`{_cell(_plain(default))}`"
    return f"| `{_cell(name)}` | {shown} | {_cell(getattr(parameter, 'help', None) or '')} |"


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _text(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


PAGES: dict[str, Callable[[], str]] = {
    **{page: (lambda source=source: copied(source)) for page, source in COPIED.items()},
    "configuration.md": configuration,
    "commands.md": commands,
}
"""Page -> what makes its Markdown."""

if __name__ == "__main__":
    main()
