"""The loop of a run, on one screen, and what happens around its steps: the log, checkpoints, validation, stopping."""

from __future__ import annotations

import sys
import time

import torch

from diffusekrona_train.common.device import free
from diffusekrona_train.common.progress import Diverged
from diffusekrona_train.training import checkpoint, curves, page, setup
from diffusekrona_train.training.optimizer import BAD_IN_A_ROW
from diffusekrona_train.training.preview import Interrupted
from diffusekrona_train.training.setup import Run
from diffusekrona_train.training.step import learning_rate, training_step


def loop(run: Run) -> None:
    """From the start step to the last; leaves with SystemExit after a signal, with Diverged after bad steps."""
    train, every = run.config.train, run.config.validation.every
    if every and run.start == 0:
        validate(run, 0)
    for step in range(run.start, train.steps):
        wish = training_step(run, step)
        done, last = step + 1, step + 1 == train.steps
        run.journal.advance()
        stopping = run.stop.agreed(wish, run.accelerator.num_processes)
        saving = done % train.checkpoint_every == 0 or last or stopping
        if done % train.log_every == 0 or saving:
            log(run, done)
        if saving:
            save(run, done)
        if stopping and not last:
            leave(run, done)
        if every and (done % every == 0 or last):
            validate(run, done)


def log(run: Run, done: int) -> None:
    """Reads the meters: here alone the loop waits for the device. Diverged after several bad steps in a row."""
    values = run.descent.read()
    worst, skipped = values.pop("worst") or 0, values.pop("skipped") or 0
    line = {"loss": values["loss"], "lr": learning_rate(run, done - 1), "grad_norm": values["grad_norm"]}
    run.journal.log(done, run.objective.global_batch, {**line, **({"skipped": int(skipped)} if skipped else {})})
    if worst > BAD_IN_A_ROW - 0.01:
        if not _base_is_finite(run, done - 1):
            raise Diverged(_base_to_blame(run))
        kept = checkpoint.states(run.folder)
        good = run.folder / "checkpoints" / kept[0].name / "adapter.safetensors" if kept else None
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
    """Writes the checkpoint after `done` steps, on the main process; the others wait for it."""
    began = time.monotonic()
    run.objective.injection.assert_fp32()
    if run.main:
        scaler = run.accelerator.scaler
        about = {**run.about, "seconds": run.journal.seconds, "level": run.level.name}
        if scaler is not None:
            about["scaler"] = scaler.state_dict()
        try:
            checkpoint.save(
                run.folder,
                done,
                run.objective.injection,
                run.descent.optimizer,
                info=setup.adapter_info(run.config, run.source, done),
                about=about,
                extra={"meters": run.descent.meters},
                keep=run.config.train.keep_resume_states,
            )
        except OSError as error:
            kept = checkpoint.states(run.folder)
            last = f"; the last good checkpoint is of {kept[0].name}, go on from it with --resume" if kept else ""
            raise RuntimeError(
                f"the checkpoint of step {done} cannot be written ({error.strerror or error}){last}"
            ) from error
    run.accelerator.wait_for_everyone()
    run.journal.skip_time(began)


def leave(run: Run, done: int) -> None:
    """Ends a run that was asked to stop, after its checkpoint."""
    if run.main:
        run.journal.close()
        steps = run.config.train.steps
        print(f"stopped after step {done} of {steps}; saved. Go on with: {command_line()} --resume", file=sys.stderr)
    raise SystemExit(run.stop.status)


def command_line() -> str:
    """The command that started this run, without what says how to begin."""
    config = next((sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word == "--config"), "CONFIG.yaml")
    sets = [f"--set {sys.argv[i + 1]}" for i, word in enumerate(sys.argv[:-1]) if word == "--set"]
    return " ".join([f"krona-train --config {config}", *sets])


def validate(run: Run, done: int) -> None:
    """Pictures, held-out loss and a fresh report; whatever fails here is told and never ends the run."""
    began = time.monotonic()
    try:
        with setup.eagerly(run.config):
            run.gallery.render(done, stopping=lambda: run.stop.signum is not None)
    except Interrupted:
        pass
    except Exception as error:
        run.journal.warn("validation failed", error)
        free(run.accelerator.device)
    try:
        if run.main and run.config.validation.loss and run.stop.signum is None:
            with setup.eagerly(run.config):
                run.journal.write({"step": done, "validation_loss": run.objective.held_out_loss()})
    except Exception as error:
        run.journal.warn("the held-out loss failed", error)
    refresh_report(run)
    run.objective.injection.assert_fp32()
    run.accelerator.wait_for_everyone()
    run.journal.skip_time(began)


def refresh_report(run: Run) -> None:
    """`report.html` and `loss.png`, as far as the run has come."""
    if not run.main or not run.config.validation.report:
        return
    for name, write in (("report.html", page.write_run_report), ("loss.png", curves.write_loss_plot)):
        try:
            write(run.folder)
        except Exception as error:
            run.journal.warn(f"{name} was not written", error)
