"""`report.html` of a run folder, finished or not: made only from its files, so it can be written again at any time."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona_train.common.run_folder import adapter_file, read_metrics, step_name
from diffusekrona_train.config import RunConfig, load_config
from diffusekrona_train.data import Crop, collect, crop_pixels, plan_crops
from diffusekrona_train.evaluation.page import score_charts, score_table
from diffusekrona_train.report.charts import Line, heat_map, line_chart
from diffusekrona_train.report.page import Figure, Section, Strip, picture, write_page
from diffusekrona_train.training.curves import series, smoothed
from diffusekrona_train.training.status import jobs_of, sample_steps

SHOWN_PHOTOS = 8
REFRESH_SECONDS = 30


def write_run_report(run_folder: Path | str) -> Path:
    """Write `report.html` into a run folder and return its path; ValueError where the folder holds no run.

    Reads config.yaml, metrics.jsonl, samples/, evaluation/best.json and the newest adapter; whatever is missing is left
    out. While the run is unfinished the page reloads itself.
    """
    folder = Path(run_folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: no config.yaml in it; give the folder of a run, such as runs/dog")
    config = load_config(folder / "config.yaml")
    metrics = read_metrics(folder / "metrics.jsonl")
    best = _read_json(folder / "evaluation" / "best.json")
    steps = max((line["step"] for line in metrics), default=0)
    adapter = folder / f"{folder.name}.safetensors"
    sections = [
        _settings(config, metrics),
        _photos(config),
        _before_and_after(folder, config, best),
        _samples(folder, config, best),
        _curves(metrics, best),
        _scores(best),
        _learnt(adapter if adapter.is_file() else _newest_checkpoint(folder)),
        _commands(folder, config, best),
    ]
    done = adapter.is_file()
    state = f"finished after {config.train.steps} steps" if done else f"at step {steps} of {config.train.steps}"
    summary = f"“{_filled(config, config.subject.prompt)}” on {_base_name(config.model)}, {state}"
    page = folder / "report.html"
    kept = [section for section in sections if section is not None]
    return write_page(page, folder.resolve().name, summary, kept, refresh_seconds=None if done else REFRESH_SECONDS)


def _filled(config: RunConfig, prompt: str) -> str:
    return config.subject.fill(prompt)


def _base_name(model: str) -> str:
    """Return a hub name or alias as it is, of a local folder or file only the base name."""
    local = Path(model).expanduser().exists() or model.startswith((".", "/", "~"))
    return Path(model).name if local else model


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _settings(config: RunConfig, metrics: list[dict]) -> Section:
    adapter, train = config.adapter, config.train
    shape = {
        "krona": f"a1 = {adapter.a1}, a2 = {adapter.a2}",
        "full": "every weight of the chosen layers",
        "lokr": f"factor {adapter.factor}, rank {adapter.rank}",
    }.get(adapter.type, f"rank {adapter.rank}")
    if adapter.params or adapter.match_lora_rank:
        budget = f"{adapter.params:,} parameters" if adapter.params else f"LoRA rank {adapter.match_lora_rank}"
        shape = f"factors chosen within {budget}"
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    seconds = max((line["time"] for line in metrics if "time" in line), default=0.0)
    facts = [
        ("base model", _base_name(config.model)),
        ("subject", f"{config.subject.class_noun}, called “{config.subject.token}”"),
        ("adapter", f"{adapter.type}, {shape}, on {targets}{' and feed-forward' if adapter.ffn else ''}"),
        ("training", f"{train.steps} steps, learning rate {train.learning_rate:g} {train.schedule}, seed {train.seed}"),
        ("batch", f"{train.batch_size} × {train.gradient_accumulation} at {config.data.resolution} pixels"),
        ("prior preservation", config.prior.kind),
    ]
    if seconds:
        facts.append(("training time", f"{int(seconds // 60)} min {int(seconds % 60)} s"))
    return Section("What was trained", facts=facts)


def _photos(config: RunConfig) -> Section | None:
    """Return photos with the crop that was learnt from beneath each; a note where they are no longer there."""
    try:
        found = collect(config).pictures
        crops = plan_crops(found, config.data, config.train.seed)
        shown = list(zip(found, crops, strict=True))[:SHOWN_PHOTOS]
        photos = [picture(item.open(), item.name, side=344) for item, _ in shown]
        cut = [picture(Image.fromarray(crop_pixels(mine[0])), _crop_caption(mine[0]), side=344) for _, mine in shown]
    except (ValueError, OSError) as error:
        return Section("The subject", note=f"The photos can no longer be read ({type(error).__name__}).")
    more = len(found) - len(shown)
    note = f"{len(found)} photos" + (f", {more} of them not shown" if more else "")
    return Section("The subject", note=note, strips=[Strip("Photos", photos), Strip("What was learnt from", cut)])


def _crop_caption(crop: Crop) -> str:
    return f"{crop.size_hw[1]} × {crop.size_hw[0]}, {crop.share:.0%} of the photo" + (
        ", mirrored" if crop.flipped else ""
    )


def _sample(folder: Path, step: int, number: int, seed: int, caption: str, marked: bool = False) -> Figure | None:
    path = folder / "samples" / step_name(step) / f"{number:02d}-{seed}.png"
    try:
        return picture(path, caption, side=344, marked=marked)
    except OSError:
        return None


def _samples(folder: Path, config: RunConfig, best: dict | None) -> Section | None:
    steps, chosen = sample_steps(folder), (best or {}).get("chosen_step")
    strips = []
    for number, (prompt, seed) in enumerate(jobs_of(config)):
        figures = [_sample(folder, step, number, seed, _step_name(step, chosen), step == chosen) for step in steps]
        if any(figures):
            strips.append(Strip(f"{prompt} (seed {seed})", [figure for figure in figures if figure]))
    return Section("Samples by step", note="Fixed seeds: only the training differs.", strips=strips) if strips else None


def _step_name(step: int, chosen: int | None) -> str:
    name = "base (step 0)" if step == 0 else f"step {step}"
    return f"{name}, chosen" if step == chosen else name


def _before_and_after(folder: Path, config: RunConfig, best: dict | None) -> Section | None:
    steps, chosen = sample_steps(folder), (best or {}).get("chosen_step")
    if len(steps) < 2 or steps[0] != 0:
        return None
    after = chosen if chosen in steps else steps[-1]
    strips = []
    for number, (prompt, seed) in enumerate(jobs_of(config)):
        pair = [_sample(folder, 0, number, seed, "base"), _sample(folder, after, number, seed, f"step {after}")]
        if all(pair):
            strips.append(Strip(f"{prompt} (seed {seed})", [figure for figure in pair if figure]))
    return Section("Base model against adapter", strips=strips) if strips else None


def _curves(metrics: list[dict], best: dict | None) -> Section | None:
    x, loss = series(metrics, "loss")
    held_x, held = series(metrics, "validation_loss")
    chosen = (best or {}).get("chosen_step")
    charts = []
    if x:
        lines = [Line("", x, loss, faint=True), Line("training, smoothed", x, smoothed(loss))]
        lines += [Line("held-out noise", held_x, held, points=True)] if held else []
        charts.append(line_chart("Loss", lines, mark_x=chosen))
    for key, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm")):
        x, values = series(metrics, key)
        if x:
            charts.append(line_chart(title, [Line(key, x, values)]))
    return Section("Curves", charts=charts) if charts else None


def _scores(best: dict | None) -> Section | None:
    if not best:
        return None
    rows = best["checkpoints"]
    chosen = next((i for i, row in enumerate(rows) if row.get("step") == best.get("chosen_step")), None)
    charts = score_charts(rows, best.get("chosen_step"))
    table = score_table([(f"step {row['step']}", row["scores"]) for row in rows], best=chosen)
    return Section(
        "Measured", note=f"Chosen: step {best.get('chosen_step')}. {best['rule']}", charts=charts, tables=[table]
    )


def _newest_checkpoint(folder: Path) -> Path | None:
    found = sorted((folder / "checkpoints").glob("step-*/adapter.safetensors"))
    return found[-1] if found else None


def _learnt(adapter: Path | None) -> Section | None:
    """Return the norm of ΔW of each layer, blocks by projections, and the factor A of the layer that changed most."""
    if adapter is None:
        return None
    from diffusekrona_train.adapters import spectra
    from diffusekrona_train.adapters.formats import OVER_BASE, read_adapter

    file = read_adapter(adapter)
    if not file.layers or (file.spec is not None and file.spec.type in OVER_BASE):
        return None
    norms = {layer.name: spectra.norm(file.groups[layer.name]) for layer in file.layers}
    blocks: dict[str, dict[str, float]] = {}
    for layer in file.layers:
        place, column = layer.name.rsplit(".to_", 1)[0].split(".ff.")[0], layer.projection
        row = blocks.setdefault(_short(place), {})
        row[column] = math.hypot(row.get(column, 0.0), norms[layer.name])
    columns = [name for name in ("q", "k", "v", "o", "ffn") if any(name in row for row in blocks.values())]
    grid = [[row.get(column, math.nan) for column in columns] for row in blocks.values()]
    charts = [heat_map("Norm of the change, by block and projection", list(blocks), columns, grid)]
    most = max(norms, key=norms.__getitem__)
    factor = file.groups[most].get("lokr_w1")
    if factor is not None and min(factor.shape) > 1:
        names = [str(i) for i in range(factor.shape[0])], [str(i) for i in range(factor.shape[1])]
        if max(factor.shape) > 16:
            names = [""] * factor.shape[0], [""] * factor.shape[1]
        charts.append(heat_map("Factor A of the layer that changed most", *names, factor.float().tolist()))
    return Section("What the adapter learnt", note=f"Most changed: {most}", charts=charts)


def _short(place: str) -> str:
    """Shorten down_blocks.1.attentions.0.transformer_blocks.0.attn1 to down 1.0.0 self."""
    for long, brief in (
        ("_blocks", ""),
        ("_block", ""),
        (".attentions", ""),
        (".transformer", ""),
        ("attn1", "self"),
        ("attn2", "cross"),
    ):
        place = place.replace(long, brief)
    head, _, kind = place.rpartition(".") if place.endswith(("self", "cross")) else (place, "", "ffn")
    return f"{head.replace('.', ' ', 1)} {kind}"


def _portable(folder: Path) -> str:
    """Return the run folder as a command names it, without its location on this machine."""
    try:
        return folder.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return folder.resolve().name


def _commands(folder: Path, config: RunConfig, best: dict | None) -> Section:
    here = _portable(folder)
    adapter = f"{here}/{folder.name}.safetensors"
    chosen = (best or {}).get("chosen_step")
    if chosen is not None and chosen != config.train.steps:
        adapter = adapter_file(Path(here), chosen).as_posix()
    prompt = (config.validation.prompts or [config.subject.prompt])[0].replace("{class}", config.subject.class_noun)
    place, quoted = shlex.quote(adapter), shlex.quote(prompt)
    return Section(
        "Use it",
        note="" if "/" in here else f"From the folder that holds {folder.resolve().name}.",
        commands=[
            ("Generate images", f"krona-sample {place} {quoted}"),
            ("Measure its checkpoints", f"krona-eval best {shlex.quote(here)}"),
            ("See what it learnt", f"krona-inspect factors {place}"),
            *_export(folder / adapter.removeprefix(f"{here}/"), Path(adapter), config.model),
            (
                "In Python",
                f"from diffusekrona_train import load_adapter\nload_adapter(pipe, {adapter!r})",
            ),
        ],
    )


def _export(file: Path, shown: Path, model: str) -> list[tuple[str, str]]:
    if not file.is_file():
        return []
    from diffusekrona_train.adapters.formats import export_command, read_adapter

    command = export_command(read_adapter(file), shown, model)
    return [("For tools that read only LoRA", command)] if command else []
