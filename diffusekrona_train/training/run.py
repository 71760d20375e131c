"""Run a whole training: claim the folder, set up, loop, save the final adapter.

Everything random in a step is a function of (seed, step, index in the global batch), see `training.draw`. So a resumed
run equals the uninterrupted one, and two processes equal one with twice the batch.
"""

from __future__ import annotations

import re
from pathlib import Path

from diffusekrona_train.adapters import formats
from diffusekrona_train.common import faults, run_folder
from diffusekrona_train.common.device import free, ran_out
from diffusekrona_train.common.progress import EventLog, Progress, Stopped, TrainResult
from diffusekrona_train.config import RunConfig
from diffusekrona_train.sampling.session import Memory
from diffusekrona_train.training import checkpoint, memory, setup
from diffusekrona_train.training.base import Base
from diffusekrona_train.training.loop import loop, refresh_report
from diffusekrona_train.training.setup import Run, Start

LAST_LOSSES = 10
"""How many of the last logged losses a result holds."""


def train(
    config: RunConfig, progress: Progress, *, resume: bool, resume_from: Path | None, overwrite: bool
) -> TrainResult:
    """Train what the config describes; `training.train` says what is returned and raised."""
    folder = Path(config.output).expanduser()
    run_folder.refuse_existing(folder, resume=resume or resume_from is not None, overwrite=overwrite)
    accelerator, dtype = setup.start_accelerator(config, folder)
    events = EventLog(progress, accelerator.is_main_process)
    with run_folder.claimed(folder, accelerator.is_main_process):
        try:
            run = set_up(Start(config, folder, accelerator, dtype, events), resume, resume_from)
            result = work(run)
        except Stopped as stopped:
            events.report("phase", name="stopped", step=stopped.step)
            accelerator.end_training()
            raise
        except Exception as error:
            events.report("phase", name="failed", error=" ".join(str(error).split()) or type(error).__name__)
            raise
        events.report("phase", name="finished", step=result.steps)
    accelerator.end_training()
    return result


def set_up(start: Start, resume: bool, resume_from: Path | None, base: Base | None = None) -> Run:
    """Assemble the run at its first step, or at the step of the state that it resumes from; on a `base` that is loaded
    already, or one of its own."""
    faults.reach("setup")
    start.events.report("phase", name="prepare")
    warn = start.events.warning
    state = checkpoint.read(resume_from) if resume_from else checkpoint.newest(start.folder, warn) if resume else None
    if state is None and resume:
        checkpoint.refuse_lost(start.folder)
    if state is not None:
        config = start.config.model_dump(mode="json", by_alias=True)
        checkpoint.refuse_changes(state, config, start.accelerator.num_processes)
    try:
        return setup.assemble(start, state, base)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise RuntimeError(memory.out_of_memory()) from error


def work(run: Run) -> TrainResult:
    """Loop to the last step and save; a RuntimeError that a user can do something about says what."""
    try:
        loop(run)
        path = finish(run)
        if run.config.train.keep_best:
            name_the_best(run)
    except RuntimeError as error:
        if (explanation := explained(run, error)) is None:
            raise
        raise explanation from error
    finally:
        run.stop.obey()
    return TrainResult(path, run.config.train.steps, run.journal.seconds, tuple(run.journal.losses[-LAST_LOSSES:]))


def explained(run: Run, error: RuntimeError) -> RuntimeError | None:
    """What to do about memory that ended, a compiler that failed or a process that was lost; None for other errors."""
    kept = checkpoint.states(run.folder)
    last = f"; continue from {kept[0].name} with --resume" if kept else ""
    if ran_out(error):
        return RuntimeError(memory.out_of_memory(run.level) + last)
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(str(error).split())[:200]
        return RuntimeError(f"torch.compile failed ({reason}); set train.compile: false{last}")
    if run.accelerator.num_processes > 1 and re.search("gloo|NCCL", str(error)):
        return RuntimeError(f"another process of this run ended, or the connection to it broke{last}")
    return None


def finish(run: Run) -> Path:
    """Write the final adapter, preview and report, on the main process; return the adapter file."""
    config = run.config
    path = run.folder / f"{config.name}.safetensors"
    if not run.main:
        return path
    faults.reach("end", config.train.steps)
    try:
        with run.descent.shown():
            about = setup.adapter_info(config, run.source, config.train.steps)
            formats.save_adapter(path, run.objective.injection, about)
        formats.write_sidecar(path)
    except OSError as error:
        raise RuntimeError(
            f"{path} cannot be written ({error.strerror or error}); the checkpoints are intact; finish with --resume"
        ) from error
    run.journal.progress.report("saved", file=str(path), step=config.train.steps)
    try:
        run.gallery.preview(config.train.steps, path.with_suffix(".png"))
    except Exception as error:
        run.journal.warn(f"{path.stem}.png was not written", error)
    refresh_report(run)
    return path


def held_as(level: memory.Level) -> Memory:
    """Return how to hold the base while images are generated: what fits training fits."""
    small = level.quantize != "none"
    return Memory(quantize=level.quantize, offload="blocks" if level.offload else "none", vae_tiling=small)


def name_the_best(run: Run) -> None:
    """Measure all checkpoints and report which one is best; a failure costs only the answer."""
    from diffusekrona_train.evaluation import best_checkpoint

    progress = run.journal.progress
    progress.report("phase", name="evaluate")
    # the evaluation loads the base itself, and the factors are saved; the injection holds the denoiser too
    run.graphs.forget()
    run.objective.denoiser = run.objective.injection = None
    free()
    try:
        best = best_checkpoint(run.folder, memory=held_as(run.level), progress=progress)
    except Exception as error:
        progress.warning(f"keep_best: the checkpoints were not measured ({type(error).__name__}: {error})")
        return
    if best is not None:
        refresh_report(run)
        progress.message(f"best checkpoint: {run.folder / best['adapter']} (step {best['chosen_step']})")
