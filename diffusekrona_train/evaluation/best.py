"""Find the best checkpoint of a run, by the rule of `adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusekrona_train.adapters.formats import read_adapter
from diffusekrona_train.adapters.formats.annotate import annotate
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.common.run_folder import step_of
from diffusekrona_train.config import load_config
from diffusekrona_train.data import collect
from diffusekrona_train.evaluation.adapters import (
    RULE,
    Outcome,
    Plan,
    choose,
    evaluate_adapters,
    rule_allows,
    write_json,
)
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling.render import settings_of
from diffusekrona_train.sampling.session import Memory, base_model_of, subjects_of


def best_checkpoint(
    run_folder: Path | str,
    plan: Plan | None = None,
    memory: Memory | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Measure every checkpoint of a run at the plan's strengths and choose one by RULE.

    None on all processes but the first. Without a plan: the run's own prompts, four seeds, shared over the processes
    there are, the base model held as `memory` says. Writes evaluation/best.json (chosen_step, strength, rule,
    checkpoints with their scores, base), and the strength into the chosen adapter's metadata, where krona-sample finds
    it.
    """
    folder = Path(run_folder)
    plan = plan or Plan(memory=memory or Memory(), progress=progress or Progress()).shared()
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: no config.yaml in it; give the folder of a run, such as runs/dog")
    files = sorted((folder / "checkpoints").glob("step-*/adapter.safetensors"))
    if not files:
        raise ValueError(f"{folder}: it has no checkpoints yet")
    config = load_config(folder / "config.yaml")
    uses = [(file, strength) for file in files for strength in dict.fromkeys(plan.strengths)]
    subjects = subjects_of(uses)
    photos = [picture.open() for picture in collect(config).pictures]
    source = open_model(**base_model_of(subjects, None, folder))
    settings = settings_of(config)
    prompts = plan.prompts or config.validation.prompts or [config.subject.prompt]
    class_prompt = config.subject.fill(config.prior.prompt)
    place = folder / "evaluation"
    outcome = evaluate_adapters(source, subjects, photos, prompts, class_prompt, settings, place, plan)
    if outcome is None:
        return None
    best = {"rule": RULE, **_told(outcome, uses, folder), "settings": outcome.about}
    write_json(place / "best.json", best)
    _recommend(folder, folder / best["adapter"], best["strength"])
    return best


def _told(outcome: Outcome, uses: list[tuple[Path, float]], folder: Path) -> dict[str, Any]:
    """Return what was chosen, and a row for each checkpoint with the scores at the strength that is best for it."""
    of_base, by_step = outcome.base.scores, {}
    for (file, strength), one in zip(uses, outcome.adapted, strict=True):
        allowed = rule_allows(one.scores, of_base)
        row = {"step": step_of(file.parent), "strength": strength, "scores": one.scores, "allowed": allowed}
        by_step.setdefault(row["step"], []).append(row)
    rows = []
    for own in by_step.values():
        chosen = own[choose([row["scores"] for row in own], of_base)]
        tried = [{"strength": row["strength"], "allowed": row["allowed"]} | _values(row["scores"]) for row in own]
        rows.append({**chosen, "strengths": tried} if len(own) > 1 else chosen)
    file, strength = uses[outcome.best]
    chosen = {"chosen_step": step_of(file.parent), "strength": strength, "adapter": file.relative_to(folder).as_posix()}
    return {**chosen, "checkpoints": rows, "base": {"scores": of_base}}


def _values(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: score["value"] for name, score in scores.items()}


def _recommend(folder: Path, chosen: Path, strength: float) -> None:
    """Write the strength into the chosen checkpoint, and into the run's last adapter where that is the same one.

    Only where it is not what the file says already: 1 is what a file without a word means.
    """
    files = [chosen]
    final = folder / f"{folder.resolve().name}.safetensors"
    if final.is_file() and read_adapter(final).info.get("step") == step_of(chosen.parent):
        files.append(final)
    for file in files:
        annotate(file, strength=None if strength == 1 else strength)
