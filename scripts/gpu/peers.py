"""Point 7: diffusers' own DreamBooth LoRA script on the same random SDXL, the same photos and the same card."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.gpu.peaks import watched
from scripts.gpu.rows import Values
from scripts.gpu.setting import ROOT, Setting, run_json

FEW, MORE = 5, 45
"""Steps of two runs; their difference is the time of a step, without the start."""


def measure(setting: Setting) -> None:
    few, more = (2, 4) if setting.small else (FEW, MORE)
    for way in ("plain", "checkpointing"):
        title = f"sdxl {setting.side('sdxl')}, batch 1, {way}"
        setting.rows.attempt(7, f"{title}: krona-train", lambda way=way: ours(setting, way, few, more))
        setting.rows.attempt(7, f"{title}: diffusers' script", lambda way=way: theirs(setting, way, few, more))
        both = [setting.rows.find(7, f"{title}: {name}") for name in ("krona-train", "diffusers' script")]
        if both[0] and both[1]:
            ratio = both[1]["ms a step"] / both[0]["ms a step"]
            goal = ("krona-train no slower", lambda found: found["x the time of krona-train"] >= 1)
            setting.rows.conclude(7, f"{title}: diffusers' step", {"x the time of krona-train": ratio}, goal)


def ours(setting: Setting, way: str, few: int, more: int) -> Values:
    found = []
    for steps in (few, more):
        changes = {"train.steps": steps, "train.memory": way, "validation.every": 0, "train.log_every": steps}
        found.append(watched(setting, ROOT / "configs" / "sdxl.yaml", changes, "peer-ours"))
    seconds = [sum((one["seconds"].get(phase, 0.0) for phase in ("first step", "steps")), start=0.0) for one in found]
    peak = found[1]["memory"].get("steps", (None, None))
    return per_step(seconds, more - few, peak)


def theirs(setting: Setting, way: str, few: int, more: int) -> Values:
    if setting.script is None:
        raise ValueError("give its path with --diffusers-script")
    found = [their_run(setting, setting.script, way, steps) for steps in (few, more)]
    return per_step([one["seconds"] for one in found], more - few, found[1]["peak"])


def per_step(seconds: list[float], steps: int, peak: tuple[float | None, float | None]) -> Values:
    values: Values = {"ms a step": 1e3 * (seconds[1] - seconds[0]) / steps}
    values["steps/s"] = 1e3 / values["ms a step"]
    return {**values, "GiB allocated": peak[0], "GiB reserved": peak[1]}


def their_run(setting: Setting, script: Path, way: str, steps: int) -> dict:
    """Their script in a process of its own, with the rank of the paper's LoRA and this project's precision."""
    options = {
        "pretrained_model_name_or_path": setting.model("sdxl"),
        "instance_data_dir": pictures_alone(setting),
        "instance_prompt": "A sks dog",
        "output_dir": setting.out / "runs" / f"peer-theirs-{steps}",
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
    result = setting.out / "peer-theirs.json"
    return run_json([sys.executable, "-c", STARTER, str(result), str(script), *words], result)


STARTER = """
import json, runpy, sys, time
import torch
result, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
began = time.perf_counter()
runpy.run_path(script, run_name="__main__")
peaks = (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
peak = [peak() / 2**30 if torch.cuda.is_available() else None for peak in peaks]
json.dump({"seconds": time.perf_counter() - began, "peak": peak}, open(result, "w"))
"""
"""Runs a script as a program and notes its time and the peak of its memory."""


def pictures_alone(setting: Setting) -> Path:
    """The photos without their captions: the script opens every file of the folder as a picture."""
    folder = setting.out / "photos-alone"
    folder.mkdir(exist_ok=True)
    for file in setting.photos().glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
