"""Whole training runs for tests: tiny models, drawn photos, configs, and children that may die by a signal.

Children are forked, so that they need not import torch and diffusers anew.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusekrona_train.cli.train import run as command
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.config import RunConfig, make_config
from diffusekrona_train.training.checkpoint import State, newest
from tests.tiny import make_pipeline
from tests.tiny.photos import draw_photos

__all__ = ["command", "draw_photos"]


def make_world(folder: Path, kind: str = "sdxl") -> Path:
    """A folder with `model` and `photos`, for make_run."""
    make_pipeline(kind, folder / "model", width=16 if kind == "sdxl" else 32)
    draw_photos(folder / "photos")
    return folder


def make_run(world: Path, output: Path, **sections: Any) -> RunConfig:
    """A config of 6 steps at 64 pixels; sections are merged over it, as train={"steps": 9}.

    It writes no report, which would take half of its time: tests that look at one ask for it.
    """
    tree = {
        "model": str(world / "model"),
        "subject": {"images": str(world / "photos"), "class": "dog"},
        "adapter": {"a1": 4, "a2": 4},
        "data": {"resolution": 64, "cache_dir": str(world / "cache")},
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 2, "log_every": 1},
        "validation": {"every": 0, "steps": 2, "loss": False, "report": False},
        "output": str(output),
    }
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(tree.get(name), dict) else values
    return make_config(tree)


def factors(folder: Path, name: str | None = None) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name or folder.name}.safetensors")


def same_factors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def newest_state(folder: Path) -> State:
    """The newest resume state of a run folder, which has one."""
    state = newest(folder)
    assert state is not None, f"{folder} has no resume state"
    return state


class Told(Progress):
    """Keeps what a run reports."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, dict[str, Any]]] = []

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    @property
    def text(self) -> str:
        """Messages and warnings, one a line."""
        return "\n".join(fields["text"] for event, fields in self.events if event in ("message", "warning"))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


def _child(target, env: dict, log: Path) -> None:
    os.environ.update(env)
    # a run of the parent, in the same pytest process, has left its own answer to "how many are we?"
    AcceleratorState._reset_state(reset_partial_state=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    target()


def start(target, log: Path, **env: str) -> Any:
    """A forked child that runs `target()` with `env`; what it prints goes to `log`."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(target, env, log))
    child.start()
    return child


def finish(child: Any, seconds: float = 120) -> int:
    """The child's exit code (minus the signal's number where it was killed); the child must end in time."""
    child.join(seconds)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive, "the child did not end by itself"
    return child.exitcode  # type: ignore[return-value]


def world_env(count: int) -> list[dict[str, str]]:
    """The environment of each of `count` processes, as a launcher sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
