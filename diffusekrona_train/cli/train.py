"""`krona-train --config dog.yaml`: train; `--check`: say what would be done; `schema`, `init`: help with the YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diffusekrona_train.cli import PLAIN, door, enter

app = typer.Typer(**PLAIN, help="Train a Kronecker adapter on a few photos.")


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
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
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
        from diffusekrona_train.training.check import check_config

        check_config(settings)
        return
    from diffusekrona_train.training import train as run

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
    photos: Annotated[Path, typer.Argument(help="Folder of the subject's photos, or toybox:NAME.")],
    class_noun: Annotated[str, typer.Option("--class", help="What the subject is, in a word or two: dog.")],
    path: Annotated[Path | None, typer.Option("--config", help="Where to write it (NAME.yaml here).")] = None,
) -> None:
    """Write a commented config that fits a folder of photos."""
    from diffusekrona_train.training.check.starter import write_init

    written = write_init(str(photos), class_noun, path)
    print(f"{written} written; look it over, then: krona-train --config {written} --check")


def main() -> None:
    """The entry point of krona-train and of `python -m diffusekrona_train`."""
    enter(app)


if __name__ == "__main__":
    main()
