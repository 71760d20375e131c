"""A run after set-up, the gradients of a step, and how a step is made to fit in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusekrona_train import faults, memory, setup
from diffusekrona_train.config import RunConfig
from diffusekrona_train.descent import Descent
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


def gradients(run: Run, step: int) -> None:
    """Forward and backward of this process's share of the global batch."""
    for micro in range(run.config.train.gradient_accumulation):
        run.descent.backward(run.objective.loss(step, micro))
    faults.reach("step", step)


def fit_gradients(run: Run, step: int) -> None:
    """`gradients`, going down a memory level and starting the step again where it does not fit."""
    while True:
        short = False
        try:
            gradients(run, step)
        except torch.OutOfMemoryError:
            short = True
        if run.accelerator.num_processes > 1:  # nobody may wait for gradients that another could not make
            short = run.accelerator.reduce(torch.tensor([float(short)], device=run.accelerator.device)).item() > 0
        if not short:
            return
        go_down(run)


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
