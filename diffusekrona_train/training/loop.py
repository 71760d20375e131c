"""The loop of a run, on one screen, and what happens around its steps: the log, checkpoints, validation, stopping."""

from __future__ import annotations

import time

import torch

from diffusekrona_train.common.device import free
from diffusekrona_train.common.progress import Diverged, Stopped
from diffusekrona_train.common.run_folder import adapter_file, step_of
from diffusekrona_train.training import checkpoint, curves, memory, page, setup
from diffusekrona_train.training.optimizer import BAD_IN_A_ROW
from diffusekrona_train.training.preview import Interrupted
from diffusekrona_train.training.setup import Run
from diffusekrona_train.training.step import learning_rate, training_step


def loop(run: Run) -> None:
    """Train from the start step to the last; Stopped where the run was asked to end, Diverged after bad steps."""
    begin(run)
    for step in range(run.start, run.config.train.steps):
        conclude(run, step, training_step(run, step))


def begin(run: Run) -> None:
    """Do what comes before the first step of a new run."""
    if run.config.validation.every and run.start == 0:
        validate(run, 0)


def conclude(run: Run, step: int, wish: torch.Tensor) -> None:
    """Do what follows a step: log, save, validate; Stopped or Diverged where it was the last one too early."""
    train, every = run.config.train, run.config.validation.every
    done, last = step + 1, step + 1 == train.steps
    run.journal.advance()
    stopping = run.stop.agreed(wish, run.accelerator.num_processes)
    saving = done % train.checkpoint_every == 0 or last or stopping
    if done % train.log_every == 0 or saving:
        log(run, done)
    if saving:
        save(run, done)
    if stopping and not last:
        raise Stopped(done, train.steps, adapter_file(run.folder, done))
    if every and (done % every == 0 or last):
        validate(run, done)


def log(run: Run, done: int) -> None:
    """Read the meters: only here the loop waits for the device. Diverged after several bad steps in a row."""
    values = run.descent.read()
    worst, skipped = values.pop("worst") or 0, values.pop("skipped") or 0
    line = {"loss": values["loss"], "lr": learning_rate(run, done - 1), "grad_norm": values["grad_norm"]}
    run.journal.log(done, run.objective.global_batch, {**line, **({"skipped": int(skipped)} if skipped else {})})
    if worst > BAD_IN_A_ROW - 0.01:
        if not _base_is_finite(run, done - 1):
            raise Diverged(_base_to_blame(run))
        kept = checkpoint.states(run.folder)
        good = adapter_file(run.folder, step_of(kept[0])) if kept else None
        raise Diverged(
            f"loss or gradient was not finite {BAD_IN_A_ROW} steps in a row before step {done}. Start a new run, with "
            f"another output and a train.learning_rate below {run.config.train.learning_rate:g}"
            + (f"; train.init_from: {good} lets it begin at the last good checkpoint" if good else "")
        )


@torch.no_grad()
def _base_is_finite(run: Run, step: int) -> bool:
    """Whether the frozen base alone gives a finite loss on what `step` drew."""
    with run.objective.injection.disabled(), setup.eagerly(run.config):
        losses = [run.objective.per_sample(batch) for batch in run.objective.batches(step, 0)]
    return bool(torch.cat(losses).isfinite().all())


def _base_to_blame(run: Run) -> str:
    dtype = str(run.objective.dtype).removeprefix("torch.")
    wider = {"float16": "Set train.mixed_precision: bf16 or no", "bfloat16": "Set train.mixed_precision: no"}.get(dtype)
    return (
        f"the loss was not finite {BAD_IN_A_ROW} steps in a row, and without the adapter it is not finite either: the "
        f"base model {run.source.identity} gives NaN or infinity in {dtype}. "
        f"{f'{wider}, or take' if wider else 'Take'} another copy of it; the learning rate is not the reason"
    )


def save(run: Run, done: int) -> None:
    """Write the checkpoint after `done` steps, on the main process; the others wait for it."""
    began = time.monotonic()
    run.objective.injection.assert_fp32()
    if run.main:
        scaler = run.accelerator.scaler
        about = {**run.about, "seconds": run.journal.seconds, "level": run.level.name}
        if scaler is not None:
            about["scaler"] = scaler.state_dict()
        try:
            file = checkpoint.save(
                run.folder,
                done,
                run.objective.injection,
                run.descent.optimizer,
                info=setup.adapter_info(run.config, run.source, done),
                about=about,
                extra={"meters": run.descent.meters, **_average(run)},
                keep=run.config.train.keep_resume_states,
                shown=run.descent.shown,
            )
        except OSError as error:
            kept = checkpoint.states(run.folder)
            last = f"; the last good checkpoint is {kept[0].name}; continue from it with --resume" if kept else ""
            raise RuntimeError(
                f"the checkpoint of step {done} cannot be written ({error.strerror or error}){last}"
            ) from error
        run.journal.progress.report("saved", file=str(file), step=done)
    run.accelerator.wait_for_everyone()
    run.journal.skip_time(began)


def _average(run: Run) -> dict[str, torch.Tensor]:
    """The running average of the factors, as a resume state keeps it."""
    average = run.descent.average
    return {} if average is None else {f"average/{name}": value for name, value in average.tensors().items()}


def validate(run: Run, done: int) -> None:
    """Make the validation images, held-out loss and a fresh report; a failure is reported and never ends the run."""
    began = time.monotonic()
    with run.descent.shown():
        show(run, done)
    refresh_report(run)
    run.objective.injection.assert_fp32()
    run.accelerator.wait_for_everyone()
    run.journal.skip_time(began)


def show(run: Run, done: int) -> None:
    """Make the validation images and the held-out loss with the factors as they are."""
    try:
        with setup.eagerly(run.config):
            run.gallery.render(done, stopping=run.stop.wanted)
    except Interrupted:
        pass
    except Exception as error:
        run.journal.warn("validation failed", error)
        free()
    try:
        if run.main and run.config.validation.loss and not run.stop.wanted():
            with setup.eagerly(run.config):
                loss = run.objective.held_out_loss(held_out_at_once(run))
            run.journal.write({"step": done, "validation_loss": loss})
    except Exception as error:
        run.journal.warn("the held-out loss failed", error)


def held_out_at_once(run: Run) -> int:
    """How many held-out samples are computed together: a training batch, or more where memory allows it."""
    objective = run.objective
    images = memory.images_at_once(run.config, objective.dtype, objective.device, objective.family.memory)
    return max(run.config.train.batch_size, 2 * images if images > 1 else 1)


def refresh_report(run: Run) -> None:
    """Write `report.html` and `loss.png`, as far as the run has come."""
    if not run.main or not run.config.validation.report:
        return
    for name, write in (("report.html", page.write_run_report), ("loss.png", curves.write_loss_plot)):
        try:
            write(run.folder)
        except Exception as error:
            run.journal.warn(f"{name} was not written", error)
