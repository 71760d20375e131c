"""`krona-train`: one training step, the loop, and what surrounds it.

    train(load_config("dog.yaml"))        # -> runs/dog/dog.safetensors

Everything random in a step is a function of (seed, step, index in the global batch): see diffusion.draw. So a resumed
run is the uninterrupted one, and two processes are one with twice the batch.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch

from diffusekrona_train import checkpoint, faults, folder, memory, setup, weights
from diffusekrona_train.config import RunConfig
from diffusekrona_train.descent import BAD_IN_A_ROW
from diffusekrona_train.diffusion import learning_rate_factor
from diffusekrona_train.journal import Stop
from diffusekrona_train.run import FIRST_STEPS, Run, assemble, fit_gradients, gradients
from diffusekrona_train.validate import Interrupted


class Diverged(RuntimeError):
    """Several steps in a row were not finite."""


# ---- one step and the loop -----------------------------------------------------------------------------------------


def training_step(run: Run, step: int) -> torch.Tensor:
    """Gradients of the global batch, then one optimiser step; nothing here waits for the device.

    Returns the processes' averaged wish to stop, on the device.
    """
    if step < run.start + FIRST_STEPS:
        fit_gradients(run, step)
    else:
        gradients(run, step)
    return run.descent.step(learning_rate(run, step), run.stop.signum is not None)


def learning_rate(run: Run, step: int) -> float:
    train = run.config.train
    return train.learning_rate * learning_rate_factor(train.schedule, step, train.steps, train.warmup_steps)


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
        kept = checkpoint.states(run.folder)
        good = run.folder / "checkpoints" / kept[0].name / "adapter.safetensors" if kept else None
        raise Diverged(
            f"loss or gradient was not finite {BAD_IN_A_ROW} steps in a row before step {done}. Start a new run, with "
            f"another output and a train.learning_rate below {run.config.train.learning_rate:g}"
            + (f"; train.init_from: {good} lets it begin at the last good checkpoint" if good else "")
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
        setup.free(run.accelerator.device)
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


def name_the_best(run: Run) -> None:
    """Measures all checkpoints and says which one is best; a failure is told and costs nothing but the answer."""
    from diffusekrona_train.evaluate import best_checkpoint

    run.objective.denoiser = None  # the evaluation loads the base itself; the factors are saved
    setup.free(run.accelerator.device)
    try:
        best = best_checkpoint(run.folder, quantize=run.level.quantize)  # what fits training fits this
    except Exception as error:
        run.journal.say(f"keep_best: the checkpoints were not measured ({type(error).__name__}: {error})")
        return
    if best is not None:
        run.journal.say(f"best checkpoint: {run.folder / best['adapter']} (step {best['chosen_step']})")


def refresh_report(run: Run) -> None:
    """`report.html` and `loss.png`, as far as the run has come."""
    if not run.main or not run.config.validation.report:
        return
    for name, write in (("report.html", "write_run_report"), ("loss.png", "write_loss_plot")):
        try:
            from diffusekrona_train import report  # a plotting library: not before it is needed

            getattr(report, write)(run.folder)
        except Exception as error:
            run.journal.warn(f"{name} was not written", error)


# ---- the whole -----------------------------------------------------------------------------------------------------


def train(config: RunConfig, *, resume: bool = False, resume_from: str | None = None, overwrite: bool = False) -> Path:
    """Trains what the config describes; returns the final adapter file.

    Raises a one-line ValueError for what the user can put right, SystemExit(130 or 143) after a signal (saved), and
    RuntimeError for a fault. `resume` goes on from the newest state in the output folder, `resume_from` from the
    given one.
    """
    stop, place = Stop(), Path(config.output).expanduser()
    resuming = resume or resume_from is not None
    folder.refuse_existing(place, resume=resuming, overwrite=overwrite)
    accelerator, dtype = setup.start_accelerator(config, place)
    with stop.listening(), folder.claimed(place, accelerator.is_main_process):
        faults.reach("setup")
        state = checkpoint.read(Path(resume_from)) if resume_from else checkpoint.newest(place) if resume else None
        if state is None and resume:
            checkpoint.refuse_lost(place)
        if state is not None:
            checkpoint.refuse_changes(state, config.model_dump(mode="json", by_alias=True), accelerator.num_processes)
        try:
            run = assemble(config, place, accelerator, dtype, state, stop)
        except RuntimeError as error:
            if not memory.ran_out(error):
                raise
            raise RuntimeError(memory.out_of_memory()) from error
        stop.in_loop = True
        try:
            loop(run)
            path = finish(run)
            if config.train.keep_best:
                name_the_best(run)
        except RuntimeError as error:
            if (told := explained(run, error)) is None:
                raise
            raise told from error
        finally:
            run.journal.close()
        accelerator.end_training()
        if stop.signum is not None:
            raise SystemExit(stop.status)
    return path


def explained(run: Run, error: RuntimeError) -> RuntimeError | None:
    """What to do about memory that ended, a compiler that failed or a process that was lost; None for other errors."""
    kept = checkpoint.states(run.folder)
    last = f"; go on from {kept[0].name} with --resume" if kept else ""
    if memory.ran_out(error):
        return RuntimeError(memory.out_of_memory(run.level) + last)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(str(error).split())[:200]
        return RuntimeError(f"torch.compile failed ({reason}); set train.compile: false{last}")
    if run.accelerator.num_processes > 1 and re.search("gloo|NCCL", str(error)):
        return RuntimeError(f"another process of this run ended, or the connection to it broke{last}")
    return None


def finish(run: Run) -> Path:
    """The final adapter, preview and report; prints what to do next."""
    config = run.config
    path = run.folder / f"{config.name}.safetensors"
    if not run.main:
        return path
    faults.reach("end", config.train.steps)
    try:
        weights.save_adapter(path, run.objective.injection, setup.adapter_info(config, run.source, config.train.steps))
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be written ({error.strerror or error}); the checkpoints are whole, finish with --resume"
        ) from error
    try:
        run.gallery.preview(config.train.steps, path.with_suffix(".png"))
    except Exception as error:
        run.journal.warn(f"{path.stem}.png was not written", error)
    refresh_report(run)
    run.journal.close()
    size = path.stat().st_size / 2**20
    minutes, seconds = divmod(round(run.journal.seconds), 60)
    prompt = config.validation.prompts[0] if config.validation.prompts else config.subject.prompt
    prompt = prompt.replace("{class}", config.subject.class_noun)
    print(
        f"done: {config.train.steps} steps in {minutes} min {seconds} s: {path} ({size:.1f} MiB)\n"
        f'try it:    krona-sample {run.folder} "{prompt}"\n'
        f"in code:   from diffusekrona_train.weights import load_adapter\n"
        f'           load_adapter(pipe, "{path}")\n'
        f"elsewhere: ComfyUI, A1111 and Forge read the file as it is; for diffusers and others:\n"
        f"           {weights.export_command(weights.read_adapter(path), path, config.model)}"
    )
    return path
