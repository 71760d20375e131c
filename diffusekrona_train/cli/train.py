"""`krona-train --config dog.yaml`: train; `--check`: say what would be done; `schema`, `init`: help with the YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusekrona_train.cli import door, enter

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help="Train a Kronecker adapter on a few photos."
)


@app.callback(invoke_without_command=True)
@door
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="The YAML of the run (krona-train init writes one).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides one field.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest state in the output folder.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from a state: runs/dog/resume/step-000100.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Say what the config would do, without training.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train an adapter: krona-train --config dog.yaml"""
    if context.invoked_subcommand:
        return
    if config is None:
        raise ValueError(
            "--config is missing: krona-train --config dog.yaml (krona-train init writes one to start from)"
        )
    from diffusekrona_train.config import load_config

    settings = load_config(config, set_ or [])
    if check:
        from diffusekrona_train.check import check_config

        check_config(settings)
        return
    from diffusekrona_train.train import train as run

    run(settings, resume=resume, resume_from=str(resume_from) if resume_from else None, overwrite=overwrite)


@app.command()
@door
def schema() -> None:
    """Print the JSON schema of a config, for editors."""
    from diffusekrona_train.config import schema as json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command()
@door
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the config.")] = Path("krona.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a config with every field, its default and what it means."""
    from diffusekrona_train.files import atomic

    if path.exists() and not force:
        raise ValueError(f"{path} is there already; give another name, or --force")
    with atomic(path) as temporary:
        temporary.write_text(starter(), encoding="utf-8")
    print(f"{path} written; set subject.images, subject.class and output, then: krona-train --config {path}")


START = """\
# What is not set here has the value in the comment. Check with: krona-train --config FILE --check
model: sdxl
subject:
  images: photos/dog
  class: dog
output: runs/dog
"""


def starter() -> str:
    """A config to begin with: the fields that everybody sets, then all others as comments."""
    from pydantic import BaseModel

    from diffusekrona_train.config import RunConfig

    lines = [START]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines.append(f"# {name}:   # {field.description}")
            lines += [f"#   {line}" for inner in section.model_fields.items() for line in _field(*inner)]
        elif name not in ("model", "output"):
            lines += [f"# {line}" for line in _field(name, field)]
    return "\n".join(lines) + "\n"


def _field(name: str, field: Any) -> list[str]:
    default = (
        "" if field.is_required() else json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)
    )
    return [f"{field.alias or name}: {default}   # {field.description}"]


def main() -> None:
    """The entry point of krona-train and of `python -m diffusekrona_train`."""
    enter(app)


if __name__ == "__main__":
    main()
