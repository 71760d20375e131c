"""What every point of the measurements shares: sizes, folders, the random pipelines and photos, one process a piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.bench.rows import Rows

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
BROKEN: dict[Path, str] = {}
"""Models that could not be made, and why: they are not tried again for every row."""


class Failed(RuntimeError):
    """A process of its own ended with an error; the last line that it said."""


@dataclass(frozen=True)
class Setting:
    """`size`: 'real', or 'small' for a dry run. Everything made lies in `out`."""

    size: str
    out: Path
    rows: Rows
    script: Path | None = None
    """diffusers' train_dreambooth_lora_sdxl.py, for the comparison in point 7."""

    @property
    def small(self) -> bool:
        return self.size == "small"

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def side(self, kind: str) -> int:
        """Pixels of a picture."""
        return 64 if self.small else {"sdxl": 1024, "sd21": 768}.get(kind, 512)

    def model(self, kind: str) -> Path:
        """The random pipeline of `kind` ('sdxl', 'sd15', 'sd21'), made at the first call."""
        folder = self.out / "models" / (f"small-{kind}" if self.small else kind)
        if (why := BROKEN.get(folder)) is not None:
            raise Failed(why)
        if not (folder / "model_index.json").is_file():
            size = f"small-{kind}" if self.small else kind
            command = [sys.executable, "-m", "tests.tiny", "--size", size, "--device", self.device]
            if folder.exists():  # half-made by a run that was stopped
                folder.rename(folder.with_name(f"{folder.name}-broken-{time.time():.0f}"))
            try:
                run([*command, str(folder)])
            except Failed as error:
                BROKEN[folder] = str(error)
                raise
        return folder

    def photos(self) -> Path:
        """Five drawn photos with captions, a little larger than the pictures."""
        from tests.tiny.photos import draw_photos

        folder = self.out / "photos"
        if not folder.is_dir():
            side = self.side("sdxl")
            draw_photos(folder, 5, sizes=((side + 16, side + 8), (side + 8, side + 40)))
            for file in folder.glob("*.png"):
                file.with_suffix(".txt").write_text("a photo of a sks dog on the beach")
        return folder


def run(command: list[str], *, timeout: float = 3600, **environment: str) -> str:
    """Output of a command in the project folder; Failed with its last line of stderr."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Failed(said[-1] if said else f"exit status {done.returncode}")
    return done.stdout


def run_json(command: list[str], result: Path, **options: Any) -> dict[str, Any]:
    """What a command wrote to the JSON file `result`."""
    result.unlink(missing_ok=True)
    run(command, **options)
    return json.loads(result.read_text())


def free() -> None:
    """Memory of dropped modules back to the device."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
