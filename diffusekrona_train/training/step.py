"""One training step: gradients of the global batch, made to fit in memory, then one optimiser step."""

from __future__ import annotations

import time

import torch

from diffusekrona_train.common import faults
from diffusekrona_train.common.device import free, ran_out
from diffusekrona_train.training import base, graph, memory
from diffusekrona_train.training.optimizer import learning_rate_factor, make_descent
from diffusekrona_train.training.setup import Run

FIRST_STEPS = 3
"""With several processes, running out of memory in this many steps drops a memory level; later it is an error, as all
would have to ask each other in every step. One process may drop a level at any step."""


def gradients(run: Run, step: int) -> None:
    """Run forward and backward for this process's share of the global batch."""
    run.graphs.gradients(step)
    faults.reach("step", step)


def fit_gradients(run: Run, step: int) -> None:
    """`gradients`, going down a memory level and starting the step again where it does not fit."""
    began = time.monotonic()
    while True:
        short = False
        try:
            gradients(run, step)
        except RuntimeError as error:
            if not ran_out(error):
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
    run.graphs.forget()
    run.descent.clear()
    lower = memory.below(run.level, run.config, run.accelerator.device)
    if lower is None and run.objective.kept.nbytes:  # the last thing that can be given up
        run.objective.kept.stop()
        run.journal.say(f"out of memory with memory: {run.level.name}; continuing without keeping keys and values")
        free()
        return
    if lower is None:
        raise RuntimeError(memory.out_of_memory(run.level))
    run.journal.say(f"out of memory with memory: {run.level.name}; continuing with {lower.name}")
    if (lower.quantize, lower.offload) == (run.level.quantize, run.level.offload):
        base.enable_checkpointing(run.objective.denoiser)
    else:
        injection, device = run.objective.injection, run.accelerator.device
        factors = {name: value.detach().cpu().clone() for name, value in injection.state_dict().items()}
        moments = run.descent.optimizer.state_dict()
        run.objective.denoiser = run.objective.injection = injection = None  # or the old one stays beside the new one
        free()
        with base.in_turn(run.accelerator, lower.quantize != "none" or lower.offload):
            denoiser = base.load_denoiser(run.config, run.source, lower, run.objective.dtype, device)
        run.objective.denoiser, run.objective.injection = denoiser, base.inject_factors(run.config, denoiser)
        run.objective.injection.load_state_dict(factors)
        meters, average = run.descent.meters, run.descent.average
        run.descent = make_descent(run.config, run.objective.injection, run.accelerator)
        run.descent.optimizer.load_state_dict(moments)
        run.descent.meters = meters
        if average is not None and run.descent.average is not None:
            run.descent.average.load(average.tensors())
    run.level = lower
    run.graphs = graph.step_graphs(run.config, run.objective, run.descent, lower, 0.0, run.journal.say)
    free()


def training_step(run: Run, step: int) -> torch.Tensor:
    """Gradients of the global batch, then one optimiser step; nothing here waits for the device.

    Returns the processes' averaged wish to stop, on the device until the next step.
    """
    if step < run.start + FIRST_STEPS or run.accelerator.num_processes == 1:
        fit_gradients(run, step)
    else:
        gradients(run, step)
    run.descent.prepare(learning_rate(run, step), run.stop.wanted())
    run.graphs.apply()
    return run.descent.wish


def learning_rate(run: Run, step: int) -> float:
    train = run.config.train
    return train.learning_rate * learning_rate_factor(train.schedule, step, train.steps, train.warmup_steps)
