"""Many subjects packed on one base against one after the other: wall time of whole processes, and kernels of a step.

    python -m scripts.bench.many                  # twelve subjects, 100 steps of batch 1, one thread; minutes
    python -m scripts.bench.many --kernels        # dispatcher counts of packed SDXL steps, without a GPU

Both ways train the same jobs on toybox, start-up included, one after the other: `krona-train --config` once a subject,
and `krona-train many --pack 8`. The ratio of the steps alone comes from the runs' own times. Kernels are counted as in
`scripts.bench.kernels`, on tensors with shapes and no content.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from diffusekrona_train.adapters.packed import Pack
from diffusekrona_train.data import toybox_subjects
from diffusekrona_train.fleet.step import PackedStep, Share
from diffusekrona_train.training.optimizer import SPARE, Descent
from scripts.bench.contender import Bench, OneProcess
from scripts.bench.kernels import Kernels, as_on_a_card, kernels
from scripts.bench.trace import SIDES
from tests.tiny import real_part

BAR = 1.8
"""How many times faster the packed way should be at batch 1, start-up included."""


def jobs(count: int) -> list[dict[str, Any]]:
    """Return jobs on the embedded subjects, each again with another seed where there are more jobs than subjects."""
    subjects = list(toybox_subjects().items())
    return [
        {"id": f"{i:02d}", "images": f"toybox:{name}", "class": about["class"], "seed": i}
        for i in range(count)
        for name, about in [subjects[i % len(subjects)]]
    ]


def settings(steps: int, batch: int) -> list[str]:
    fields = {
        "train.steps": steps, "train.batch_size": batch, "train.checkpoint_every": steps, "validation.every": 0,
        "validation.loss": "false", "validation.report": "false",
    }  # fmt: skip
    return [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]


def command(*words: str) -> float:
    """Run krona-train in a process of its own; return its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "diffusekrona_train.cli.train", *words], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"krona-train {' '.join(words)}: {done.stderr}")
    return time.monotonic() - began


def one_by_one(rows: list[dict[str, Any]], folder: Path, own: list[str]) -> tuple[float, float]:
    """Return seconds of all processes, and of their steps."""
    seconds = steps = 0.0
    for row in rows:
        config = folder / f"{row['id']}.yaml"
        subject = {"images": row["images"], "class": row["class"]}
        tree = {
            "model": "toybox",
            "subject": subject,
            "train": {"seed": row["seed"]},
            "output": str(folder / row["id"]),
        }
        config.write_text(json.dumps(tree))
        seconds += command("--config", str(config), *own)
        steps += json.loads((folder / row["id"] / "metrics.jsonl").read_text().splitlines()[-1])["time"]
    return seconds, steps


def packed(rows: list[dict[str, Any]], folder: Path, own: list[str], pack: int) -> tuple[float, float]:
    """Return seconds of the one process, and of its steps."""
    listed = folder / "jobs.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / "fleet"
    seconds = command("many", str(listed), "--model", "toybox", "--pack", str(pack), "--output", str(output), *own)
    records = [json.loads((output / row["id"] / "job.json").read_text()) for row in rows]
    return seconds, sum(record["device_seconds"] for record in records)


def race(count: int, steps: int, batch: int, pack: int) -> float:
    """Print and return how many times faster packed is, start-up included."""
    rows = jobs(count)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("one", "many")]
        for folder in folders:
            folder.mkdir()
        one = one_by_one(rows, folders[0], settings(steps, batch))
        many = packed(rows, folders[1], settings(steps, batch), pack)
    ratio, of_steps = one[0] / many[0], one[1] / many[1]
    print(
        f"{count} subjects, {steps} steps of batch {batch}: one by one {one[0]:.0f} s ({one[1]:.0f} s in steps), "
        f"packed {pack} {many[0]:.0f} s ({many[1]:.0f} s in steps): {ratio:.2f} x, steps alone {of_steps:.2f} x"
    )
    return ratio


# ---- kernels --------------------------------------------------------------------------------------------------------


def packed_kernels(kind: str, adapter: dict[str, Any], slots: int) -> Counter[str]:
    """Count the operations of the passes of one packed step of `slots` subjects, batch 1 each, by name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            unet = real_part(kind, "unet").requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    with as_on_a_card():
        bench = Bench(unet, SIDES[kind], 1)
        config = bench.config(adapter)
        pack = Pack(unet, config.adapter, slots, dtype=torch.bfloat16, spare=SPARE)
        runs = []
        for slot in range(slots):
            seat = pack.seat(slot, slot)
            descent = Descent(seat.flatten(SPARE), config.train, OneProcess)
            objective = bench.objective(seat)
            runs.append(mock.Mock(config=config, objective=objective, descent=descent, accelerator=OneProcess))
        step = PackedStep(pack)
        with Kernels() as counted:
            step._passes([Share(run, batch) for run in runs for batch in run.objective.samples(0, 0)])
    return counted.found


def show_kernels(kind: str, most: int) -> None:
    """Print what a packed step launches beside what one subject's own step does."""
    for name in ("krona", "lora"):
        alone = kernels(kind, name).total()
        adapter = {"krona": {"a1": 4, "a2": 64}, "lora": {"type": "lora", "rank": 4}}[name]
        for slots in (1, 8):
            found = packed_kernels(kind, adapter, slots)
            print(f"{kind} {name}: packed {slots}: {found.total():,}, {found.total() / alone:.2f} x of {alone:,} alone")
            if most:
                print(" ", ", ".join(f"{op} {n}" for op, n in found.most_common(most)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pack", type=int, default=8)
    parser.add_argument("--kernels", action="store_true", help="count a packed SDXL step's kernels instead")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="also list the N commonest operations")
    given = parser.parse_args()
    if given.kernels:
        return show_kernels("sdxl", given.most)
    ratio = race(given.subjects, given.steps, given.batch, given.pack)
    if given.batch == 1 and ratio < BAR:
        raise SystemExit(f"the bar is {BAR} x")
    return None


if __name__ == "__main__":
    main()
