"""The documentation site: what is generated names every field and option, and links lead to pages that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from diffusekrona_train.config import RunConfig
from scripts.docs import COMMANDS, LINK, collect, commands, configuration, inside_only


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "site"
    collect(folder)
    return folder


def test_the_configuration_page_has_every_field_in_its_section():
    parts = re.split(r"^## (.*)$", configuration(), flags=re.MULTILINE)
    listed = {
        name: set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    for name, field in RunConfig.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            assert {inner.alias or key for key, inner in model.model_fields.items()} == listed[name]
        else:
            assert name in listed["Top level"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_page_has_every_option_that_help_prints(name):
    section = commands().split(f"\n## {name}\n")[1].split("\n## ")[0]
    app = importlib.import_module(f"diffusekrona_train.cli.{COMMANDS[name]}").app
    inner = [[command.name or command.callback.__name__] for command in app.registered_commands]
    for words in [[], *(inner if len(inner) > 1 else [])]:
        printed = CliRunner().invoke(app, [*words, "--help"]).output
        assert "╭" not in printed, "help is plain text everywhere"
        options = set(re.findall(r"^ +(--[a-z][\w-]*)", printed, re.MULTILINE)) - {"--help"}
        known = set(re.findall(r"--[a-z][\w-]*", section))
        assert options <= known and (options or words == [] or "schema" in words), printed


def test_links_lead_to_pages_of_the_site_and_no_other_file(pages):
    for page in pages.rglob("*.md"):
        for _, _, target in LINK.findall(page.read_text(encoding="utf-8")):
            path = target.partition("#")[0]
            assert not path or "://" in path or (page.parent / path).is_file(), f"{page.name}: {target}"


def test_a_link_out_of_the_documentation_becomes_text():
    given = (
        "[configs](../configs/sdxl.yaml), [how](evaluation.md#x), [web](https://example.org/a), ![p](images/toybox.png)"
    )
    wanted = "configs, [how](evaluation.md#x), [web](https://example.org/a), ![p](images/toybox.png)"
    assert inside_only(given, Path("paper.md")) == wanted


def test_a_page_that_is_missing_from_the_site_is_named(tmp_path):
    (tmp_path / "zensical.toml").write_text('[project]\nnav = [{ "Gone" = "gone.md" }]\n')
    with pytest.raises(ValueError, match=r"nav names gone\.md, which does not exist"):
        collect(tmp_path / "site", tmp_path / "zensical.toml")
