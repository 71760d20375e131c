"""Measure several adapters and their base on the same prompts and seeds; the rule that chooses among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusekrona_train.common.device import pick_device
from diffusekrona_train.common.files import atomic
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.evaluation.bench import Bench
from diffusekrona_train.evaluation.inputs import Generated, without_words
from diffusekrona_train.evaluation.measure import Judges, Measured, measure
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.sampling.render import SampleSettings
from diffusekrona_train.sampling.session import Memory, Subject, check_base, fill_prompt, processes

KEPT_CLIP_T, MOST_DRIFT = 0.9, 0.5
RULE = (
    f"The best is the one with the highest DINO among those that keep at least {KEPT_CLIP_T:.0%} of the base model's "
    f"CLIP-T on the same prompts without the identifier and whose class drift is at most {MOST_DRIFT}; where none does "
    "both, the one with the highest product of DINO and CLIP-T."
)


@dataclass
class Plan:
    """What every adapter is measured with. encoders: names of CLIP and DINO (None: the defaults)."""

    seeds: Sequence[int] = (0, 1, 2, 3)
    prompts: Sequence[str] | None = None
    """With [V] and {class}; none takes the validation prompts of the run."""
    clip: str | None = None
    dino: str | None = None
    keep_identifier: bool = False
    strengths: Sequence[float] = (1.0,)
    """What `best_checkpoint` tries every checkpoint at."""
    batch_size: int = 1
    memory: Memory = field(default_factory=Memory)
    device: torch.device | None = None
    share: tuple[int, int] = (0, 1)
    wait: Callable[[], None] = lambda: None
    """Waits for the other processes, under `accelerate launch`."""
    progress: Progress = field(default_factory=Progress)

    def where(self) -> Any:
        return self.device or pick_device()

    def shared(self) -> Plan:
        """Return the same plan with this process' share of the images and its device, under `accelerate launch`."""
        crowd = processes()
        if crowd is None:
            return self
        share, device = (crowd.process_index, crowd.num_processes), pick_device(crowd.local_process_index)
        return replace(self, share=share, device=device, wait=crowd.wait_for_everyone)


@dataclass
class Outcome:
    """The adapters' measurements, the base model's, and which is best."""

    subjects: list[Subject]
    base: Measured
    adapted: list[Measured]
    best: int
    about: dict[str, str]
    class_pictures: list[list[Generated]]
    """Of the base, then of each adapter."""


def rule_allows(scores: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]]) -> bool:
    """Return whether an adapter still follows the prompts and has not drifted, as RULE says."""
    follows = scores["clip_t"]["value"] >= KEPT_CLIP_T * base["clip_t"]["value"]
    return follows and ("class_drift" not in scores or scores["class_drift"]["value"] <= MOST_DRIFT)


def choose(scores: Sequence[dict[str, dict[str, Any]]], base: dict[str, dict[str, Any]]) -> int:
    """Return the index of the best row by RULE."""
    allowed = [i for i, row in enumerate(scores) if rule_allows(row, base)]
    if allowed:
        return max(allowed, key=lambda i: scores[i]["dino"]["value"])
    return max(range(len(scores)), key=lambda i: scores[i]["dino"]["value"] * scores[i]["clip_t"]["value"])


def evaluate_adapters(
    source: ModelSource,
    subjects: Sequence[Subject],
    photos: Sequence[Image.Image],
    prompts: Sequence[str],
    class_prompt: str,
    settings: SampleSettings,
    folder: Path,
    plan: Plan,
) -> Outcome | None:
    """Generate with and measure every adapter and the base; None on all processes but the first.

    `prompts` hold [V] and {class}. The base model draws them without the identifier.
    """
    for subject in subjects:
        check_base(source, [subject])
    words = sorted({subject.token for subject in subjects if subject.token})
    asked = [[fill_prompt(prompt, [subject]) for prompt in prompts] for subject in subjects]
    plain = [without_words(prompt, words) for prompt in asked[0]]
    texts = [*(text for own in asked for text in own), *plain, class_prompt]
    bench = Bench(
        source,
        texts,
        settings,
        folder / "pictures",
        device=plan.where(),
        memory=plan.memory,
        batch_size=plan.batch_size,
        share=plan.share,
        progress=plan.progress,
    )
    drawn = [bench.pictures(one, own, plan.seeds, class_prompt) for one, own in zip(subjects, asked, strict=True)]
    base, class_base = bench.pictures(None, plain, plan.seeds, class_prompt)
    plan.wait()
    if plan.share[0] != 0:
        return None
    judges = Judges.open(
        plan.clip,
        plan.dino,
        toybox=source.identity in ("toybox", "toybox-flow"),
        device=plan.where(),
        cache=folder / "embeddings",
    )
    omit = () if plan.keep_identifier else words
    of_base = measure(judges, photos, base)
    adapted = [
        measure(judges, photos, own, identifiers=omit, class_base=class_base, class_adapted=changed)
        for own, changed in drawn
    ]
    best = choose([one.scores for one in adapted], of_base.scores)
    about = {**judges.describe(), **_settings_told(settings, plan, source), "class prompt": class_prompt}
    return Outcome(list(subjects), of_base, adapted, best, about, [class_base, *(changed for _, changed in drawn)])


def _settings_told(settings: SampleSettings, plan: Plan, source: ModelSource) -> dict[str, str]:
    return {
        "base model": source.identity,
        "sampling": f"{settings.steps} steps, guidance {settings.guidance:g}, {settings.height} × {settings.width}",
        "seeds": ", ".join(map(str, plan.seeds)),
        "identifier in CLIP-T's text": "kept" if plan.keep_identifier else "left out",
    }


def write_json(path: Path, value: object) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
