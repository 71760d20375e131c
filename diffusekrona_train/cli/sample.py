"""krona-sample: images from an adapter, from several, or from the bare base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusekrona_train.cli import PLAIN, enter, guarded, read_prompts_file
from diffusekrona_train.cli.terminal import Terminal

if TYPE_CHECKING:
    from diffusekrona_train.sampling import Call

app = typer.Typer(**PLAIN)

ModelGroup, MemoryGroup, PictureGroup, OutputGroup = "Model", "Memory", "Image", "Output"


@app.command()
@guarded
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
    each: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:STRENGTH for each prompt: its own adapter, one batch.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale",
            "--strength",
            help="Multiplies what the adapters add; 0 is the base model (1, or what krona-eval best chose).",
        ),
    ] = None,
    strength_schedule: Annotated[
        str | None,
        typer.Option(help='Strength over the noise levels: "0.3@0.25" is 0.3 in the first quarter of them, then 1.'),
    ] = None,
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
    text_encoder: Annotated[
        list[str] | None, typer.Option(help="File of a text encoder, for a model of ComfyUI's files; repeatable.")
    ] = None,
    model_config_dir: Annotated[str | None, typer.Option(help="Configs for a single-file model.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, for a --model whose file does not say it.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images for each prompt, with consecutive seeds.")] = 1,
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
    base: Annotated[bool, typer.Option("--base", help="Generate with the base model too, for comparison.")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="Write a labelled contact sheet too.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the images (default: pictures/ beside the adapter).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Generate images again that exist already.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated in one batch.")] = 1,
    noise: Annotated[
        str, typer.Option(help="prompt: noise from prompt and seed; seed: from the seed only, to compare prompts.")
    ] = "prompt",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    quantize: Annotated[str, typer.Option(help="Base model in none, nf4, int8 or fp8.")] = "none",
    no_fuse: Annotated[bool, typer.Option("--no-fuse", help="Keep the adapter apart from the weights.")] = False,
    offload: Annotated[
        str, typer.Option(help="none, blocks, model or sequential: what comes to the GPU only when needed.")
    ] = "none",
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode large images in tiles.")] = False,
    vae_slicing: Annotated[bool, typer.Option("--vae-slicing", help="Decode a batch one by one.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Generate images: krona-sample runs/dog "A [V] dog on the beach" --num-images 4 --sheet"""
    words = list(source_and_prompts or [])
    run = _take_source(words, bool(adapter or each), model)
    prompts = [*words, *(prompt or []), *read_prompts_file(prompts_file)]
    if not prompts:
        raise ValueError('no prompt is given; write krona-sample RUN_OR_FILE "A [V] dog on the beach"')
    wanted = {"steps": steps, "guidance": guidance, "scheduler": scheduler, "height": height, "width": width}
    wanted |= {"negative": negative or None, "noise": noise}
    wanted |= {"strength_schedule": "" if strength_schedule == "none" else strength_schedule}
    _check_early(wanted, sweep or [])

    from diffusekrona_train.common.process import as_found
    from diffusekrona_train.sampling import Memory, SampleRequest, open_call

    memory = Memory(dtype, quantize, offload, vae_tiling, vae_slicing, not no_fuse)
    request = SampleRequest(
        run, prompts, adapter or [], checkpoint, token or [], class_noun, model, revision, variant, vae,
        model_config_dir, range(seed, seed + num_images), scale, **wanted, sweeps=sweep or [], base=base,
        memory=memory, batch_size=batch_size, output=output or _home(run, each or adapter or []) / "pictures",
        overwrite=overwrite, prediction_type=prediction_type, each=each or [], text_encoders=text_encoder,
    )  # fmt: skip
    with as_found():
        call = open_call(request, Terminal(images=True))
    _generate(call, sheet)


def _generate(call: Call, sheet: bool) -> None:
    """Make what is missing, then say what is there."""
    from diffusekrona_train.sampling.plan import write_sheet

    folder = call.request.output
    assert folder is not None
    there = len(call.planned) - len(call.missing)
    written = sum(1 for _ in call.images())
    if call.rank == 0:
        if sheet:
            print(write_sheet(call.planned, folder))
        mine = f"{written} by this process" if call.world > 1 else f"{written} new"
        already = f"; {there} were there already" if there else ""
        print(f"{len(call.planned)} images in {folder} ({mine}{already})")


def _home(run: Path | None, adapters: list[str]) -> Path:
    """Return the run folder, the folder of the first adapter file, or the working folder."""
    from diffusekrona_train.sampling.session import parse_use

    if run is not None:
        return run if run.is_dir() else run.parent
    return parse_use(adapters[0])[0].parent if adapters else Path.cwd()


def _take_source(words: list[str], has_adapters: bool, model: str | None) -> Path | None:
    """Take the first word as run folder or file; with --adapter, or with --model and no such path, all words are
    prompts."""
    if not words or has_adapters:
        return None
    from diffusekrona_train.config.paths import user_path
    from diffusekrona_train.models.checkpointfile import SAFETENSORS

    path = Path(words[0]) if " " in words[0] else Path(user_path(words[0], "RUN_OR_FILE")).expanduser()
    if model is not None and not path.exists() and not words[0].lower().endswith(SAFETENSORS):
        return None
    if " " in words[0] and not path.exists():
        raise ValueError(f"{words[0]!r} is a prompt; put a run folder or adapter file before it, or give --model")
    words.pop(0)
    return path


def _check_early(wanted: dict[str, Any], sweeps: list[str]) -> None:
    """Raise ValueError for mistakes in numbers and names, before torch is imported for real work."""
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
    """Run the command krona-sample."""
    enter(app)


if __name__ == "__main__":
    main()
