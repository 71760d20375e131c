"""What needs torch, in one other process that keeps its imports: model cards, checks, images, exports.

The server answers at once and stays small; a crash here costs one answer. The process ends with the server, also
where the server was killed.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from diffusekrona_train.config import EMBEDDED, MODEL_ALIASES, make_config

P = ParamSpec("P")
R = TypeVar("R")
Lines = dict[str, list[str]]
WORDS = {
    "sdxl": ("Stable Diffusion XL", "The most detail."),
    "sd15": ("Stable Diffusion 1.5", "Small, quick, with many fine-tuned bases."),
    "sd14": ("Stable Diffusion 1.4", "The base of many papers."),
    "sd21": ("Stable Diffusion 2.1", "Between 1.5 and XL."),
    "toybox": ("Toybox", "Comes with the studio: learns in minutes on any computer. To try things out."),
    "toybox-flow": ("Toybox Flow", "Comes with the studio too: a small flow-matching transformer."),
}
"""Alias -> title and a sentence; an alias without a row shows its name."""

SURE = "Fits every computer; nothing is downloaded."


@dataclass(frozen=True)
class Card:
    """A model to choose: does it fit this machine, and what it needs, in words."""

    alias: str
    title: str
    about: str
    fits: bool
    needs: str
    pixels: int = 0


class Worker:
    """The process, started at the first call; one call at a time."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return `function(*args)` as the process computes it; RuntimeError where the process died."""
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
            self._pool = None


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


# ---- what it does; everything here may import torch ------------------------------------------------------------------


def first_cards() -> list[Card]:
    """Return the cards before anything was looked at, the embedded models first."""
    order = sorted(MODEL_ALIASES, key=lambda alias: alias not in EMBEDDED)
    return [
        Card(
            alias,
            *WORDS.get(alias, (alias, "")),
            alias in EMBEDDED,
            SURE if alias in EMBEDDED else "Looking at this computer …",
        )
        for alias in order
    ]


def cards() -> list[Card]:
    """Return a card for each known model, what fits this machine first."""
    from diffusekrona_train.training.check.starter import free_gib

    free = free_gib()
    found = [_card(alias, free) for alias in MODEL_ALIASES]
    return sorted(found, key=lambda card: (not card.fits, -card.pixels))


def _card(alias: str, free: float | None) -> Card:
    title, about = WORDS.get(alias, (alias, ""))
    try:
        low, pixels = _needs(alias)
    except Exception:  # its configs come with its weights, which are not here yet
        return Card(alias, title, about, False, "Downloaded at the first run; what it needs is known then.")
    size = f"{pixels} × {pixels} pixels."
    if alias in EMBEDDED:
        return Card(alias, title, f"{size} {about}", True, SURE, pixels)
    if free is None:
        return Card(alias, title, f"{size} {about}", False, f"Needs a GPU with about {low:.0f} GB (estimated).", pixels)
    if low <= free:
        return Card(alias, title, f"{size} {about}", True, f"Fits: about {low:.0f} of {free:.0f} GB free.", pixels)
    needs = f"Needs about {low:.0f} GB (estimated), and {free:.0f} GB are free."
    return Card(alias, title, f"{size} {about}", False, needs, pixels)


def _needs(alias: str) -> tuple[float, int]:
    """(GiB at the lowest memory level, pixels of a side)."""
    import torch

    from diffusekrona_train.models import configured_model
    from diffusekrona_train.training.check.needs import base_parameters
    from diffusekrona_train.training.memory import estimate, levels

    config = make_config({"model": alias, "subject": {"images": "toybox:poodle", "class": "dog"}, "output": "x"})
    source = configured_model(config)
    megapixels = config.train.batch_size * (config.data.resolution / 1024) ** 2
    parameters = base_parameters(source)
    figures = source.family.memory
    needs = [estimate(level, parameters, megapixels, torch.bfloat16, figures) for level in levels(config)]
    return min(needs), config.data.resolution


def check(tree: dict[str, Any]) -> Lines:
    """Return the advice of `krona-train --check` on a config with photos: photos, identifier, steps, memory."""
    from diffusekrona_train.data import collect, plan_crops
    from diffusekrona_train.models import configured_model
    from diffusekrona_train.training.check import identifier_lines
    from diffusekrona_train.training.check.advice import advise
    from diffusekrona_train.training.check.needs import device_lines, memory_lines, step_lines

    config = make_config(tree)
    collection = collect(config)
    crops = plan_crops(collection.pictures, config.data, config.train.seed)
    advice = [*advise(crops), *(f"not used: {name}: {why}" for name, why in collection.skipped)]
    few = 1 < len(collection.pictures) < 3
    advice += ["few: 3 to 10 photos from several sides show the subject better than two"] if few else []
    advice += [f"{name}: {remark}" for name, remark in collection.remarks]
    source = configured_model(config)
    return {
        "advice": advice,
        "identifier": identifier_lines(config, source, collection),
        "plan": [*step_lines(config, collection)[:1], *memory_lines(config, source)[:1], *device_lines()],
    }


def generate(source: str, prompts: Sequence[str], options: Mapping[str, Any]) -> Lines:
    """Generate and save images; return the warnings. `options` are fields of SampleRequest."""
    from diffusekrona_train.common.progress import Progress
    from diffusekrona_train.sampling import sample

    told: list[str] = []
    progress = Progress(lambda event, fields: told.append(fields["text"]) if event == "warning" else None)
    for _ in sample(source, prompts, progress=progress, **options):
        pass
    return {"warnings": told}


def export_lora(source: Path, target: Path) -> None:
    """Write the exact LoRA of an adapter file."""
    from diffusekrona_train.adapters.formats import EXPORTERS, open_adapter

    EXPORTERS["lora"](open_adapter(source, None), target, dtype="fp32", rank=None, source=None)


def warm_up() -> None:
    """Import what generating needs, so that the first image does not wait for it."""
    import diffusekrona_train.sampling
    import diffusekrona_train.training.check  # noqa: F401
