"""Compare several adapters of one subject: all metrics, parameters, size, and which differences are real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona_train.common.run_folder import step_of
from diffusekrona_train.config import RunConfig, load_config
from diffusekrona_train.data import collect
from diffusekrona_train.evaluation.adapters import (
    RULE,
    Outcome,
    Plan,
    evaluate_adapters,
    rule_allows,
    write_json,
)
from diffusekrona_train.evaluation.metrics import METRICS, difference
from diffusekrona_train.evaluation.page import write_evaluation_report
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling.render import SampleSettings
from diffusekrona_train.sampling.session import Subject, base_model_of, default_settings, subjects_of


def compare(
    files: Sequence[Path],
    photos: Sequence[Image.Image] | None,
    plan: Plan,
    output: Path,
    *,
    model: str | None = None,
    settings: dict[str, Any] | None = None,
    sort: str = "dino",
) -> dict[str, Any] | None:
    """Measure several adapters, best first by `sort`; writes scores.json and report.html to `output`.

    photos: of the subject; none takes those of the run that the first file lies in. Returns what scores.json holds;
    None on all processes but the first.
    """
    subjects = [subject for file in files for subject in subjects_of([(file, 1.0)])]
    run = next((found for file in files if (found := run_of(file))), None)
    config = load_config(run / "config.yaml") if run else None
    photos = photos or _photos_of_run(config, subjects[0])
    source = open_model(**base_model_of(subjects, model, run))
    noun = subjects[0].noun or "subject"
    prompts = plan.prompts or (config.validation.prompts if config else ["A [V] {class}", "A [V] {class} on the beach"])
    chosen = default_settings(source, subjects)
    chosen = SampleSettings(**{**vars(chosen), **{k: v for k, v in (settings or {}).items() if v is not None}})
    outcome = evaluate_adapters(source, subjects, photos, prompts, f"A {noun}", chosen, output, plan)
    if outcome is None:
        return None
    return _told(outcome, _names(files), output, sort)


def run_of(file: Path) -> Path | None:
    """Return the run folder of an adapter file, if it is in one."""
    for folder in list(file.resolve().parents)[:3]:
        if (folder / "config.yaml").is_file():
            return folder
    return None


def _photos_of_run(config: RunConfig | None, subject: Subject) -> list[Image.Image]:
    if config is None:
        raise ValueError(f"{subject.name} is not in a run folder: give the subject's photos with --photos")
    return [picture.open() for picture in collect(config).pictures]


def _names(files: Sequence[Path]) -> list[str]:
    """Return short names that differ: dog, dog step 300, or with the folder where two are alike."""
    names = []
    for file in files:
        step = step_of(file.parent)
        run = run_of(file)
        names.append(f"{run.name} step {step}" if run and step >= 0 else file.stem)
    alike = {name for name in names if names.count(name) > 1}
    names = [f"{file.resolve().parent.name}/{n}" if n in alike else n for file, n in zip(files, names, strict=True)]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def size_of(subject: Subject) -> dict[str, str]:
    """Return trained parameters and file size, as a table shows them."""
    count = sum(t.numel() for group in subject.file.groups.values() for key, t in group.items() if key != "alpha")
    return {"parameters": f"{count:,}", "size": f"{Path(subject.file.path).stat().st_size / 2**20:.2f} MiB"}


def _told(outcome: Outcome, names: list[str], output: Path, sort: str) -> dict[str, Any]:
    """Write scores.json and report.html of a comparison; return the former."""
    sign = -1 if METRICS[sort].higher_is_better else 1
    order = sorted(range(len(names)), key=lambda i: sign * outcome.adapted[i].scores[sort]["value"])
    winner = outcome.adapted[outcome.best]
    rows = []
    for i in order:
        one = outcome.adapted[i]
        gaps = {
            name: difference(winner.values[name], one.values[name]) for name in one.values if not METRICS[name].largest
        }
        row = {"name": names[i], "best": i == outcome.best, **size_of(outcome.subjects[i]), **one.as_json()}
        rows.append({**row, "allowed": rule_allows(one.scores, outcome.base.scores), "best_minus_this": gaps})
    result = {"rule": RULE, "rows": rows, "base": outcome.base.as_json(), "settings": outcome.about}
    write_json(output / "scores.json", result)
    _write_page(output / "report.html", outcome, rows, names, order)
    return result


def _write_page(path: Path, outcome: Outcome, rows: list[dict], names: list[str], order: list[int]) -> None:
    differing = ["", *(METRICS[name].title for name in rows[0]["best_minus_this"])]
    others = [[row["name"], *map(gap_text, row["best_minus_this"].values())] for row in rows if not row["best"]]
    table = [(row["name"], {**row["scores"], "parameters": row["parameters"], "size": row["size"]}) for row in rows]
    strips = []
    for i, base in enumerate(outcome.base.pictures):
        others_here = [(names[k], outcome.adapted[k].pictures[i].file) for k in order]
        strips.append((f"{base.prompt} (seed {base.seed})", [("base", base.file), *others_here]))
    for i, base in enumerate(outcome.class_pictures[0]):
        others_here = [(names[k], outcome.class_pictures[k + 1][i].file) for k in order]
        strips.append((f"class prompt: {base.prompt} (seed {base.seed})", [("base", base.file), *others_here]))
    write_evaluation_report(
        path,
        {
            "title": "Comparison",
            "summary": f"{len(rows)} adapters on the same {len(outcome.base.pictures)} prompts and seeds",
            "note": f"Mean ± standard deviation over images. {RULE}",
            "rows": [*table, ("base model", outcome.base.scores)],
            "best": next(i for i, row in enumerate(rows) if row["best"]),
            "extra": ("parameters", "size"),
            "seeds": seed_table([(row["name"], row["scores"]) for row in rows]),
            "differences": (differing, others) if others else None,
            "settings": outcome.about,
        },
        strips,
    )


def gap_text(gap: dict[str, Any]) -> str:
    """'+0.031 [0.010, 0.050], larger than chance'."""
    word = "larger than chance" if gap["larger_than_chance"] else "within chance"
    return f"{gap['value']:+.3f} [{gap['low']:.3f}, {gap['high']:.3f}], {word}"


def seed_table(rows: Sequence[tuple[str, dict[str, dict[str, Any]]]]) -> tuple[list[str], list[list[str]]]:
    """Return head and body of a table with DINO and CLIP-T of each seed."""
    seeds = list(rows[0][1]["dino"]["by_seed"])
    head = ["", *(f"{METRICS[name].title}, {seed}" for name in ("dino", "clip_t") for seed in seeds)]
    body = [
        [
            label,
            *(
                f"{scores[name]['by_seed'].get(seed, float('nan')):.3f}"
                for name in ("dino", "clip_t")
                for seed in seeds
            ),
        ]
        for label, scores in rows
    ]
    return head, body
