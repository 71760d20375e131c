"""What needs torch, in one other process that keeps its imports: checks, images, exports.

The server answers at once and stays small; a crash here costs one answer. The process ends with the server, also where
the server was killed.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Worker:
    """The process, started at the first call; one call at a time."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what the process computes; RuntimeError where it died."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
        try:
            return await asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))
        except BrokenProcessPool:
            self._pool = None
            raise RuntimeError("the process that generates images ended (out of memory?); try again") from None

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is the server's
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it warns of kernels that no one here needs
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def check(tree: dict[str, Any]) -> dict[str, list[str]]:
    """Return what `krona-train --check` says of a config: on its photos, its identifier, and what it will do."""
    from diffusekrona_train.config import make_config
    from diffusekrona_train.data import collect, plan_crops
    from diffusekrona_train.models import configured_model
    from diffusekrona_train.training.check import identifier_lines
    from diffusekrona_train.training.check.advice import advise
    from diffusekrona_train.training.check.needs import device_lines, memory_lines

    config = make_config(tree)
    photos = collect(config)
    advice = list(advise(plan_crops(photos.pictures, config.data, config.train.seed)))
    advice += ["few: three to ten photos from several sides show more than two"] if len(photos.pictures) == 2 else []
    advice += [f"{name}: {why}" for name, why in (*photos.skipped, *photos.remarks)]
    source, train = configured_model(config), config.train
    views = train.steps * train.batch_size * train.gradient_accumulation / len(photos.pictures)
    plan = [f"{train.steps} steps, in which each photo is seen {views:.0f} times", *memory_lines(config, source)[:1]]
    identifier = identifier_lines(config, source, photos)
    return {"advice": advice, "identifier": identifier, "plan": [*plan, *device_lines()]}


def generate(source: str | None, prompts: Sequence[str], options: Mapping[str, Any]) -> None:
    """Generate and save images; `options` are fields of SampleRequest."""
    from diffusekrona_train.sampling import sample

    for _ in sample(source, prompts, **options):
        pass


def export_lora(source: Path, target: Path) -> None:
    """Write the exact LoRA of an adapter file."""
    from diffusekrona_train.adapters.formats import EXPORTERS, open_adapter

    EXPORTERS["lora"](open_adapter(source, None), target, dtype="fp32", rank=None, source=None)


def warm_up() -> None:
    """Import what generating needs, so that the first image does not wait for it."""
    import diffusekrona_train.sampling
    import diffusekrona_train.training.check  # noqa: F401
