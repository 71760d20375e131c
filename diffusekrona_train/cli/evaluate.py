"""krona-eval: scores of images, of a suite of subjects, of several adapters, of the checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusekrona_train.cli import PLAIN, enter, guarded, read_prompts_file, with_options
from diffusekrona_train.cli.terminal import Terminal
from diffusekrona_train.config.strengths import LARGEST

app = typer.Typer(**PLAIN, no_args_is_help=True, help="Measure images, suites, adapters and checkpoints.")

Photos = Annotated[str | None, typer.Option(help="The subject's photos: folder, data set, or toybox:NAME.")]
Output = Annotated[Path | None, typer.Option(help="Folder of scores.json and report.html.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps, over the run's own.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance, over the run's own.")]
Model = Annotated[str | None, typer.Option(help="Base model, over the adapter's own: alias, hub name, folder, file.")]


@dataclass
class Judging:
    """Options of every evaluation."""

    keep_identifier: Annotated[
        bool, typer.Option("--keep-identifier", help="Leave the identifier in CLIP-T's text.")
    ] = False
    clip: Annotated[
        str | None, typer.Option(help="CLIP encoder: hub name, folder or toybox (openai/clip-vit-base-patch32).")
    ] = None
    dino: Annotated[
        str | None, typer.Option(help="DINO encoder: hub name, folder or toybox (facebook/dino-vits16).")
    ] = None
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


@dataclass
class Drawing(Judging):
    """Options of evaluations that generate the images themselves."""

    num_images: Annotated[int, typer.Option(min=1, help="Images for each prompt, with consecutive seeds.")] = 4
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated in one batch.")] = 1
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto"
    quantize: Annotated[str, typer.Option(help="Base model in none, nf4, int8 or fp8, where memory is short.")] = "none"
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode large images in tiles.")] = False


@dataclass
class Prompts:
    """Options of commands that take prompts."""

    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeat it for more.")] = None
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None

    def read(self) -> list[str]:
        return [*(self.prompt or []), *read_prompts_file(self.prompts_file)]


@app.command()
@guarded
@with_options
def images(
    folder: Annotated[Path, typer.Argument(help="Generated images, by any tool.")],
    photos: Photos = None,
    token: Annotated[
        list[str] | None, typer.Option(help="Identifier that CLIP-T's text leaves out; repeatable.")
    ] = None,
    output: Output = None,
    *,
    prompts: Prompts,
    judging: Judging,
) -> None:
    """Score a folder of images against photos: krona-eval images pictures --photos photos/dog --token sks"""
    if photos is None:
        raise ValueError("--photos is missing: name the folder of the subject's photos")
    from diffusekrona_train import evaluation as evaluate

    generated = evaluate.read_generated(folder, prompts.read())
    real = evaluate.photos_of(photos)
    plan = evaluate.Plan(
        clip=judging.clip, dino=judging.dino, keep_identifier=judging.keep_identifier, progress=Terminal()
    )
    place = output or folder / "evaluation"
    result = evaluate.evaluate_images(generated, real, plan, place, identifiers=token or [], name=folder.resolve().name)
    _print_rows([(result["name"], result["scores"])])
    print(place / "report.html")


@app.command()
@guarded
@with_options
def suite(
    name: Annotated[str, typer.Argument(metavar="SUITE", help="dreambench, toybox, or a YAML file.")],
    runs: Annotated[
        Path | None, typer.Option(help="Folder with a run for each subject (scripts/train_suite.py).")
    ] = None,
    generated: Annotated[Path | None, typer.Option(help="Folder with one folder of images for each subject.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder with a folder of photos for each subject.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    model: Model = None,
    output: Output = None,
    *,
    drawing: Drawing,
) -> None:
    """Score every subject of a suite, by subject and group: krona-eval suite toybox --runs runs/toybox"""
    if (runs is None) == (generated is None):
        raise ValueError("give either --runs (adapters; the images are generated here) or --generated (images)")
    from diffusekrona_train import evaluation as evaluate

    chosen = evaluate.load_suite(name)
    plan = _plan(drawing)
    place = output or (runs or generated or Path()) / "evaluation"
    result = evaluate.evaluate_suite(
        chosen,
        plan,
        place,
        runs=runs,
        generated=generated,
        photos=photos,
        model=model,
        settings={"steps": steps, "guidance": guidance},
    )
    if result is None:
        return
    rows = [(label, row["scores"]) for label, row in result["subjects"].items()]
    groups = [(f"group {label}", scores) for label, scores in result["groups"].items()]
    _print_rows([*rows, *groups, ("all subjects", result["all"])])
    if result["missing"]:
        print(f"not there: {', '.join(result['missing'])}")
    print(place / "report.html")


@app.command()
@guarded
@with_options
def compare(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter files or run folders of one subject.")],
    photos: Photos = None,
    sort: Annotated[
        str, typer.Option(help="Metric that orders the table: clip_i, clip_t, dino, class_drift, copy.")
    ] = "dino",
    steps: Steps = None,
    guidance: Guidance = None,
    model: Model = None,
    output: Output = None,
    *,
    prompts: Prompts,
    drawing: Drawing,
) -> None:
    """Compare adapters on the same prompts and seeds: krona-eval compare runs/dog runs/dog-lora"""
    from diffusekrona_train import evaluation as evaluate
    from diffusekrona_train.evaluation.metrics import METRICS
    from diffusekrona_train.sampling import session as studio

    if sort not in METRICS:
        raise ValueError(f"--sort {sort!r} is not a metric; use one of {', '.join(METRICS)}")
    files = [studio.find_adapter(path) for path in adapters]
    real = evaluate.photos_of(photos) if photos else None
    plan = _plan(drawing, prompts.read())
    place = output or Path("comparison")
    settings = {"steps": steps, "guidance": guidance}
    result = evaluate.compare(files, real, plan, place, model=model, settings=settings, sort=sort)
    if result is None:
        return
    labels = [f"{'* ' if row['best'] else '  '}{row['name']}" for row in result["rows"]]
    extra = [f"{row['parameters']:>12} {row['size']:>10}" for row in result["rows"]]
    scores = [row["scores"] for row in result["rows"]]
    _print_rows([*zip(labels, scores, strict=True), ("  base model", result["base"]["scores"])], [*extra, ""])
    for row in result["rows"]:
        if not row["best"]:
            print(f"best against {row['name']}, beyond chance: {_beyond_chance(row['best_minus_this'])}")
    print(f"* {result['rule']}")
    print(place / "report.html")


@app.command()
@guarded
@with_options
def best(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    strengths: Annotated[
        str, typer.Option(help="Strengths at which each checkpoint is tried, such as 0.6,0.8,1.")
    ] = "1",
    *,
    prompts: Prompts,
    drawing: Drawing,
) -> None:
    """Measure a run's checkpoints and name the best: krona-eval best runs/dog --strengths 0.6,0.8,1

    The strength of the best is written into its file; krona-sample then uses it unless --scale is given.
    """
    tried = _numbers("--strengths", strengths)
    from diffusekrona_train import evaluation as evaluate
    from diffusekrona_train.training.page import write_run_report

    plan = replace(_plan(drawing, prompts.read()), strengths=tried)
    result = evaluate.best_checkpoint(run, plan)
    if result is None:
        return
    write_run_report(run)
    at = [f", strength {row['strength']:g}" if len(tried) > 1 else "" for row in result["checkpoints"]]
    rows = [(f"step {row['step']}{where}", row["scores"]) for row, where in zip(result["checkpoints"], at, strict=True)]
    _print_rows([*rows, ("base model", result["base"]["scores"])])
    where = f", strength {result['strength']:g}" if tried != [1.0] else ""
    print(f"best: step {result['chosen_step']}{where}, {run / result['adapter']}")
    print(result["rule"])
    print(run / "report.html")


def _numbers(name: str, text: str) -> list[float]:
    """Read '0.6,0.8,1' as [0.6, 0.8, 1.0], each once; ValueError of one line."""
    try:
        found = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(0 < number <= LARGEST for number in found):
        raise ValueError(f"{name} {text!r}: give numbers above 0 and up to {LARGEST:g} with commas, such as 0.6,0.8,1")
    return found


def _beyond_chance(gaps: dict[str, Any]) -> str:
    """Return 'better in DINO, worse in CLIP-T': differences whose bootstrap interval leaves out 0."""
    from diffusekrona_train.evaluation.metrics import METRICS

    sure = {name: gap["value"] for name, gap in gaps.items() if gap["larger_than_chance"]}
    better = [METRICS[name].title for name, value in sure.items() if (value > 0) == METRICS[name].higher_is_better]
    worse = [METRICS[name].title for name in sure if METRICS[name].title not in better]
    parts = [f"{word} in {', '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]
    return "; ".join(parts) or "no difference"


def _plan(drawing: Drawing, prompts: list[str] | None = None) -> Any:
    """Return what evaluation is asked for, with this process' share under `accelerate launch`."""
    from diffusekrona_train import evaluation as evaluate
    from diffusekrona_train.sampling import session as studio

    return evaluate.Plan(
        seeds=list(range(drawing.seed, drawing.seed + drawing.num_images)),
        prompts=prompts or None,
        clip=drawing.clip,
        dino=drawing.dino,
        keep_identifier=drawing.keep_identifier,
        batch_size=drawing.batch_size,
        memory=studio.Memory(drawing.dtype, drawing.quantize, vae_tiling=drawing.vae_tiling),
        progress=Terminal(),
    ).shared()


def _print_rows(rows: list[tuple[str, dict[str, Any]]], extra: list[str] | None = None) -> None:
    """Return a table of value ± standard deviation over images."""
    from diffusekrona_train.evaluation.metrics import METRICS

    shown = [name for name in METRICS if any(name in scores for _, scores in rows)]
    width = max(len(label) for label, _ in rows) + 2
    print(" " * width + "".join(f"{METRICS[name].title:>16}" for name in shown))
    for i, (label, scores) in enumerate(rows):
        cells = [f"{scores[n]['value']:.3f} ± {scores[n]['std']:.3f}" if n in scores else "–" for n in shown]
        print(f"{label:<{width}}" + "".join(f"{cell:>16}" for cell in cells) + f"  {(extra or [''] * len(rows))[i]}")


def main() -> None:
    """Run the command krona-eval."""
    enter(app)


if __name__ == "__main__":
    main()
