"""krona-train against diffusers' DreamBooth LoRA script: the same random SDXL, photos and device (point 7).

    python -m scripts.bench.peers examples/dreambooth/train_dreambooth_lora_sdxl.py --device cpu [--tiny-vae]

Both programs run in turns as a user runs them, photos in and adapter out, each in a process of its own that notes when
an optimiser step ends. On a CPU the small model has SDXL's real VAE (84 M parameters, random): its encoder is what a
program that caches latents leaves out of each step. `--tiny-vae` shows the step without that part.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import statistics
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.bench.run import settings
from scripts.bench.setting import ROOT, Rows, Setting, Values, run_json

STEPS = 25
OURS, THEIRS, AGAIN = "krona-train", "diffusers' script", "krona-train, cache filled"
STARTER = """
import json, runpy, sys, time
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from scripts.bench.peers import stand_in_for_torchvision
if sys.argv[2] == "script":
    stand_in_for_torchvision()
result, kind, program = sys.argv[1:4]
sys.argv = sys.argv[3:]
on_gpu = torch.cuda.is_available()
times = []
def note(*_):
    if on_gpu:
        torch.cuda.synchronize()
    times.append((time.time(), time.process_time()))
register_optimizer_step_post_hook(note)
run = runpy.run_module if kind == "module" else runpy.run_path
try:
    run(program, run_name="__main__")
except SystemExit as ended:
    if ended.code:
        raise
peaks = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
json.dump({"times": times, "peak": [peak() / 2**30 if on_gpu else None for peak in peaks]}, open(result, "w"))
"""
"""Runs a program and notes the wall's and the process's time after each optimiser step, and the peak of its memory."""


def stand_in_for_torchvision() -> None:
    """Where torchvision is missing, offer the few transforms of it that diffusers' script uses, with its results."""
    if importlib.util.find_spec("torchvision"):
        return
    import diffusers  # noqa: F401  looks itself whether torchvision is there, and must not find this
    import transformers

    transformers.utils.is_torchvision_available()
    whole, functional = ModuleType("torchvision"), ModuleType("torchvision.transforms.functional")
    transforms: Any = ModuleType("torchvision.transforms")
    bilinear = Image.Resampling.BILINEAR
    transforms.InterpolationMode = SimpleNamespace(BILINEAR=bilinear, LANCZOS=Image.Resampling.LANCZOS)
    for kind in (Resize, CenterCrop, RandomCrop, RandomHorizontalFlip, Compose, ToTensor, Normalize):
        setattr(transforms, kind.__name__, kind)
    functional.crop = lambda image, y, x, h, w: image.crop((x, y, x + w, y + h))  # type: ignore[attr-defined]
    whole.transforms, transforms.functional = transforms, functional  # type: ignore[attr-defined]
    for module in (whole, transforms, functional):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


class Resize:
    """The shorter side to `size` pixels."""

    def __init__(self, size: int, interpolation: Any):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        width, height = (max(self.size, int(self.size * side / shorter)) for side in image.size)
        return image.resize((width, height), self.interpolation)


class RandomCrop:
    """A square of `size` pixels anywhere."""

    def __init__(self, size: int):
        self.size = size

    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        return random.randint(0, image.height - size[0]), random.randint(0, image.width - size[1]), *size

    def __call__(self, image: Image.Image) -> Image.Image:
        y, x, _, _ = self.get_params(image, (self.size, self.size))
        return image.crop((x, y, x + self.size, y + self.size))


class CenterCrop(RandomCrop):
    """The square of `size` pixels in the middle."""

    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        return (image.height - size[0]) // 2, (image.width - size[1]) // 2, *size


class RandomHorizontalFlip:
    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < self.p else image


class Compose:
    def __init__(self, steps: list[Any]):
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class ToTensor:
    """(3, H, W) from 0 to 1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: list[float], std: list[float]):
        self.mean, self.std = mean[0], std[0]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std


def timed(setting: Setting, kind: str, program: str, words: list[str], **environment: str) -> Values:
    """Run a program; seconds a step (median), of the CPU a step, from its start to the first step, GiB at the peak."""
    import time

    result, began = setting.out / "peer.json", time.time()
    found = run_json([sys.executable, "-c", STARTER, str(result), kind, program, *words], result, **environment)
    times = found["times"]
    gaps = [[b - a for a, b in zip(one, one[1:], strict=False)] for one in zip(*times, strict=True)]
    step, cpu = (statistics.median(gap) for gap in gaps)
    return {
        "ms a step": 1e3 * step,
        "ms of the CPU a step": 1e3 * cpu,
        "s to the first step": times[0][0] - began,
        "GiB allocated": found["peak"][0],
        "GiB reserved": found["peak"][1],
    }


def ours(setting: Setting, steps: int, way: str, name: str, cache: str = "cache", **more: Any) -> Values:
    """krona-train as its command, with `train.memory: way`; latents and texts are cached in the folder `cache`."""
    changes = {"train.steps": steps, "train.memory": way, "validation.every": 0, "train.log_every": steps, **more}
    changes["data.cache_dir"] = setting.out / cache
    config = ROOT / "configs" / "sdxl.yaml"
    words = [
        word
        for item in settings(setting, config, changes, name).items()
        for word in ("--set", "=".join(map(str, item)))
    ]
    return timed(setting, "module", "diffusekrona_train", ["--config", str(config), *words, "--overwrite"])


def theirs(setting: Setting, steps: int, way: str) -> Values:
    """diffusers' script with the rank of the paper's LoRA and this project's precision."""
    if setting.script is None:
        raise ValueError("give its path with --diffusers-script")
    options = {
        "pretrained_model_name_or_path": setting.model("sdxl"),
        "instance_data_dir": photos_without_captions(setting),
        "instance_prompt": "A sks dog",
        "output_dir": setting.out / "runs" / "peer-theirs",
        "resolution": setting.side("sdxl"),
        "train_batch_size": 1,
        "max_train_steps": steps,
        "rank": 4,
        "learning_rate": 1e-4,
        "seed": 0,
        "dataloader_num_workers": 0,
        "mixed_precision": "bf16" if setting.device == "cuda" else "no",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--gradient_checkpointing"] if way == "checkpointing" else []
    environment = {} if setting.device == "cuda" else {"ACCELERATE_USE_CPU": "true"}
    return timed(setting, "script", str(setting.script), words, **environment)


def photos_without_captions(setting: Setting) -> Path:
    """The photos alone: the script opens every file of the folder as an image."""
    folder = setting.out / "photos-alone"
    folder.mkdir(exist_ok=True)
    for file in setting.photos().glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def measure_first(setting: Setting) -> None:
    """Both programs once, plain: diffusers' first, since the rows of the step itself show ours."""
    steps = 4 if setting.small else STEPS
    title = f"sdxl {setting.side('sdxl')}, batch 1, plain"
    setting.rows.attempt(7, f"{title}: {THEIRS}", lambda: theirs(setting, steps, "plain"), needs=70)
    setting.rows.attempt(7, f"{title}: {OURS}", lambda: ours(setting, steps, "plain", "peer-ours"), needs=40)
    compare_steps(setting, title)


def measure(setting: Setting) -> None:
    steps = 4 if setting.small else STEPS
    for way in ("plain", "checkpointing"):
        title = f"sdxl {setting.side('sdxl')}, batch 1, {way}"
        run = {
            OURS: lambda way=way: ours(setting, steps, way, "peer-ours"),
            THEIRS: lambda way=way: theirs(setting, steps, way),
        }
        for name in (OURS, THEIRS):
            setting.rows.attempt(7, f"{title}: {name}", run[name])
        compare_steps(setting, title)


def compare_steps(setting: Setting, title: str) -> None:
    mine, other = (setting.rows.find(7, f"{title}: {name}") for name in (OURS, THEIRS))
    if mine and other:
        ratio = other["ms a step"] / mine["ms a step"]
        goal = ("krona-train no slower", lambda found: found["x the time of krona-train"] >= 1)
        setting.rows.conclude(7, f"{title}: diffusers' step", {"x the time of krona-train": ratio}, goal)


# ---- on its own: a small model, both programs in turns ---------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("script", type=Path, help="train_dreambooth_lora_sdxl.py of a diffusers checkout")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="how often each program runs")
    parser.add_argument("--steps", type=int, default=11, help="steps of each program")
    parser.add_argument("--tiny-vae", action="store_true", help="a VAE of some thousand parameters for both programs")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        setting = Setting("small", Path(name), Rows(Path(name) / "rows.json"), given.script.resolve())
        if not given.tiny_vae:
            real_vae().save_pretrained(setting.model("sdxl") / "vae")
        found: dict[str, list[Values]] = {OURS: [], THEIRS: [], AGAIN: []}
        for number in range(given.rounds):
            found[OURS].append(ours(setting, given.steps, "plain", "ours", f"cache-{number}"))
            found[THEIRS].append(theirs(setting, given.steps, "plain"))
            found[AGAIN].append(ours(setting, given.steps, "plain", "again", f"cache-{number}"))
    show(found, given)


def show(found: dict[str, list[Values]], given: argparse.Namespace) -> None:
    names = ("ms a step", "ms of the CPU a step", "s to the first step")
    print(f"whole programs, batch 1, {'tiny' if given.tiny_vae else 'SDXL'} VAE, median of {given.rounds} rounds")
    print(f"{'':28}" + "".join(f"{name:>24}" for name in names))
    middle = {label: [statistics.median(row[name] for row in rows) for name in names] for label, rows in found.items()}
    for label, values in middle.items():
        print(f"{label:28}" + "".join(f"{value:24,.1f}" for value in values))
    print(f"a step of diffusers' script takes {middle[THEIRS][0] / middle[OURS][0]:.2f}x ours")


def real_vae() -> Any:
    """SDXL's autoencoder, 84 M parameters of which the encoder has 34 M, with random weights."""
    from tests.tiny import real_part

    return real_part("sdxl", "vae")


if __name__ == "__main__":
    main()
