"""A run and its set-up, the gradients of a step, and how a step is made to fit in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusekrona_train import __version__, checkpoint, faults, folder, memory, setup
from diffusekrona_train.cache import build_training_set
from diffusekrona_train.config import RunConfig, dump_config
from diffusekrona_train.descent import Descent
from diffusekrona_train.diffusion import noise_schedule
from diffusekrona_train.families import configured_model
from diffusekrona_train.journal import Journal, Stop
from diffusekrona_train.objective import Objective
from diffusekrona_train.validate import Gallery

FIRST_STEPS = 3
"""Out of memory in this many steps goes a level down; later it is a fault."""


@dataclass
class Run:
    """A run after set-up."""

    config: RunConfig
    folder: Path
    source: Any
    accelerator: Accelerator
    level: memory.Level
    objective: Objective
    descent: Descent
    gallery: Gallery
    journal: Journal
    stop: Stop
    start: int
    about: dict[str, Any]
    """What every resume state of this run says: config, number of processes, mark of the data."""

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process


def assemble(
    config: RunConfig,
    place: Path,
    accelerator: Accelerator,
    dtype: torch.dtype,
    state: checkpoint.State | None,
    stop: Stop,
) -> Run:
    """Everything that the loop needs, at the step where `state` left off."""
    tell = print if accelerator.is_main_process else lambda *_: None
    device = accelerator.device
    source = configured_model(config)
    setup.check_start(config, source)
    draw, forget = setup.class_image_maker(config, source, dtype, device)
    data = build_training_set(config, source, device=device, log=tell, accelerator=accelerator, render=draw)
    forget()
    level, why = setup.choose_level(config, source, accelerator, dtype)
    denoiser = setup.load_denoiser(config, source, level, dtype, device)
    injection = setup.inject_factors(config, denoiser)
    descent = Descent(injection.parameters(), config.train, accelerator)
    alphas = noise_schedule(source.load("scheduler")["scheduler"])
    objective = Objective(
        config, source.family, denoiser, injection, data, alphas, source.prediction_type, dtype, device,
        accelerator.num_processes, accelerator.process_index,
    )  # fmt: skip
    about = {
        "version": __version__,
        "config": config.model_dump(mode="json", by_alias=True),
        "processes": accelerator.num_processes,
        "data": setup.data_mark(data),
    }
    if state is not None:
        take_up(state, about, injection, descent, accelerator)
    start = state.step if state else 0
    seconds = state.about.get("seconds", 0.0) if state else 0.0
    tell(f"{why}, base in {str(dtype).removeprefix('torch.')}, {injection.count:,} trained parameters on {device}")
    for line in setup.plan_lines(injection):
        tell(line)
    if state is not None:
        tell(f"resuming after step {start} of {config.train.steps} from {state.path.parent}")
    if config.train.compile:
        tell("train.compile: the first step compiles the transformer blocks, which takes minutes")
    if start > config.train.steps:
        raise ValueError(f"train.steps: {config.train.steps} lies before step {start} that the run has reached")
    gallery = Gallery(config, source, objective, place)
    if accelerator.is_main_process:
        folder.prepare(place, start, dump_config(config))
    accelerator.wait_for_everyone()
    journal = Journal(place, accelerator, start, config.train.steps, about["config"], seconds)
    return Run(config, place, source, accelerator, level, objective, descent, gallery, journal, stop, start, about)


def take_up(state: checkpoint.State, about: dict, injection: Any, descent: Descent, accelerator: Accelerator) -> None:
    """Puts a resume state back; ValueError where the pictures or captions are others."""
    if state.about["data"] != about["data"]:
        raise ValueError(
            f"cannot resume {state.path.parent}: the pictures or captions are not those that it was trained on"
        )
    checkpoint.restore(state, injection, descent.optimizer)
    descent.meters.copy_(state.tensors["extra/meters"])
    if accelerator.scaler is not None and "scaler" in state.about:
        accelerator.scaler.load_state_dict(state.about["scaler"])
    injection.assert_fp32()


def gradients(run: Run, step: int) -> None:
    """Forward and backward of this process's share of the global batch."""
    for micro in range(run.config.train.gradient_accumulation):
        run.descent.backward(run.objective.loss(step, micro))
    faults.reach("step", step)


def fit_gradients(run: Run, step: int) -> None:
    """`gradients`, going down a memory level and starting the step again where it does not fit."""
    began = time.monotonic()
    while True:
        short = False
        try:
            gradients(run, step)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            short = True
        if run.accelerator.num_processes > 1:  # nobody may wait for gradients that another could not make
            short = run.accelerator.reduce(torch.tensor([float(short)], device=run.accelerator.device)).item() > 0
        if not short:
            break
        go_down(run)
    if run.config.train.compile and step == run.start:
        run.journal.say(f"train.compile: the first step took {time.monotonic() - began:.0f} s; the next ones are fast")


def go_down(run: Run) -> None:
    """Takes the next memory level; RuntimeError at the lowest."""
    run.descent.clear()
    lower = memory.below(run.level, run.config)
    if lower is None:
        raise RuntimeError(memory.out_of_memory(run.level))
    run.journal.say(f"out of memory with memory: {run.level.name}; going on with {lower.name}")
    if lower.quantize == run.level.quantize:
        run.objective.denoiser.enable_gradient_checkpointing()
    else:
        injection, device = run.objective.injection, run.accelerator.device
        factors = {name: value.detach().cpu().clone() for name, value in injection.state_dict().items()}
        moments = run.descent.optimizer.state_dict()
        run.objective.denoiser = run.objective.injection = None
        setup.free(device)
        denoiser = setup.load_denoiser(run.config, run.source, lower, run.objective.dtype, device)
        run.objective.denoiser, run.objective.injection = denoiser, setup.inject_factors(run.config, denoiser)
        run.objective.injection.load_state_dict(factors)
        meters = run.descent.meters
        run.descent = Descent(run.objective.injection.parameters(), run.config.train, run.accelerator)
        run.descent.optimizer.load_state_dict(moments)
        run.descent.meters = meters
    run.level = lower
    setup.free(run.accelerator.device)
