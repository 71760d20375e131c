"""Assemble a run from its config: processes, data, model, factors, memory level, and the state it resumes from."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
import torch.utils.checkpoint
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from PIL import Image

from diffusekrona_train import __version__
from diffusekrona_train.adapters import formats, plan_notes
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.common import run_folder
from diffusekrona_train.common.device import ABILITIES, device_name, free, precision, training_device_type
from diffusekrona_train.common.progress import EventLog
from diffusekrona_train.config import RunConfig, dump_config
from diffusekrona_train.config.prompts import prompt_warnings
from diffusekrona_train.config.training import Tracker
from diffusekrona_train.data import order
from diffusekrona_train.data.training_set import Renderer, TrainingSet, build_training_set
from diffusekrona_train.models import configured_model, generating_model
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.sampling.render import render, settings_of
from diffusekrona_train.sampling.session import encode_texts
from diffusekrona_train.training import checkpoint, graph, memory
from diffusekrona_train.training.align import align_new
from diffusekrona_train.training.base import Base, choose_level, load_base
from diffusekrona_train.training.journal import Journal, Stop
from diffusekrona_train.training.loss import Objective
from diffusekrona_train.training.optimizer import Descent, make_descent
from diffusekrona_train.training.preview import Gallery

TRACKERS: dict[str, tuple[str, ...]] = {name: (name,) for name in get_args(Tracker)}
TRACKERS["tensorboard"] = ("tensorboard", "tensorboardX")
"""Tracker -> its module, or several of which one is enough."""
SET_UP_TIMEOUT = timedelta(hours=2)
"""How long a process waits for another that still makes latents or class images."""


@dataclass
class Run:
    """A run after set-up."""

    config: RunConfig
    folder: Path
    source: ModelSource
    accelerator: Accelerator
    level: memory.Level
    objective: Objective
    descent: Descent
    graphs: graph.StepGraphs
    gallery: Gallery
    journal: Journal
    stop: Stop
    start: int
    about: dict[str, Any]
    """What every resume state of this run says: config, number of processes, pictures in their order."""

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process


@dataclass(frozen=True)
class Start:
    """What a run is assembled from."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    dtype: torch.dtype
    """Of the frozen base."""
    events: EventLog


def assemble(start: Start, state: checkpoint.State | None, base: Base | None = None) -> Run:
    """Return everything that the loop needs, at the step where `state` left off, on `base` or one of its own."""
    config, accelerator, dtype, tell = start.config, start.accelerator, start.dtype, start.events.message
    device = accelerator.device
    stop = Stop(start.events, start.folder / run_folder.STOP_FILE if accelerator.is_main_process else None)
    source = base.source if base else configured_model(config)
    check_start(config, source)
    chosen = (base.level, base.why, base.room) if base else choose_level(config, source, accelerator, dtype)
    draw, forget = class_image_maker(config, source, chosen[0], dtype, device, base)
    data = build_training_set(config, source, device=device, log=tell, accelerator=accelerator, render=draw)
    forget()
    if state is not None:
        arrange_as_before(data, state.about, state.path.parent)
    base = base or load_base(config, source, accelerator, dtype, chosen)
    injection = base.inject(config)
    descent = make_descent(config, injection, accelerator)
    objective = Objective(
        config, source.family, base.denoiser, injection, data, source.process(config.data.resolution), dtype, device,
        accelerator.num_processes, accelerator.process_index,
    )  # fmt: skip
    about = {
        "version": __version__,
        "config": config.model_dump(mode="json", by_alias=True),
        "processes": accelerator.num_processes,
        "pictures": pictures_told(data),
    }
    take_up(state, objective, descent, accelerator)
    first = state.step if state else 0
    tell(f"{base.why}, base in {str(dtype).removeprefix('torch.')}, {injection.count:,} trained parameters on {device}")
    for line in plan_lines(injection):
        tell(line)
    if state is not None:
        tell(f"resuming after step {first} of {config.train.steps} from {state.path.parent}")
    if config.train.compile:
        tell("train.compile: the first step compiles the transformer blocks, which takes minutes")
    if first > config.train.steps:
        raise ValueError(f"train.steps: {config.train.steps} lies before step {first} that the run has reached")
    for line in prompt_warnings(data.captions, source.load("tokenizers")["tokenizers"]):
        start.events.warning(line)
    graphs = graph.step_graphs(config, objective, descent, base.level, base.room, tell)
    gallery = Gallery(config, generating_model(config, source), objective, base.level, start.folder, start.events)
    journal = open_folder(start, state, first, about["config"])
    return Run(
        config, start.folder, source, accelerator, base.level, objective, descent, graphs, gallery, journal, stop,
        first, about,
    )  # fmt: skip


def open_folder(start: Start, state: checkpoint.State | None, first: int, config: dict[str, Any]) -> Journal:
    """Make the run folder hold this run up to step `first`, and open its journal."""
    if start.accelerator.is_main_process:
        run_folder.prepare(start.folder, first, dump_config(start.config))
        start.events.open(start.folder / "events.jsonl")
    start.accelerator.wait_for_everyone()
    seconds = state.about.get("seconds", 0.0) if state else 0.0
    return Journal(start.folder, start.accelerator, start.events, first, start.config.train.steps, config, seconds)


def take_up(state: checkpoint.State | None, objective: Objective, descent: Descent, accelerator: Accelerator) -> None:
    """Put a resume state back, or without one begin along the gradient where the config asks for that."""
    if state is None:
        align_new(objective)
        return
    checkpoint.restore(state, objective.injection, descent.optimizer)
    descent.meters.copy_(state.tensors["extra/meters"])
    if descent.average is not None:
        descent.average.load(state.part("extra/average"))
    if accelerator.scaler is not None and "scaler" in state.about:
        accelerator.scaler.load_state_dict(state.about["scaler"])
    objective.injection.assert_fp32()


def start_accelerator(config: RunConfig, folder: Path) -> tuple[Accelerator, torch.dtype]:
    """accelerate's state and the type of the frozen base. ValueError where the launcher meant other processes."""
    refuse_missing_trackers(config)
    kind = training_device_type()
    refuse_unsupported(config, kind)
    name, dtype = precision(config.train.mixed_precision, kind)
    if name == "fp16" and config.train.mixed_precision == "auto" and not configured_model(config).family.fp16:
        name, dtype = precision("bf16", kind)
    accelerator = Accelerator(
        # The base itself has this type and inputs are cast to it: accelerate only brings fp16's loss scaler.
        mixed_precision="fp16" if name == "fp16" else "no",
        cpu=kind == "cpu",
        log_with=list(config.train.trackers) or None,
        project_dir=str(folder / "trackers"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=SET_UP_TIMEOUT)],
    )
    asked = os.environ.get("WORLD_SIZE")
    if asked and asked.isdigit() and int(asked) != accelerator.num_processes:
        raise ValueError(
            f"the launcher asked for {asked} processes (WORLD_SIZE), accelerate started {accelerator.num_processes}; "
            "without a GPU use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 …"
        )
    if kind == "cuda":
        set_cuda(config.train.tf32)
    return accelerator, dtype


def set_cuda(tf32: bool) -> None:
    """Set how CUDA's libraries compute; `as_found` puts it back. cuDNN does not choose its algorithms by the clock: two
    equal runs on one card would no longer be equal."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False


def refuse_unsupported(config: RunConfig, kind: str) -> None:
    """ValueError for what bitsandbytes cannot do on a type of device."""
    train = config.train
    asked = {"quantize": train.quantize, "memory": train.memory, "optimizer": train.optimizer}
    for name, value in asked.items():
        if value in ("nf4", "int8", "adamw8bit", "offload") and not ABILITIES[kind].quantized:
            raise ValueError(f"train.{name}: {value} does not work on {device_name(kind)}; leave it out")
    if train.quantize == "fp8" and not ABILITIES[kind].float8:
        raise ValueError(f"train.quantize: fp8 does not work on {device_name(kind)}; leave it out")


def eagerly(config: RunConfig) -> contextlib.AbstractContextManager[object]:
    """Within, nothing is compiled anew: pictures and held-out loss have shapes of their own, and are few."""
    return torch.compiler.set_stance("force_eager") if config.train.compile else contextlib.nullcontext()


def check_start(config: RunConfig, source: ModelSource) -> None:
    """ValueError for a tracker that is not installed, a base that cannot be trained (`ModelSource.check`), or an
    `init_from` that does not fit. Loads no weights."""
    refuse_missing_trackers(config)
    if config.train.mixed_precision == "fp16" and not source.family.fp16:
        raise ValueError(f"train.mixed_precision: fp16: {source.model!r} overflows in it; use bf16 or leave it out")
    source.check()
    generating_model(config, source).check()
    if config.train.init_from is None:
        return
    try:
        file = formats.read_adapter(Path(config.train.init_from).expanduser())
        known = formats.identify(file, [*source.layers(), *source.others()], source.family.name)
        _refuse_other_adapter(config, file)
        if others := [layer.name for layer in known.layers if layer.kind == "other"]:
            raise ValueError(
                f"train.init_from: {config.train.init_from} adapts {others[0]} ({len(others)} such), which is "
                "not trained here; give a file of attention and feed-forwards alone"
            )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith("train.init_from: ") else f"train.init_from: {text}") from None


def refuse_missing_trackers(config: RunConfig) -> None:
    """ValueError with the pip line where `train.trackers` names one that is not installed."""
    missing = [name for name in config.train.trackers if not any(map(_is_installed, TRACKERS[name]))]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise ValueError(
            f"train.trackers: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install {packages}, or take it out"
        )


def _is_installed(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None  # a folder `wandb` of logs is a namespace without origin


def plan_lines(injection: Injection) -> list[str]:
    """What a budget chose and which divisors were taken instead, as --check says it."""
    layers: list[Any] = [adapter.layer for adapter in injection.adapters.values() if hasattr(adapter, "layer")]
    return plan_notes(injection.spec, layers, injection.options)


def _refuse_other_adapter(config: RunConfig, file: formats.AdapterFile) -> None:
    """ValueError where an adapter to continue from is not what the config would train."""
    if file.spec is None:
        raise ValueError(
            f"train.init_from: {config.train.init_from} was not made by this project, so what it trained is not known"
        )
    there, here = file.spec.model_dump(mode="json"), config.adapter.model_dump(mode="json")
    starts = ("init_a", "align_draws", "init_b", "norm_cap")  # says nothing about factors that have been trained
    other = [
        f"adapter.{name}: {there[name]!r}" for name in here if there.get(name) != here[name] and name not in starts
    ]
    if other:
        raise ValueError(
            f"train.init_from: {config.train.init_from} was trained with {', '.join(other)}; set the same here"
        )


def class_image_maker(
    config: RunConfig,
    source: ModelSource,
    level: memory.Level,
    dtype: torch.dtype,
    device: torch.device,
    base: Base | None = None,
) -> tuple[Renderer, Callable[[], None]]:
    """(render, forget): `render(prompt, seed)` generates an image with `base`, or a model loaded at the first call and
    held as it will be in training; text encoders leave before it comes."""
    held: dict[str, Any] = {}
    settings = settings_of(config)
    bare = base.bare if base else contextlib.nullcontext

    def draw(prompt: str, seed: int) -> Image.Image:
        if not held:
            held["texts"] = encode_texts(source, [prompt, settings.negative], device)
            parts = source.load("vae", dtype=torch.float32, device=device) | source.load("scheduler")
            denoiser = base.denoiser if base else source.load_denoiser(dtype, device, level.quantize, level.offload)
            held["pipe"] = source.family.pipeline({**parts, "denoiser": denoiser})
        conditioning_of = held["texts"].__getitem__
        with bare():
            return render(held["pipe"], source.family, [(prompt, seed)], settings, conditioning_of=conditioning_of)[0]

    def forget() -> None:
        held.clear()
        free()

    return draw, forget


def pictures_told(data: TrainingSet) -> list:
    """What a resume state says of the pictures: contents, captions and names, in the run's own order."""
    return [[order.written(rows) for rows in group] for group in data.rows()]


def arrange_as_before(data: TrainingSet, about: dict[str, Any], place: Path) -> None:
    """Put the pictures into the order of the run that wrote the state `about`; ValueError where they are others."""
    if "pictures" not in about:  # of version 0.1, which compared names and their order
        if about.get("data") != data_mark(data):
            raise ValueError(f"cannot resume {place}: the photos or captions are not those that it was trained on")
        return
    try:
        data.arrange([[order.read(rows) for rows in group] for group in about["pictures"]])
    except ValueError as error:
        raise ValueError(f"cannot resume {place}: {error}") from None


def data_mark(data: TrainingSet) -> str:
    """A short hash of what is trained on, as version 0.1 told it: names and captions, in order."""
    digest = hashlib.sha256()
    for bucket in [*data.instances, *data.priors]:
        for name, caption in zip(bucket.names, bucket.caption_index.tolist(), strict=True):
            digest.update(f"{name}\0{data.captions[caption]}\0".encode())
        digest.update(repr(tuple(bucket.latents.shape)).encode())
    return digest.hexdigest()[:16]


def adapter_info(config: RunConfig, source: ModelSource, step: int) -> dict[str, Any]:
    """What an adapter file says about its training; formats.py takes out local paths and adds the layers."""
    return {
        "family": source.family.name,
        "model": source.identity,
        **({"sample_model": generating_model(config, source).identity} if config.sample.model else {}),
        "prediction_type": source.prediction_type,
        "token": config.subject.token,
        "class": config.subject.class_noun,
        "prompt": config.subject.prompt,
        "resolution": config.data.resolution,
        "name": config.name,
        "step": step,
        "training": {**config.model_dump(mode="json", by_alias=True), "model": source.identity, "output": config.name},
    }
