"""Where a case happens: a folder of its own that is the working folder, with photos, configs, runs and adapter files.

    box = Sandbox(folder, shared)
    box.photos(); box.config({"train.steps": 2})        # -> box.folder/photos/*.png, box.folder/dog.yaml

`Shared` makes the dear things once for all cases: a finished run of the toybox with its cache and its adapter.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SMALL_RUN: dict[str, Any] = {
    "model": "toybox",
    "subject": {"images": "photos", "class": "dog"},
    "adapter": {"blocks": ["mid_block"]},
    "train": {"steps": 4, "batch_size": 1, "checkpoint_every": 1, "log_every": 1, "mixed_precision": "no"},
    "validation": {"prompts": ["A [V] dog"], "every": 4, "steps": 1, "loss": False},
    "output": "runs/dog",
}
"""A run of a few seconds that passes every phase: four checkpoints, two validations, an end."""


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `tree` with dotted keys set: {"train.steps": 0}; the value REMOVE takes a key out."""
    tree = copy.deepcopy(tree)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is REMOVE:
            place.pop(last, None)
        else:
            place[last] = value
    return tree


REMOVE = object()


@dataclass
class Shared:
    """What several cases use, made once under `folder` by `build(name, make)`."""

    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def build(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder `name`, filled by `make(folder)` the first time."""
        if name not in self.made:
            folder = self.folder / name
            folder.mkdir(parents=True)
            make(folder)
            self.made[name] = folder
        return self.made[name]


@dataclass
class Sandbox:
    folder: Path
    shared: Shared

    def path(self, name: str) -> Path:
        """A path in the sandbox whose parent folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path(name)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def photos(self, count: int = 3, folder: str = "photos", size: tuple[int, int] = (72, 64)) -> Path:
        """`count` PNG pictures that differ, of `size` (width, height)."""
        for index in range(count):
            picture(size, index).save(self.path(f"{folder}/{index:02d}.png"))
        return self.folder / folder

    def config(self, changes: dict[str, Any] | None = None, name: str = "dog.yaml") -> str:
        """Writes SMALL_RUN with `changes` as YAML; returns the file's name."""
        self.write(name, yaml.safe_dump(changed(SMALL_RUN, changes or {}), allow_unicode=True))
        return name

    def take(self, source: Path, name: str) -> Path:
        """A copy of a file or folder of the shared things."""
        target = self.path(name)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
        return target

    def find(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(pattern))

    def canary(self) -> Path:
        """What hostile files try to make; its presence means that code from a file was run."""
        return self.folder / "CANARY"


def picture(size: tuple[int, int], seed: int = 0) -> Any:
    """An RGB picture of smooth colours with a disc, a pure function of `seed`."""
    import numpy
    from PIL import Image

    width, height = size
    y, x = numpy.mgrid[0:height, 0:width].astype("float32")
    tones = [128 + 100 * numpy.sin(x / (5 + 3 * seed + i) + y / (7 + 2 * i) + seed) for i in range(3)]
    disc = (x - width * (0.3 + 0.1 * seed)) ** 2 + (y - height / 2) ** 2 < (min(size) / 4) ** 2
    pixels = numpy.stack(tones, -1)
    pixels[disc] = (220 - 40 * seed, 60 + 50 * seed, 30)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link under `folder` with a hash of what it holds (links: where they point)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def torn(path: Path) -> str:
    """Why the file at `path` is not whole, or '' where it is (or is of a kind that cannot be told)."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "np") as opened:
                for name in opened.keys():
                    opened.get_slice(name)
        elif path.suffix in (".png", ".jpg"):
            from PIL import Image

            with Image.open(path) as image:
                image.load()
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text("utf-8")
            for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(part)
        elif path.suffix in (".yaml", ".yml"):
            yaml.safe_load(path.read_text("utf-8"))
        elif path.suffix == ".html" and "</html>" not in path.read_text("utf-8")[-20:]:
            return "ends before </html>"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return ""
