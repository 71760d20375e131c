"""`krona-train --config dog.yaml`: train; `--check`: say what would be done; `schema`, `init`: help with the YAML."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusekrona_train.cli import PLAIN, enter, guarded
from diffusekrona_train.cli.many import many
from diffusekrona_train.cli.terminal import Terminal, first_process

if TYPE_CHECKING:
    from diffusekrona_train.common.progress import TrainResult
    from diffusekrona_train.config import RunConfig

app = typer.Typer(**PLAIN, help="Train a Kronecker adapter on a few photos.")


@app.callback(invoke_without_command=True)
@guarded
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="The YAML of the run (krona-train init writes one).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one field.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest state in the output folder.")
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Continue from a state: runs/dog/resume/step-000100.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Show what the config would do, without training.")] = False,
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

        for title, lines in check_config(settings):
            for index, line in enumerate(lines):
                print(f"{title if index == 0 else '':<11} {line}")
        print("nothing was trained: run it without --check")
        return
    started_by = " ".join([f"krona-train --config {config}", *(f"--set {one}" for one in set_ or [])])
    run(settings, resume=resume, resume_from=resume_from, overwrite=overwrite, started_by=started_by)


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    overwrite: bool = False,
    started_by: str = "krona-train --config CONFIG.yaml",
) -> None:
    """Train with the run's events in the terminal; SystemExit(130 or 143) where a signal or a file stopped it."""
    from diffusekrona_train.training import Stopped, train

    terminal = Terminal()
    with terminal.listening():
        try:
            result = train(config, progress=terminal, resume=resume, resume_from=resume_from, overwrite=overwrite)
        except Stopped as stopped:
            if first_process():
                where = f"stopped after step {stopped.step} of {stopped.steps}; saved."
                print(f"{where} Continue with: {started_by} --resume", file=sys.stderr)
            terminal.leave()
        if first_process():
            print(what_next(config, result))
        if terminal.signum is not None:
            terminal.leave()


def what_next(config: RunConfig, result: TrainResult) -> str:
    """Return what a user can do with the adapter of a finished run."""
    from diffusekrona_train.adapters.formats import export_command, read_adapter

    minutes, seconds = divmod(round(result.seconds), 60)
    prompt = config.validation.prompts[0] if config.validation.prompts else config.subject.prompt
    prompt = prompt.replace("{class}", config.subject.class_noun)
    size = result.file.stat().st_size / 2**20
    command = export_command(read_adapter(result.file), result.file, config.model)
    readers = "ComfyUI, A1111, Forge and InvokeAI read the file as it is; for diffusers and others:"
    if config.adapter.type in ("terms", "dora", "oft"):
        readers = "no other tool reads this file; for those:" if command else "no other tool reads this file"
    return (
        f"done: {result.steps} steps in {minutes} min {seconds} s: {result.file} ({size:.1f} MiB)\n"
        f'try it:    krona-sample {result.file.parent} "{prompt}"\n'
        f"in code:   from diffusekrona_train import load_adapter\n"
        f'           load_adapter(pipe, "{result.file}")\n'
        f"elsewhere: {readers}" + (f"\n           {command}" if command else "")
    )


@app.command()
@guarded
def schema() -> None:
    """Print the JSON schema of a config, for editors."""
    from diffusekrona_train.config import schema as json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command()
@guarded
def init(
    photos: Annotated[Path, typer.Argument(help="Folder of the subject's photos, or toybox:NAME.")],
    class_noun: Annotated[str, typer.Option("--class", help="What the subject is, in a word or two: dog.")],
    path: Annotated[Path | None, typer.Option("--config", help="Where to write it (NAME.yaml here).")] = None,
) -> None:
    """Write a commented config that fits a folder of photos."""
    from diffusekrona_train.training.check.starter import write_init

    written = write_init(str(photos), class_noun, path)
    print(f"{written} written; look it over, then: krona-train --config {written} --check")


app.command()(many)


def main() -> None:
    """Run krona-train, also as `python -m diffusekrona_train`."""
    enter(app)


if __name__ == "__main__":
    main()
