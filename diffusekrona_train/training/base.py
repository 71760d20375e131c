"""The frozen model of a run: at which memory level it is held, how it is loaded, how factors come into it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.utils.checkpoint
from accelerate import Accelerator

from diffusekrona_train.adapters import formats
from diffusekrona_train.adapters.inject import Injection, inject
from diffusekrona_train.config import RunConfig
from diffusekrona_train.models.contracts import Denoiser
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.training import memory

COMPILER = "inductor"
"""torch.compile's backend."""


@dataclass(frozen=True)
class Base:
    """A frozen model on the device, and how a run's factors come into it. Runs that are packed share one."""

    source: ModelSource
    level: memory.Level
    why: str
    """Why this level."""
    room: float | None
    """GiB that it leaves free; None where that is not known."""
    denoiser: Denoiser
    inject: Callable[[RunConfig], Injection]
    bare: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """A context in which the denoiser has no adapter."""


def load_base(
    config: RunConfig,
    source: ModelSource,
    accelerator: Accelerator,
    dtype: torch.dtype,
    chosen: tuple[memory.Level, str, float | None] | None = None,
) -> Base:
    """Load the model of one run, its frozen numbers in `dtype`; `chosen` is what `choose_level` answers."""
    level, why, room = chosen or choose_level(config, source, accelerator, dtype)
    with in_turn(accelerator, level.quantize != "none" or level.offload):
        denoiser = load_denoiser(config, source, level, dtype, accelerator.device)
    return Base(source, level, why, room, denoiser, lambda config: inject_factors(config, denoiser))


def choose_level(
    config: RunConfig, source: ModelSource, accelerator: Accelerator, dtype: torch.dtype
) -> tuple[memory.Level, str, float | None]:
    """The memory level of all processes, why, and how many GiB it leaves free: as the main one finds room."""
    samples = config.train.batch_size * (1 if config.prior.kind == "none" else 2)
    base = source.base_parameters()
    trained = memory.trained_parameters(config, source.layers(), base)
    figures, device = source.family.memory, accelerator.device
    level, why = memory.choose(config, base, samples, dtype, device, figures, trained)
    room = memory.room(level, config, base, samples, dtype, device, figures, trained)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        level, why, room = broadcast_object_list([level, why, room])
    return level, why, room


def load_denoiser(
    config: RunConfig, source: ModelSource, level: memory.Level, dtype: torch.dtype, device: torch.device
) -> Denoiser:
    """The frozen denoiser on the device, at a memory level."""
    train = config.train
    denoiser = source.load_denoiser(dtype, device, level.quantize, level.offload)
    if level.checkpointing:
        enable_checkpointing(denoiser)
    if train.channels_last:
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    return denoiser


@contextlib.contextmanager
def in_turn(accelerator: Accelerator, wanted: bool) -> Generator[None]:
    """Let the processes into the block one after the other, where `wanted`: a base that is quantised on its way to the
    device is whole in host memory until then, and so it is there once and not once a process."""
    rounds = accelerator.num_processes if wanted else 0
    for _ in range(min(accelerator.process_index, rounds)):
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        for _ in range(rounds - accelerator.process_index):
            accelerator.wait_for_everyone()


def enable_checkpointing(denoiser: Denoiser) -> None:
    """Compute blocks again in the backward pass. No layer is random: to set a generator's state back, a hundred times a
    step, would cost time and forbid to capture the step as a graph."""
    again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
    denoiser.enable_gradient_checkpointing(again)


def inject_factors(config: RunConfig, denoiser: Denoiser) -> Injection:
    """The adapter of the config in the denoiser, from the seed or from `init_from`. The same on every process."""
    if config.train.init_from is None:
        injection = inject(denoiser, config.adapter, seed=config.train.seed)
    else:
        injection = formats.inject_file(denoiser, formats.read_adapter(Path(config.train.init_from).expanduser()))
        injection.spec = config.adapter
    injection.assert_fp32()
    if config.train.compile:
        compile_blocks(denoiser)
    return injection


def compile_blocks(denoiser: Denoiser) -> None:
    """Compiles each transformer block: most of a step's work, and one small graph serves all blocks of a shape.

    The whole denoiser as one graph would be compiled for many minutes to be hardly faster. Shapes are static: a graph
    for each width of the model and size of the photos, and where a teacher is asked, one more without the adapter.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # beyond it: silently eager
    denoiser.compile_repeated_blocks(backend=COMPILER, dynamic=False)
