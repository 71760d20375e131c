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
from diffusekrona_train.config import RunConfig
from diffusekrona_train.training import checkpoint, memory, setup
from diffusekrona_train.training.journal import Stop
from diffusekrona_train.training.loop import loop, refresh_report
from diffusekrona_train.training.setup import Run, assemble


def name_the_best(run: Run) -> None:
    """Measures all checkpoints and says which one is best; a failure is told and costs nothing but the answer."""
    from diffusekrona_train.evaluation import best_checkpoint

    # the evaluation loads the base itself, and the factors are saved; the injection holds the denoiser too
    run.objective.denoiser = run.objective.injection = None
    free(run.accelerator.device)
    try:
        best = best_checkpoint(run.folder, quantize=run.level.quantize)  # what fits training fits this
    except Exception as error:
        run.journal.say(f"keep_best: the checkpoints were not measured ({type(error).__name__}: {error})")
        return
    if best is not None:
        refresh_report(run)
        run.journal.say(f"best checkpoint: {run.folder / best['adapter']} (step {best['chosen_step']})")


# ---- the whole -----------------------------------------------------------------------------------------------------


def train(config: RunConfig, *, resume: bool = False, resume_from: str | None = None, overwrite: bool = False) -> Path:
    """Trains what the config describes; returns the final adapter file.

    Raises a one-line ValueError for what the user can put right, SystemExit(130 or 143) after a signal (saved), and
    RuntimeError for a fault. `resume` goes on from the newest state in the output folder, `resume_from` from the
    given one.
    """
    stop, place = Stop(), Path(config.output).expanduser()
    resuming = resume or resume_from is not None
    run_folder.refuse_existing(place, resume=resuming, overwrite=overwrite)
    accelerator, dtype = setup.start_accelerator(config, place)
    with stop.listening(), run_folder.claimed(place, accelerator.is_main_process):
        faults.reach("setup")
        state = checkpoint.read(Path(resume_from)) if resume_from else checkpoint.newest(place) if resume else None
        if state is None and resume:
            checkpoint.refuse_lost(place)
        if state is not None:
            checkpoint.refuse_changes(state, config.model_dump(mode="json", by_alias=True), accelerator.num_processes)
        try:
            run = assemble(config, place, accelerator, dtype, state, stop)
        except RuntimeError as error:
            if not ran_out(error):
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
    if ran_out(error):
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
        formats.save_adapter(path, run.objective.injection, setup.adapter_info(config, run.source, config.train.steps))
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
        f"in code:   from diffusekrona_train.adapters.formats import load_adapter\n"
        f'           load_adapter(pipe, "{path}")\n'
        f"elsewhere: ComfyUI, A1111 and Forge read the file as it is; for diffusers and others:\n"
        f"           {formats.export_command(formats.read_adapter(path), path, config.model)}"
    )
    return path
