"""Measure images of any origin, and suites of many subjects: scores by subject and group. Nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona_train.config import load_config
from diffusekrona_train.config.prompts import prompt_warnings
from diffusekrona_train.evaluation.adapters import Plan, write_json
from diffusekrona_train.evaluation.bench import Bench
from diffusekrona_train.evaluation.compare import seed_table
from diffusekrona_train.evaluation.inputs import (
    Generated,
    Suite,
    SuiteRow,
    photos_of,
    read_generated,
    without_words,
)
from diffusekrona_train.evaluation.measure import Judges, Measured, measure, pool
from diffusekrona_train.evaluation.page import write_evaluation_report
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling.render import SampleSettings
from diffusekrona_train.sampling.session import (
    base_model_of,
    check_base,
    default_settings,
    find_adapter,
    subjects_of,
)


def evaluate_images(
    generated: Sequence[Generated],
    photos: Sequence[Image.Image],
    plan: Plan,
    output: Path,
    *,
    identifiers: Sequence[str] = (),
    name: str = "pictures",
) -> dict[str, Any]:
    """Measure images made by any tool; write scores.json and report.html to `output`."""
    judges = Judges.open(plan.clip, plan.dino, toybox=False, device=plan.where(), cache=output / "embeddings")
    omit = () if plan.keep_identifier else ("[V]", *identifiers)
    _tell_unread(judges, generated, omit, plan)
    measured = measure(judges, photos, generated, identifiers=omit)
    kept = "kept" if plan.keep_identifier else f"left out ({', '.join(identifiers) or '[V]'})"
    about = {**judges.describe(), "photos": len(photos), "identifier in CLIP-T's text": kept}
    result = {"name": name, **measured.as_json(), "settings": about}
    write_json(output / "scores.json", result)
    by_prompt: dict[str, list[tuple[str, Path]]] = {}
    for picture in measured.pictures:
        by_prompt.setdefault(picture.prompt, []).append((f"seed {picture.seed}", picture.file))
    page = {
        "title": name,
        "summary": f"{len(generated)} images against {len(photos)} photos",
        "rows": [(name, measured.scores)],
        "seeds": seed_table([(name, measured.scores)]),
        "settings": about,
    }
    write_evaluation_report(output / "report.html", page, list(by_prompt.items()))
    return result


def evaluate_suite(
    suite: Suite,
    plan: Plan,
    output: Path,
    *,
    runs: Path | None = None,
    generated: Path | None = None,
    photos: Path | None = None,
    model: str | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Measure every subject of a suite that has a run (runs/NAME) or images (generated/NAME), by subject and group.

    Under `accelerate launch` each process takes its share of the subjects. Returns what scores.json holds; None on all
    processes but the first.
    """
    folder = runs or generated
    if folder is None or (runs and generated):
        raise ValueError("a suite needs either the folder of its runs (--runs) or of its images (--generated)")
    present = [row for row in suite.rows if (folder / row.name).is_dir()]
    if not present:
        raise ValueError(f"{folder} contains none of the suite's folders ({suite.rows[0].name}, …)")
    rank, world = plan.share
    for row in present[rank::world]:
        plan.progress.message(f"subject {row.name}")
        real = photos_of(suite.images_of(row, photos))
        if runs:
            measured, about = _measure_run(suite, row, real, runs / row.name, plan, output, model, settings)
        else:
            measured, about = _measure_pictures(suite, row, real, folder / row.name, plan, output)
        _keep(output / "subjects" / f"{row.name}.json", measured, about)
    plan.wait()
    if rank != 0:
        return None
    return _told(suite, present, output)


def _measure_run(
    suite: Suite,
    row: SuiteRow,
    photos: list[Image.Image],
    run: Path,
    plan: Plan,
    output: Path,
    model: str | None,
    settings: dict[str, Any] | None,
) -> tuple[Measured, dict[str, Any]]:
    subject = subjects_of([(find_adapter(run), 1.0)])[0]
    source = open_model(**base_model_of([subject], model, run))
    check_base(source, [subject])
    token = subject.token or row.token
    prompts = suite.prompts_of(replace_token(row, token))
    chosen = default_settings(source, [subject])
    if (run / "config.yaml").is_file():
        wanted = load_config(run / "config.yaml").validation
        chosen = replace(chosen, steps=wanted.steps, guidance=wanted.guidance)
    chosen = SampleSettings(**{**vars(chosen), **{k: v for k, v in (settings or {}).items() if v is not None}})
    class_prompt = f"a {row.class_noun}"
    bench = Bench(
        source,
        [*prompts, class_prompt],
        chosen,
        output / "pictures" / row.name,
        device=plan.where(),
        memory=plan.memory,
        batch_size=plan.batch_size,
        progress=plan.progress,
    )
    drawn, drifted = bench.pictures(subject, prompts, plan.seeds, class_prompt)
    _, class_base = bench.pictures(None, [], plan.seeds, class_prompt)
    del bench
    cache = output / "embeddings"
    judges = Judges.open(
        plan.clip, plan.dino, toybox=source.identity in ("toybox", "toybox-flow"), device=plan.where(), cache=cache
    )
    omit = () if plan.keep_identifier else (token,)
    measured = measure(judges, photos, drawn, identifiers=omit, class_base=class_base, class_adapted=drifted)
    sampling = f"{chosen.steps} steps, guidance {chosen.guidance:g}, {chosen.height} × {chosen.width}"
    return measured, {**judges.describe(), "base model": source.identity, "sampling": sampling}


def replace_token(row: SuiteRow, token: str) -> SuiteRow:
    return row.model_copy(update={"token": token})


def _measure_pictures(
    suite: Suite, row: SuiteRow, photos: list[Image.Image], folder: Path, plan: Plan, output: Path
) -> tuple[Measured, dict[str, Any]]:
    drawn = read_generated(folder, suite.prompts_of(row))
    judges = Judges.open(plan.clip, plan.dino, toybox=False, device=plan.where(), cache=output / "embeddings")
    omit = () if plan.keep_identifier else (row.token,)
    _tell_unread(judges, drawn, omit, plan)
    return measure(judges, photos, drawn, identifiers=omit), judges.describe()


def _tell_unread(judges: Judges, generated: Sequence[Generated], omit: Sequence[str], plan: Plan) -> None:
    """Warn of prompts that the judging CLIP does not read to their end."""
    for line in prompt_warnings((without_words(one.prompt, omit) for one in generated), [judges.clip.tokenizer]):
        plan.progress.warning(line)


def _keep(path: Path, measured: Measured, about: dict[str, Any]) -> None:
    pictures = [[str(p.file.resolve()), p.prompt, p.seed] for p in measured.pictures]
    kept = {"values": measured.values, "class_seeds": measured.class_seeds, "pictures": pictures, "about": about}
    write_json(path, kept)


def _read(path: Path) -> tuple[Measured, dict[str, Any]]:
    kept = json.loads(path.read_text(encoding="utf-8"))
    pictures = [Generated(Path(file), prompt, seed) for file, prompt, seed in kept["pictures"]]
    return Measured(pictures, kept["values"], kept["class_seeds"]), kept["about"]


def _told(suite: Suite, present: list[SuiteRow], output: Path) -> dict[str, Any]:
    """Collect the subjects' files into scores.json and report.html."""
    found = {row.name: _read(output / "subjects" / f"{row.name}.json") for row in present}
    measured = {name: one for name, (one, _) in found.items()}
    groups = list(dict.fromkeys(row.group for row in present))
    by_group = {g: pool([measured[row.name] for row in present if row.group == g]) for g in groups}
    missing = [row.name for row in suite.rows if row.name not in measured]
    about: dict[str, Any] = {"suite": suite.name, "source of the suite": suite.source, **found[present[0].name][1]}
    about |= {"missing subjects": ", ".join(missing) or "none"}
    everything = pool(list(measured.values()))
    result = {
        "suite": suite.name,
        "subjects": {name: {"scores": one.scores} for name, one in measured.items()},
        "groups": by_group,
        "all": everything,
        "missing": missing,
        "settings": about,
    }
    write_json(output / "scores.json", result)
    rows = [(name, one.scores) for name, one in measured.items()]
    page = {
        "title": f"Suite {suite.name}",
        "summary": f"{len(rows)} of {len(suite.rows)} subjects",
        "rows": [*rows, ("all subjects", everything)],
        "groups": list(by_group.items()) if len(by_group) > 1 else None,
        "seeds": seed_table([("all subjects", everything)]),
        "settings": about,
    }
    strips = [
        (name, [(p.prompt, p.file) for p in one.pictures if p.seed == one.pictures[0].seed][:8])
        for name, one in measured.items()
    ]
    write_evaluation_report(output / "report.html", page, strips)
    return result
