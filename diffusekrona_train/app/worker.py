"""What needs torch, in one other process that keeps its imports: checks, images, exports. A crash costs one answer.

The process ends with the server, also where the server was killed.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from diffusekrona_train.config import RunConfig

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
    warnings.simplefilter("ignore")
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def briefly(config: RunConfig) -> dict[str, list[str]]:
    """Return what a page shows of `krona-train --check`."""
    from diffusekrona_train.training.check import check_briefly

    return check_briefly(config)


def generate(source: str | None, prompts: Sequence[str], options: Mapping[str, Any]) -> None:
    """Generate and save images; `options` are fields of SampleRequest."""
    from diffusekrona_train.sampling import sample

    for _ in sample(source, prompts, **options):
        pass


def export_lora(source: Path, target: Path) -> None:
    """Write the exact LoRA of an adapter file."""
    from diffusekrona_train.adapters.formats import EXPORTERS, open_adapter
    from diffusekrona_train.adapters.formats.exports import exact_rank

    file = open_adapter(source)
    rank = max(map(exact_rank, file.groups.values()), default=None)  # exact, also where a dense matrix were smaller
    EXPORTERS["lora"](file, target, dtype="fp32", rank=rank, source=None)


def warm_up() -> None:
    """Import what generating needs, so that the first image does not wait for it."""
    import diffusekrona_train.sampling  # noqa: F401
