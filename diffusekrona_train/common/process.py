"""The process as a library finds it: its launcher, and the settings, random state and log levels that it hands back."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from diffusekrona_train.common.device import random_state_of_cards

T = TypeVar("T")
LIBRARIES = ("diffusers", "transformers")
"""Libraries with a verbosity and progress bars of their own."""
FLAGS: list[tuple[Any, str]] = [
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "deterministic"),
]


def world_size() -> int:
    """Return how many processes the launcher started (`accelerate launch`, torchrun); 1 without one."""
    world = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(world)) if world.isdigit() else 1


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Put back, however the block ends, everything global that training and sampling change.

    That is torch's flags, default type, threads and random states, Python's and numpy's random state, the environment,
    accelerate's singletons, and the log levels and progress bars of diffusers, transformers and bitsandbytes. What an
    exception's frames hold is let go, so that a model is freed also where training failed.
    """
    with contextlib.ExitStack() as restoring:
        for keep in (_environment, _torch_settings, _compiler, _random_states, _log_levels, _accelerate):
            restoring.callback(keep())
        try:
            yield
        except BaseException as error:
            _clear_frames(error)
            raise


def step_by_step(items: Iterator[T]) -> Iterator[T]:
    """Yield from `items`, each made within `as_found`: between two of them the caller finds everything as it was.

    accelerate's singletons are the items' own: each finds them as the one before has left them.
    """
    own: list[dict[str, Any]] = [{} for _ in _singletons()]

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        with as_found():
            for state, kept in zip(_singletons(), own, strict=True):
                state.update(kept)
            try:
                yield
            finally:
                own[:] = [dict(state) for state in _singletons()]

    try:
        while True:
            with inside():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
            del item
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            with inside():
                close()


def _environment() -> Callable[[], None]:
    before = dict(os.environ)

    def restore() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})

    return restore


def _torch_settings() -> Callable[[], None]:
    flags = [getattr(holder, name) for holder, name in FLAGS]
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    gradients = torch.is_grad_enabled()

    def restore() -> None:
        for (holder, name), value in zip(FLAGS, flags, strict=True):
            setattr(holder, name, value)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_grad_enabled(gradients)

    return restore


def _compiler() -> Callable[[], None]:
    """Do nothing if torch's compiler is not loaded; who compiles loads it before `as_found`."""
    config = sys.modules.get("torch._dynamo.config")
    limit = getattr(config, "recompile_limit", None)

    def restore() -> None:
        if config is not None:
            config.recompile_limit = limit  # type: ignore[attr-defined]

    return restore


def _random_states() -> Callable[[], None]:
    import numpy as np

    python, numbers, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    restore_cards = random_state_of_cards()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(host)
        restore_cards()

    return restore


def _log_levels() -> Callable[[], None]:
    """Give a library that was not loaded before its own defaults back: warnings, and progress bars."""
    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    before = {name: _verbosity(name) for name in LIBRARIES}
    hub_bars = _hub_bars()

    def restore() -> None:
        bitsandbytes.setLevel(level)
        with warnings.catch_warnings():  # where HF_HUB_DISABLE_PROGRESS_BARS is set, switching them on only warns
            warnings.simplefilter("ignore")
            _restore_libraries(before, hub_bars)

    return restore


def _restore_libraries(before: dict[str, tuple[int, bool] | None], hub_bars: bool | None) -> None:
    for name, found in before.items():
        if name in sys.modules:
            library = sys.modules[name].utils.logging
            verbosity, bars = found or (logging.WARNING, True)
            library.set_verbosity(verbosity)
            (library.enable_progress_bar if bars else library.disable_progress_bar)()
    if hub_bars != _hub_bars():  # transformers' switch moves the hub's too
        utils = sys.modules["huggingface_hub.utils"]
        (utils.disable_progress_bars if hub_bars is False else utils.enable_progress_bars)()


def _verbosity(name: str) -> tuple[int, bool] | None:
    if name not in sys.modules:
        return None
    library = sys.modules[name].utils.logging
    return library.get_verbosity(), library.is_progress_bar_enabled()


def _hub_bars() -> bool | None:
    """Return whether huggingface_hub shows progress bars; None where it is not loaded."""
    utils = sys.modules.get("huggingface_hub.utils")
    return None if utils is None else not utils.are_progress_bars_disabled()


def _singletons() -> list[dict[str, Any]]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]


def _accelerate() -> Callable[[], None]:
    """Give the block singletons of its own: another precision or device than the last run's would be refused."""
    shared = _singletons()
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()

    def restore() -> None:
        for state, found in zip(shared, before, strict=True):
            state.clear()
            state.update(found)

    return restore


def _clear_frames(error: BaseException) -> None:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        waiting += [one.__cause__, one.__context__]
