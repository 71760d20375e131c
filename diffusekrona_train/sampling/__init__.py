"""Generate images: the one sampling path, a base model with its adapters, and the plan of one call.

for one in sample("runs/dog", ["A [V] dog on the beach"], seeds=range(4)):
    one.image.save(f"{one.seed}.png")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusekrona_train.common.device import free, pick_device
from diffusekrona_train.common.process import as_found, step_by_step
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.config.prompts import prompt_warnings, unread_part
from diffusekrona_train.models import ModelSource, open_model
from diffusekrona_train.models.contracts import Loaded
from diffusekrona_train.models.schedulers import check_replaces
from diffusekrona_train.models.tokenizers import local_tokenizers
from diffusekrona_train.sampling import plan, session
from diffusekrona_train.sampling.each import EachStudio
from diffusekrona_train.sampling.session import Memory, Studio, Subject

__all__ = ["Call", "Memory", "SampleRequest", "Sample", "open_call", "sample"]


@dataclass(frozen=True)
class Sample:
    """One generated image."""

    image: Image.Image
    prompt: str
    """With its identifier filled in."""
    seed: int
    scale: float | None
    """What multiplied the adapters; None: the base model without them."""
    file: Path | None
    """Where it was saved, in a call with an `output`."""


@dataclass(frozen=True)
class SampleRequest:
    """What one call generates: every prompt with every seed, and every value of what is swept."""

    source: str | Path | None
    """A run folder or an adapter file; None: only the adapters below, or the base model."""
    prompts: Sequence[str]
    """[V] is replaced by the identifier token ([V1], [V2] … with several adapters), {class} for the class noun."""
    adapters: Sequence[str] = ()
    """Further adapters: FILE or FILE:STRENGTH."""
    checkpoint: int | None = None
    """Step of a run's checkpoint instead of its last adapter."""
    tokens: Sequence[str] = ()
    """Identifiers, over those that the files name."""
    class_noun: str | None = None
    model: str | None = None
    """Base model, over the file's own: alias, hub name, folder or single file."""
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    model_config_dir: str | None = None
    seeds: Sequence[int] = (0,)
    scale: float | None = None
    """Multiplies what the adapters add; 0 is the base model. None: 1, or the strength that the file recommends."""
    strength_schedule: str | None = None
    """How the strength changes over the noise levels, such as 0.3@0.25: 0.3 in the first quarter, then 1."""
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    height: int | None = None
    """In pixels; if omitted, as large as the adapter was trained. `width` likewise."""
    width: int | None = None
    negative: str | None = None
    noise: str = "prompt"
    """What the noise depends on: `prompt` and seed, or only `seed`, to compare prompts at one seed."""
    sweeps: Sequence[str] = ()
    """OPTION=v1,v2: all values of an option."""
    base: bool = False
    """Generate with the base model too, beside the adapter."""
    memory: Memory = field(default_factory=Memory)
    """How the model is held."""
    batch_size: int = 1
    output: Path | None = None
    """Folder that the images are saved to; those that it holds already are not made again."""
    overwrite: bool = False
    """Make them again nevertheless."""
    prediction_type: str | None = None
    """epsilon or v_prediction, of a single-file model that does not say it."""
    each: Sequence[str] = ()
    """FILE or FILE:STRENGTH for each prompt, in their order: every prompt has an adapter of its own, and images of
    different adapters are generated in one batch. Adapters of one type and one set of shapes."""
    text_encoders: Sequence[str] | None = None
    """Files of text encoders instead of the model's own, in any order."""


def sample(
    source: str | Path | None, prompts: str | Sequence[str], *, progress: Progress | None = None, **options: Any
) -> Iterator[Sample]:
    """Yield images of an adapter (a run folder or a file) as they are made; `options` are the fields of SampleRequest.

    ValueError of one line for what the user can put right, before the first image; RuntimeError where memory ends.
    Between two images, and at the end, everything global is as the caller left it, and at the end the model is freed.
    """
    words = [prompts] if isinstance(prompts, str) else list(prompts)
    request = SampleRequest(source, words, **options)
    with as_found():
        call = open_call(request, progress or Progress())
    return call.images()


@dataclass
class Call:
    """A checked request: which model, which adapters, which images. Nothing is loaded yet."""

    request: SampleRequest
    model: ModelSource
    subjects: list[Subject]
    planned: list[plan.Planned]
    progress: Progress
    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def missing(self) -> list[plan.Planned]:
        """Return the images to generate: all without an output folder, else those that it does not contain."""
        folder, again = self.request.output, self.request.overwrite
        return [item for item in self.planned if folder is None or again or not (folder / item.file).exists()]

    def images(self) -> Iterator[Sample]:
        """Yield this process' share of the missing images; at the end the manifest of the output folder is written."""
        try:
            yield from step_by_step(self._made())
        finally:
            free()

    def _made(self) -> Iterator[Sample]:
        request, folder = self.request, self.request.output
        missing = self.missing
        self.progress.report("phase", name="sample", images=len(missing))
        if missing:
            texts = [text for item in self.planned for text in (item.prompt, item.settings.negative)]
            if request.each:
                studio = EachStudio(self.model, self.subjects, texts, request.memory, self.device, request.batch_size)
            else:
                studio = Studio(self.model, self.subjects, texts, request.memory, self.device)
            varies = any(item.settings.strength_schedule for item in self.planned)
            paint = studio.painter([item.scale for item in self.planned], keep=False, varies=varies)
            share = {"rank": self.rank, "world": self.world, "overwrite": request.overwrite}
            for item, image in plan.draw(self.planned, folder, paint, batch_size=request.batch_size, **share):
                file = folder / item.file if folder else None
                self.progress.report("image", file=str(file) if file else None, prompt=item.prompt, seed=item.seed)
                yield Sample(image, item.prompt, item.seed, item.scale, file)
        if self.world > 1:
            torch.distributed.barrier()
        if folder is not None and self.rank == 0:
            plan.settle_manifest(self.planned, folder)


def open_call(request: SampleRequest, progress: Progress) -> Call:
    """Find the model and the adapters of a request and plan its images; ValueError where they do not fit."""
    if not request.prompts:
        raise ValueError("no prompt is given")
    run = Path(request.source).expanduser() if request.source is not None else None
    if request.checkpoint is not None and run is None:
        raise ValueError(f"--checkpoint {request.checkpoint} needs a run folder before the prompts")
    _check_each(request)
    uses = _uses(request, run)
    subjects = session.subjects_of(uses, request.tokens, request.class_noun)
    model = _base(request, subjects, run if run and run.is_dir() else None)
    crowd = session.processes()
    device = pick_device(crowd.local_process_index if crowd else 0)
    rank, world = (crowd.process_index, crowd.num_processes) if crowd else (0, 1)
    planned = _planned(request, model, subjects, device)
    for name in {item.settings.scheduler for item in planned} - {None}:
        check_replaces(str(name), model.scheduler_config)
    call = Call(request, model, subjects, planned, progress, device, rank, world)
    readers = local_tokenizers(model) or (model.load("tokenizers")["tokenizers"] if call.missing else [])
    call.planned = [_with_unread(item, readers) for item in planned]
    if rank == 0:
        _recommend(uses, subjects, progress)
        _warn(call, readers)
    return call


def _recommend(uses: list[tuple[Path, float | None]], subjects: list[Subject], progress: Progress) -> None:
    """Report the strengths that files recommend and that are used."""
    for (path, strength), subject in zip(uses, subjects, strict=True):
        if strength is None and subject.strength != 1:
            progress.message(f"strength {subject.strength:g}, as {path.name} recommends (--scale 1 overrides it)")


def _warn(call: Call, readers: Sequence[Loaded]) -> None:
    """Report prompts that name no subject, identifiers that are alike, and what no text encoder reads."""
    prompts = list(dict.fromkeys(item.prompt for item in call.planned))
    negatives = list(dict.fromkeys(item.settings.negative for item in call.planned))
    missing = [warning for text in prompts for warning in session.missing_identifiers(text, call.subjects)]
    unread = prompt_warnings([*prompts, *negatives], readers)
    shared = [] if call.request.each else session.shared_identifiers(call.subjects)
    for warning in (*shared, *missing, *unread):
        call.progress.warning(warning)


def _with_unread(item: plan.Planned, readers: Sequence[Loaded]) -> plan.Planned:
    """Return the planned image with the end of its prompt in its record, where no text encoder reads it."""
    tail, _, _ = unread_part(item.prompt, readers)
    return replace(item, record={**item.record, "not_read": tail}) if tail else item


def _uses(request: SampleRequest, run: Path | None) -> list[tuple[Path, float | None]]:
    """List adapter files and their strengths; None: what the file recommends, which a scale overrides."""
    uses: list[tuple[Path, float | None]] = [(session.find_adapter(run, request.checkpoint), None)] if run else []
    uses += [session.parse_use(text) for text in request.each or request.adapters]
    if request.scale is not None or any(text.startswith("scale=") for text in request.sweeps):
        return [(path, 1.0 if strength is None else strength) for path, strength in uses]
    return uses


def _base(request: SampleRequest, subjects: list[Subject], run: Path | None) -> ModelSource:
    if not subjects and request.model is None:
        raise ValueError("neither an adapter nor a base model is given")
    found = session.base_model_of(subjects, request.model, run)
    names = ("revision", "variant", "vae", "text_encoders", "model_config_dir", "prediction_type")
    found |= {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    model = open_model(**found)
    session.check_base(model, subjects)
    return model


def _planned(
    request: SampleRequest, model: ModelSource, subjects: list[Subject], device: torch.device
) -> list[plan.Planned]:
    names = ("steps", "guidance", "scheduler", "height", "width", "negative", "noise", "strength_schedule")
    wanted = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    settings = replace(session.default_settings(model, subjects), **wanted)

    def planned(prompts: Sequence[str], subjects: list[Subject], first: int = 0) -> list[plan.Planned]:
        return plan.plan_pictures(
            list(dict.fromkeys(session.fill_prompt(text, subjects) for text in prompts)),
            list(request.seeds),
            replace(settings, negative=session.fill_prompt(settings.negative, subjects)),
            scale=(1.0 if request.scale is None else request.scale) if subjects else None,
            sweeps=[plan.parse_sweep(text) for text in request.sweeps],
            with_base=request.base,
            about=session.about_models(model, subjects, request.memory, device),
            first=first,
        )

    if not request.each:
        return planned(request.prompts, subjects)
    rows = enumerate(zip(request.prompts, subjects, strict=True))
    each = [replace(item, subject=i) for i, (text, one) in rows for item in planned([text], [one], i)]
    return list({item.file: item for item in each}.values())


def _check_each(request: SampleRequest) -> None:
    """ValueError where a prompt has no adapter of its own, or what is asked for needs one adapter for all."""
    if not request.each:
        return
    if request.source is not None or request.adapters:
        raise ValueError("--each gives every prompt its adapter; leave out the run folder and --adapter")
    if len(request.each) != len(request.prompts):
        raise ValueError(f"--each: {len(request.each)} adapters for {len(request.prompts)} prompts; give one for each")
    if request.memory.offload != "none":
        raise ValueError("--each keeps the adapters on the device; leave out --offload")
