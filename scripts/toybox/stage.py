"""What the stages share: batches of pixels, an average of weights, states to go on from, numbers and sheets."""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusekrona_train.common.files import atomic


def pixels(pictures: np.ndarray, device="cpu") -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Average:
    """Exponential moving average of a module's floating-point state, quick at first."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def follow(self, module: torch.nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (20 + self.steps))
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


def save_state(path: Path, **state: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> dict | None:
    return torch.load(path, weights_only=True) if path.is_file() else None


def finish(build: Path, stage: str, numbers: dict, pictures: list[np.ndarray] | None = None) -> None:
    """Numbers to STAGE.json and to the screen, rows of pictures to STAGE.png."""
    with atomic(build / f"{stage}.json") as temporary:
        Path(temporary).write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{stage}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()), flush=True)
    if pictures:
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in pictures], axis=0)
        Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2)).save(build / f"{stage}.png")


def neighbours(pictures: np.ndarray, rows: Tensor, wanted: Tensor, number: int = 8) -> list[np.ndarray]:
    """Rows of a sheet: for each wanted embedding the pictures (N, 64, 64, 3) whose embeddings (N, D) are nearest."""
    rows, wanted = (torch.nn.functional.normalize(x.float().cpu(), dim=-1) for x in (rows, wanted))
    return [pictures[order[:number].numpy()] for order in (wanted @ rows.T).argsort(dim=1, descending=True)]


class Pace:
    """Says every so many steps how a stage goes."""

    def __init__(self, stage: str, steps: int, every: int = 100) -> None:
        self.stage, self.steps, self.every, self.start, self.losses = stage, steps, every, time.monotonic(), []

    def step(self, done: int, loss: float) -> None:
        self.losses = [*self.losses[1 - self.every :], loss]
        if done % self.every == 0:
            seconds = time.monotonic() - self.start
            print(f"{self.stage} {done}/{self.steps} loss {np.mean(self.losses):.4f} after {seconds:.0f} s", flush=True)
