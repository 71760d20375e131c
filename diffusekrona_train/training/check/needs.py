"""What a run needs before it starts: steps and passes, memory, disk, device. Lines for `--check`; loads no weights."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

from diffusekrona_train.common.process import world_size
from diffusekrona_train.config import EMBEDDED, RunConfig
from diffusekrona_train.config.known import known_model
from diffusekrona_train.data import Collection
from diffusekrona_train.data.training_set import cache_folder, prompts_of
from diffusekrona_train.models.contracts import Layer
from diffusekrona_train.models.source import ModelSource


def base_parameters(source: ModelSource) -> int:
    """Count the denoiser's parameters: from its layer table if there is one, which needs no diffusers."""
    from diffusekrona_train.models import layers as tables

    return tables.base_parameters(source.alias) if source.alias in tables.TABLES else source.base_parameters()


def layers_of(source: ModelSource) -> list[Layer]:
    """Return all layers of the denoiser that can be adapted, from its layer table where there is one."""
    from diffusekrona_train.models import layers as tables

    return tables.layer_table(source.alias) if source.alias in tables.TABLES else source.layers()


def step_lines(config: RunConfig, collection: Collection) -> list[str]:
    """Return steps, passes over the photos, and the same in kohya's way of counting."""
    train = config.train
    photos, pass_views = len(collection.pictures), sum(picture.repeats for picture in collection.pictures)
    batch = train.batch_size * train.gradient_accumulation * world_size()
    views = train.steps * batch
    parts = f"{train.batch_size} a process x {train.gradient_accumulation} accumulated x {world_size()} processes"
    lines = [
        f"{train.steps} optimiser steps x batch {batch} ({parts}) = {views:,} views, "
        f"each of {photos} photos about {views / photos:.0f} times"
    ]
    counted, of_an_epoch = _as_kohya(collection, max(1, round(views / photos / 10)))
    per_epoch = math.ceil(of_an_epoch / batch)
    lines.append(
        f"passes: {views / pass_views:.1f}; in kohya's counting {counted} / batch {batch} = "
        f"{per_epoch} steps an epoch, {train.steps / per_epoch:.1f} epochs"
    )
    if config.prior.kind != "none":
        lines.append(f"prior: one class sample beside each ({config.prior.kind}), so each step does twice the work")
    as_the_paper = config.adapter.type == "krona" and train.rate_unit == "factor" and config.adapter.norm_cap is None
    if as_the_paper and train.learning_rate >= 1e-3:
        lines.append(
            f"learning rate {train.learning_rate:g}: from 1e-3 on the paper saw it overfit and drop the prompt"
        )
    if as_the_paper and train.learning_rate < 1e-4:
        lines.append(f"learning rate {train.learning_rate:g}: below 1e-4 the paper saw it ignore the photos")
    return lines


def _as_kohya(collection: Collection, guess: int) -> tuple[str, int]:
    """Return (`10 repeats x 3 photos`, views an epoch): by the folders' own repeats, or by `guess` where none are
    given."""
    times = Counter(picture.repeats for picture in collection.pictures)
    if not collection.repeats_are_given:
        times = Counter({guess: len(collection.pictures)})
    if len(times) == 1:
        ((repeats, photos),) = times.items()
        return f"{repeats} repeats x {photos} photos", repeats * photos
    told = " + ".join(f"{repeats} repeats x {photos} photos" for repeats, photos in sorted(times.items()))
    return f"({told})", sum(repeats * photos for repeats, photos in times.items())


def memory_lines(config: RunConfig, source: ModelSource) -> list[str]:
    """Return estimates for each way to fit, in GiB, what this machine has, and what would lower it."""
    import torch

    from diffusekrona_train.common.device import free_bytes, training_device_type
    from diffusekrona_train.training.graph import why_not
    from diffusekrona_train.training.memory import BYTES, GIB, choose, levels, need, room, trained_parameters

    device = torch.device(training_device_type())
    gpu = device.type != "cpu"
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}.get(config.train.mixed_precision)
    dtype = dtype or (torch.bfloat16 if gpu or source.identity not in EMBEDDED else torch.float32)
    base = base_parameters(source)
    samples = config.train.batch_size * (1 if config.prior.kind == "none" else 2)
    figures = source.family.memory
    trained = trained_parameters(config, layers_of(source), base)
    needs = {level.name: need(level, config, base, samples, dtype, figures, trained) for level in levels(config)}
    lines = [
        "about " + ", ".join(f"{need:.1f} GiB {name}" for name, need in needs.items()) + f" ({samples} images at once)"
    ]
    if gpu:
        level, why = choose(config, base, samples, dtype, device, figures, trained)
        lines.append(why.removeprefix("memory: "))
        left = room(level, config, base, samples, dtype, device, figures, trained)
        refused = why_not(config, level, device.type, world_size(), left)
        lines.append(f"no CUDA graph: {refused}" if refused else "the step is captured as a CUDA graph")
        free = free_bytes(device)
        if free is not None and min(needs.values()) > free / GIB:
            lines.append(
                f"{free / GIB:.1f} GiB are free: lower data.resolution or train.batch_size, or close other programs"
            )
    else:
        lines.append("no GPU in reach of torch: training would run on the CPU")
    if any(level.offload for level in levels(config)):
        kept = base * figures.quantized_share * BYTES.get(levels(config)[-1].quantize, 2) / GIB
        lines.append(f"offload keeps {kept:.1f} GiB of the base in the computer's own memory")
    lines += encoder_lines(source)
    if config.train.batch_size > 1:
        lines.append(
            "less: train.batch_size: 1 with train.gradient_accumulation, train.memory: nf4 or offload, "
            "a lower data.resolution"
        )
    else:
        lines.append("less: train.memory: nf4 or offload, or a lower data.resolution")
    return lines


def encoder_lines(source: ModelSource) -> list[str]:
    """Return what the text encoders take while prompts are encoded, before the denoiser is loaded; nothing for small
    ones."""
    import torch

    from diffusekrona_train.training.memory import GIB

    parts = [part for part in source.family.parts.text_encoders if part.dtype != torch.float32]
    if not parts or source.alias in EMBEDDED:
        return []
    counts = [source.parameters_of(part) for part in parts]
    width = 1 if source.text_precision == "int8" else source.text_dtype(parts[0]).itemsize
    line = f"text encoders: {sum(counts) * width / GIB:.1f} GiB while prompts are encoded, once, before training"
    return [line + ("" if width == 1 else f" ({sum(counts) / GIB:.1f} with data.text_precision: int8)")]


def disk_lines(config: RunConfig, source: ModelSource, collection: Collection, trainable: int) -> list[str]:
    """Return what cache and run folder will hold, against what is free."""
    side = config.data.resolution
    latent = math.prod(source.family.latent_shape(source.vae_config, side, side))
    pictures = len(collection.pictures) + (config.prior.count if config.prior.kind == "images" else 0)
    latents = pictures * config.data.variants * latent * 4
    texts = len(prompts_of(config, collection.pictures)) * _bytes_a_prompt(source)
    class_images = config.prior.count * config.data.resolution**2 * 1.5 if config.prior.kind == "images" else 0
    checkpoints = math.ceil(config.train.steps / config.train.checkpoint_every)
    states = min(checkpoints, config.train.keep_resume_states) * trainable * 12
    rendered = config.train.steps // config.validation.every if config.validation.every else 0
    samples = rendered * len(config.validation.prompts) * len(config.validation.seeds) * config.data.resolution**2 * 1.5
    run = (checkpoints + 1) * trainable * 4 + states + samples
    folder = cache_folder(config)
    cache = latents + texts + class_images
    lines = [f"cache {_megabytes(cache)} in {folder}, run {_megabytes(run)} in {config.output}"]
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < 1.2 * (cache + run):
        lines.append(f"only {_megabytes(free)} are free there")
    return lines


def _bytes_a_prompt(source: ModelSource) -> float:
    """Return what an encoded prompt of usual length weighs; 0 for the UNets' short ones, which weigh little."""
    known = known_model(source.like)
    shapes = known.prompt.values() if known else ()
    encoders = source.family.parts.text_encoders
    width = max((source.text_dtype(part).itemsize for part in encoders), default=4)
    return sum(map(math.prod, shapes)) * width


def _megabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


LACKS = {
    "quantized": "NF4, int8 and adamw8bit",
    "fused": "the fused optimiser (the plain one is used)",
    "fp16": "training in fp16",
    "pinned": "copies from pinned memory",
}
"""Ability of a device -> what to say where it is lacking."""


def device_lines() -> list[str]:
    """Return the device that training would take; where a GPU is there and torch cannot use it, how to mend that."""
    import torch

    from diffusekrona_train.common.device import ABILITIES, device_name, training_device_type

    kind = training_device_type()
    if kind != "cpu":
        lacks = [text for ability, text in LACKS.items() if not getattr(ABILITIES[kind], ability)]
        said = f"{device_name(kind)}, torch {torch.__version__}"
        return [said, *([f"does not work there: {', '.join(lacks)}"] if lacks else [])]
    lines = [f"CPU, torch {torch.__version__}"]
    if has_nvidia_gpu() and torch.version.cuda is None:
        lines.append(
            "there is an NVIDIA GPU, and this torch was built without CUDA: pip install --force-reinstall torch"
            + (
                " (with the index URL that pytorch.org/get-started names for Windows)"
                if sys.platform == "win32"
                else ""
            )
        )
    elif has_nvidia_gpu():
        lines.append(
            f"there is an NVIDIA GPU that torch cannot reach: is its driver older than CUDA {torch.version.cuda}?"
        )
    return lines


def has_nvidia_gpu() -> bool:
    """Return whether the system shows an NVIDIA GPU, whatever torch thinks."""
    if Path("/proc/driver/nvidia/version").exists() or any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    import subprocess

    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    return bool(re.search(r"^GPU 0", listed, re.MULTILINE))
