"""Count how far a reader walks: files between a photo and its gradient, and hand-overs of `config` between files.

    python -m tests.house_moves

Watches one step of a toybox run on a CPU. Photo to gradient: the files of the package that are entered while photos
become latents, and while a step goes from what it draws to the return of backward. What loads models, reads the config,
reports, or writes files (SET_UP) is left out. Config: calls from a function of one file to a function of another one
with the whole config among the arguments, from `train` to its return.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "diffusekrona_train."
PHOTO_BAR, CONFIG_BAR = 12, 30
SET_UP = ("config", "common", "models.source", "models.local", "models.hub", "models.singlefile", "models.__init__")
"""Modules that are no part of a photo's way, though they run meanwhile."""
WINDOWS = {"_image_maker.<locals>.make": "data.training_set", "StepGraphs.gradients": "training.graph"}
"""Function in which a photo is on its way, from opening it to its latents and from a draw to the return of backward ->
its module. What comes before (finding photos, planning crops) is set-up."""


class Moves:
    """What a profile function saw: files on a photo's way, and (from, to) of every hand-over of the config."""

    def __init__(self, config: Any):
        self.config = config
        self.files: dict[str, str] = {}
        """File -> the first of its functions that was entered."""
        self.handed: dict[tuple[str, str], None] = {}
        self._inside = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "return") or not (here := module_of(frame)):
            return
        name = frame.f_code.co_name
        if WINDOWS.get(frame.f_code.co_qualname) == here:
            self._inside += 1 if event == "call" else -1
        if event == "return":
            return
        if self._inside and not here.startswith(SET_UP) and name != "<module>":
            self.files.setdefault(here, name)
        back = frame.f_back
        there = module_of(back) if back else ""
        if back is not None and there and there != here and self._is_handed(frame):
            self.handed[(f"{there}.{back.f_code.co_name}", f"{here}.{name}")] = None

    def _is_handed(self, frame: FrameType) -> bool:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return any(frame.f_locals.get(name) is self.config for name in names if name != "self")


def module_of(frame: FrameType) -> str:
    """The module of a frame within the package, such as `training.loop`; '' for others."""
    name = str(frame.f_globals.get("__name__", ""))
    if not name.startswith(PACKAGE):
        return ""
    path = str(frame.f_globals.get("__file__", ""))
    return name.removeprefix(PACKAGE) + (".__init__" if path.endswith("__init__.py") else "")


@contextmanager
def profiled(profile: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def watch() -> Moves:
    """Train one step of the toybox and return what was seen."""
    from diffusekrona_train.config import make_config
    from diffusekrona_train.training import train

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            {
                "model": "toybox",
                "subject": {"images": "toybox:poodle", "class": "dog", "limit": 2},
                "train": {"steps": 1, "batch_size": 1},
                "validation": {"every": 1, "prompts": ["A [V] dog"], "seeds": [0], "steps": 1},
                "output": f"{folder}/run",
            }
        )
        moves = Moves(config)
        with profiled(moves):
            train(config)
        assert Path(folder, "run", "run.safetensors").is_file()
    return moves


def main() -> int:
    moves = watch()
    print(f"photo to gradient: {len(moves.files)} files (at most {PHOTO_BAR})")
    print(*(f"  {module.replace('.', '/')}.py  {first}" for module, first in moves.files.items()), sep="\n")
    print(f"config from train(): {len(moves.handed)} moves between files (at most {CONFIG_BAR})")
    print(*(f"  {caller} -> {callee}" for caller, callee in moves.handed), sep="\n")
    return 0 if len(moves.files) <= PHOTO_BAR and len(moves.handed) <= CONFIG_BAR else 1


if __name__ == "__main__":
    sys.exit(main())
