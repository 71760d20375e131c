"""krona-sample: pictures from an adapter, or from several, or from the bare base model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusekrona_train.cli import PLAIN, door, enter, read_prompts_file

app = typer.Typer(**PLAIN)

ModelGroup, MemoryGroup, PictureGroup, OutputGroup = "Model", "Memory", "Picture", "Output"


@app.command()
@door
def sample(
    source_and_prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN_OR_FILE] [PROMPT]...", help="A run folder or adapter file, then prompts with [V]."
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat it for more.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Step of a run's checkpoint instead of its last adapter.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:STRENGTH; repeat it for [V1], [V2] … in this order.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Multiplies what the adapters add; 0 is the base model.")] = 1.0,
    token: Annotated[
        list[str] | None, typer.Option(help="Identifier that [V] stands for, over the file's own.")
    ] = None,
    class_noun: Annotated[str | None, typer.Option("--class", help="Noun that {class} stands for.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model, over the file's own: alias, hub name, folder, file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of --model.")] = None,
    variant: Annotated[str | None, typer.Option(help="Weight variant of --model, such as fp16.")] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE: hub name, folder or file.")] = None,
    model_config_dir: Annotated[str | None, typer.Option(help="Configs for a single-file model.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, with seeds that count up.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    steps: Annotated[int | None, typer.Option(help="Sampling steps (50; toybox 25).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance (7.5; toybox 4).")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="ddim, ddpm, pndm, euler, euler_a, heun, dpm++, unipc …")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels (the adapter's training resolution).")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels (the adapter's training resolution).")] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="OPTION=v1,v2: all values of an option; repeatable.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Draw the base model beside the adapter.")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="Write a labelled contact sheet too.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of the pictures (pictures/ beside the adapter).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Draw pictures again that are there.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 1,
    noise: Annotated[
        str, typer.Option(help="prompt: noise by prompt and seed; seed: by seed alone, to compare prompts.")
    ] = "prompt",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    quantize: Annotated[str, typer.Option(help="Base model in none, nf4 or int8.")] = "none",
    no_fuse: Annotated[bool, typer.Option("--no-fuse", help="Keep the adapter apart from the weights.")] = False,
    offload: Annotated[
        str, typer.Option(help="none, model or sequential: move parts to the GPU when needed.")
    ] = "none",
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode large pictures in tiles.")] = False,
    vae_slicing: Annotated[bool, typer.Option("--vae-slicing", help="Decode a batch one by one.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Draw pictures: krona-sample runs/dog "A [V] dog on the beach" --num-images 4 --sheet"""
    words = list(source_and_prompts or [])
    run = _take_source(words, bool(adapter), model)
    prompts = [*words, *(prompt or []), *read_prompts_file(prompts_file)]
    if not prompts:
        raise ValueError('no prompt is given; write krona-sample RUN_OR_FILE "A [V] dog on the beach"')
    wanted = {"steps": steps, "guidance": guidance, "scheduler": scheduler, "height": height, "width": width}
    wanted |= {"negative": negative or None, "noise": noise}
    _check_early(wanted, sweep or [])

    from diffusekrona_train.sampling import session as studio

    memory = studio.Memory(dtype, quantize, offload, vae_tiling, vae_slicing, not no_fuse)
    if checkpoint is not None and run is None:
        raise ValueError(f"--checkpoint {checkpoint} needs a run folder before the prompts")
    uses = [(studio.find_adapter(run, checkpoint), 1.0)] if run else []
    uses += [studio.parse_use(text) for text in adapter or []]
    subjects = studio.subjects_of(uses, token or [], class_noun)
    found = studio.base_model_of(subjects, model, run if run and run.is_dir() else None)
    given = {"revision": revision, "variant": variant, "vae": vae, "model_config_dir": model_config_dir}
    found |= {name: value for name, value in given.items() if value is not None}
    home = run if run and run.is_dir() else uses[0][0].parent if uses else Path.cwd()
    folder = output or home / "pictures"
    drawn = {"prompts": prompts, "seeds": range(seed, seed + num_images), "wanted": wanted, "sweeps": sweep or []}
    _draw(subjects, found, memory, drawn, folder, scale, base, sheet, batch_size, overwrite)


def _draw(
    subjects: list,
    found: dict[str, Any],
    memory: Any,
    drawn: dict[str, Any],
    folder: Path,
    scale: float,
    base: bool,
    sheet: bool,
    batch_size: int,
    overwrite: bool,
) -> None:
    """Plan, draw this process' share, and let the first process write the manifest and the sheet."""
    from dataclasses import replace

    from diffusekrona_train.common import device as devices
    from diffusekrona_train.config.prompts import prompt_warnings
    from diffusekrona_train.models import open_model
    from diffusekrona_train.sampling import plan as pictures
    from diffusekrona_train.sampling import session as studio
    from diffusekrona_train.training.check.identifier import local_tokenizers

    source = open_model(**found)
    studio.check_base(source, subjects)
    settings = studio.default_settings(source, subjects)
    settings = replace(settings, **{name: value for name, value in drawn["wanted"].items() if value is not None})
    crowd = studio.processes()
    device = devices.pick_device(crowd.local_process_index if crowd else 0)
    rank, world = (crowd.process_index, crowd.num_processes) if crowd else (0, 1)

    prompts = list(dict.fromkeys(studio.fill_prompt(text, subjects) for text in drawn["prompts"]))
    negative = studio.fill_prompt(settings.negative, subjects)
    planned = pictures.plan_pictures(
        prompts,
        drawn["seeds"],
        replace(settings, negative=negative),
        scale=scale if subjects else None,
        sweeps=[pictures.parse_sweep(text) for text in drawn["sweeps"]],
        with_base=base,
        about=studio.about_models(source, subjects, devices.pick_dtype(memory.dtype, device), memory),
    )
    missing = [item for item in planned if overwrite or not (folder / item.file).exists()]
    written = 0
    readers = local_tokenizers(source) or (source.load("tokenizers")["tokenizers"] if missing else [])
    planned = [_with_unread(item, readers) for item in planned]
    if rank == 0:
        warnings = [warning for text in prompts for warning in studio.missing_identifiers(text, subjects)]
        warnings += prompt_warnings([*prompts, negative], readers)
        for warning in (*studio.shared_identifiers(subjects), *warnings):
            print(f"warning: {warning}", file=sys.stderr)
    if missing:
        texts = [text for item in planned for text in (item.prompt, item.settings.negative)]
        room = studio.Studio(source, subjects, texts, memory, device)
        written = pictures.draw(
            planned,
            folder,
            room.painter([item.scale for item in planned], keep=False),
            batch_size=batch_size,
            overwrite=overwrite,
            rank=rank,
            world=world,
        )
    if crowd:
        crowd.wait_for_everyone()
    if rank == 0:
        pictures.settle_manifest(planned, folder)
        if sheet:
            print(pictures.write_sheet(planned, folder))
        there = f"; {len(planned) - len(missing)} were there already" if len(missing) < len(planned) else ""
        mine = f"{written} by this process" if crowd else f"{written} new"
        print(f"{len(planned)} pictures in {folder} ({mine}{there})")


def _with_unread(item: Any, tokenizers: list) -> Any:
    """The planned picture with the end of its prompt in its record, where no text encoder reads it."""
    from dataclasses import replace

    from diffusekrona_train.config.prompts import unread_part

    tail, _, _ = unread_part(item.prompt, tokenizers)
    return replace(item, record={**item.record, "not_read": tail}) if tail else item


def _take_source(words: list[str], has_adapters: bool, model: str | None) -> Path | None:
    """The first word as run folder or file; with --adapter, or with --model and no such path, all words are prompts."""
    if not words or has_adapters:
        return None
    from diffusekrona_train.config.paths import user_path

    path = Path(words[0]) if " " in words[0] else Path(user_path(words[0], "RUN_OR_FILE")).expanduser()
    if model is not None and not path.exists() and not words[0].endswith(".safetensors"):
        return None
    if " " in words[0] and not path.exists():
        raise ValueError(f"{words[0]!r} is a prompt; put a run folder or adapter file before it, or give --model")
    words.pop(0)
    return path


def _check_early(wanted: dict[str, Any], sweeps: list[str]) -> None:
    """Mistakes in numbers and names, before torch is imported for real work."""
    from diffusekrona_train.models.schedulers import check_scheduler
    from diffusekrona_train.sampling.plan import parse_sweep
    from diffusekrona_train.sampling.render import SampleSettings

    settings = {name: value for name, value in wanted.items() if value is not None}
    SampleSettings(**settings)
    swept = [parse_sweep(text) for text in sweeps]
    for name, values in swept:
        for value in values:
            if name not in ("scale", "seed"):
                SampleSettings(**{name: value})
    names = [wanted["scheduler"], *(value for name, values in swept if name == "scheduler" for value in values)]
    for name in filter(None, names):
        check_scheduler(name)


def main() -> None:
    """Entry point of the command krona-sample."""
    enter(app)


if __name__ == "__main__":
    main()
