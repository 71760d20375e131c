"""The best checkpoint of a run, by the rule of `adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusekrona_train.common.progress import Progress
from diffusekrona_train.common.run_folder import step_of
from diffusekrona_train.config import load_config
from diffusekrona_train.data import collect
from diffusekrona_train.evaluation.adapters import RULE, Plan, evaluate_adapters, rule_allows, write_json
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling.render import settings_of
from diffusekrona_train.sampling.session import Memory, base_model_of, subjects_of


def best_checkpoint(
    run_folder: Path | str,
    plan: Plan | None = None,
    quantize: str = "none",
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Measures every checkpoint of a run and chooses one by RULE; None on all processes but the first.

    Without a plan: the run's own prompts, four seeds, shared over the processes there are, the base model held in
    `quantize` (none, nf4, int8), and large pictures decoded in tiles where it is not none.
    Writes evaluation/best.json (chosen_step, rule, checkpoints with their scores, base).
    """
    folder, memory = Path(run_folder), Memory(quantize=quantize, vae_tiling=quantize != "none")
    plan = plan or Plan(memory=memory, progress=progress or Progress()).shared()
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: no config.yaml in it; give the folder of a run, such as runs/dog")
    files = sorted((folder / "checkpoints").glob("step-*/adapter.safetensors"))
    if not files:
        raise ValueError(f"{folder}: it has no checkpoints yet")
    config = load_config(folder / "config.yaml")
    subjects = [subject for file in files for subject in subjects_of([(file, 1.0)])]
    photos = [picture.open() for picture in collect(config).pictures]
    source = open_model(**base_model_of(subjects, None, folder))
    settings = settings_of(config)
    prompts = plan.prompts or config.validation.prompts or [config.subject.prompt]
    class_prompt = config.subject.fill(config.prior.prompt)
    place = folder / "evaluation"
    outcome = evaluate_adapters(source, subjects, photos, prompts, class_prompt, settings, place, plan)
    if outcome is None:
        return None
    steps = [step_of(file.parent) for file in files]
    rows = [
        {"step": step, "scores": one.scores, "allowed": rule_allows(one.scores, outcome.base.scores)}
        for step, one in zip(steps, outcome.adapted, strict=True)
    ]
    adapter = files[outcome.best].relative_to(folder).as_posix()
    best = {"chosen_step": steps[outcome.best], "adapter": adapter, "rule": RULE, "checkpoints": rows}
    best |= {"base": {"scores": outcome.base.scores}, "settings": outcome.about}
    write_json(place / "best.json", best)
    return best
