"""Many subjects packed on one base against one after the other: wall time of whole processes, and kernels of a step.

    python -m scripts.bench.many                  # twelve subjects, 100 steps of batch 1, one thread; minutes
    python -m scripts.bench.many --kernels        # dispatcher counts of packed SDXL steps, without a GPU
    python -m scripts.bench.many --kills 20 --subjects 1000   # the process is killed again and again; an hour or more

Both ways train the same jobs on toybox, start-up included, one after the other: `krona-train --config` once a subject,
and `krona-train many --pack 8`. The ratio of the steps alone comes from the runs' own times. Kernels are counted as in
`scripts.bench.kernels`, on tensors with shapes and no content.

With --kills `krona-train many` is started, killed after a random time, and started again with the same list, until it
ends by itself. The jobs have three steps; a tenth of them cannot be trained and a tenth is listed twice. Then every
folder is checked: each good job must have been trained once, and nothing may be lost or half-written.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from diffusekrona_train.adapters.formats import read_adapter
from diffusekrona_train.adapters.packed import Pack
from diffusekrona_train.data import toybox_subjects
from diffusekrona_train.fleet.step import PackedStep, Share
from diffusekrona_train.training.optimizer import Descent
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
        pack = Pack(unet, config.adapter, slots, dtype=torch.bfloat16)
        runs = []
        for slot in range(slots):
            seat = pack.seat(slot, slot)
            descent = Descent(seat.flatten(), config.train, OneProcess)
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


# ---- kills ----------------------------------------------------------------------------------------------------------

STEPS = 3
ONLY_FAST = ("adapter.blocks=[mid_block*]", "train.batch_size=1", "train.checkpoint_every=1", "train.log_every=1")


def make_list(count: int, dice: random.Random) -> tuple[list[dict[str, Any]], set[str], set[str]]:
    """Return rows in random order, the ids of good jobs, and of bad ones."""
    subjects = list(toybox_subjects().items())
    rows, good, bad = [], set(), set()
    for number in range(count):
        name, about = subjects[number % len(subjects)]
        row: dict[str, Any] = {"id": f"job-{number:04d}", "images": f"toybox:{name}", "class": about["class"]}
        row |= {"steps": STEPS, "seed": number}
        if number % 10 == 7:
            row |= dice.choice([{"images": "nowhere"}, {"steps": "three"}, {"colour": "red"}])
        (bad if number % 10 == 7 else good).add(row["id"])
        rows += [row] * (2 if number % 10 == 3 else 1)
    dice.shuffle(rows)
    return rows, good, bad


def run_or_kill(listed: Path, output: Path, pack: int, seconds: float | None) -> int:
    """Start the command and wait for it, or kill it after so many seconds; return its exit status."""
    words = [sys.executable, "-m", "diffusekrona_train.cli.train", "many", str(listed), "--model", "toybox"]
    words += ["--pack", str(pack), "--output", str(output)]
    for field in ONLY_FAST:
        words += ["--set", field]
    with (listed.parent / "log").open("w") as log:
        child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            return child.wait()


def look(output: Path, good: set[str], bad: set[str]) -> list[str]:
    """Return what is wrong with the folders."""
    wrong = []
    failed = [json.loads(line)["id"] for line in (output / "failed.jsonl").read_text().splitlines()] if bad else []
    if sorted(failed) != sorted(bad):
        wrong.append(f"failed.jsonl names {len(failed)} jobs, {len(bad)} are bad")
    for name in sorted(good):
        folder = output / name
        record = json.loads((folder / "job.json").read_text()) if (folder / "job.json").is_file() else {}
        if record.get("state") != "done":
            wrong.append(f"{name}: {record.get('state')}")
            continue
        read_adapter(folder / f"{name}.safetensors")
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        if steps != list(range(1, STEPS + 1)):
            wrong.append(f"{name}: steps {steps} were logged")
    wrong += [f"{path} is left" for path in output.glob("job-*/.writing-*")]
    done = [json.loads(line) for path in output.glob("events*.jsonl") for line in _whole_lines(path)]
    ends = [event["job"] for event in done if event["event"] == "job" and event["state"] == "trained"]
    twice = sorted({name for name in ends if ends.count(name) > 1})
    return wrong + ([f"trained twice: {', '.join(twice)}"] if twice else [])


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def kill(given: argparse.Namespace, count: int) -> None:
    """Train `count` jobs under kills; exit status 1 where something is wrong."""
    dice = random.Random(given.seed)
    rows, good, bad = make_list(count, dice)
    began, kills = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        listed, output = Path(scratch, "jobs.jsonl"), Path(scratch, "fleet")
        listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            left = given.kills - kills
            status = run_or_kill(listed, output, given.pack, dice.uniform(given.least, given.longest) if left else None)
            kills += status == -signal.SIGKILL
        if status not in (0, 1):
            raise SystemExit((listed.parent / "log").read_text())
        wrong = look(output, good, bad)
    seconds = time.monotonic() - began
    print(f"{len(rows)} lines, {len(good)} good jobs, {len(bad)} bad, {kills} SIGKILLs, {seconds:.0f} s, exit {status}")
    print(
        "\n".join(wrong) or "each good job was trained once, each bad one is in failed.jsonl, nothing is half-written"
    )
    if wrong or status != (1 if bad else 0):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pack", type=int, default=8)
    parser.add_argument("--kernels", action="store_true", help="count a packed SDXL step's kernels instead")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="also list the N commonest operations")
    parser.add_argument("--kills", type=int, help="kill the process so often, and look whether anything is lost")
    parser.add_argument("--seed", type=int, default=0, help="kills: of the list and the times")
    parser.add_argument("--least", type=float, default=6.0, help="kills: shortest time to one, in seconds")
    parser.add_argument("--longest", type=float, default=16.0, help="kills: longest time to one")
    given = parser.parse_args()
    if given.kills is not None:
        return kill(given, given.subjects)
    if given.kernels:
        return show_kernels("sdxl", given.most)
    ratio = race(given.subjects, given.steps, given.batch, given.pack)
    if given.batch == 1 and ratio < BAR:
        raise SystemExit(f"the bar is {BAR} x")
    return None


if __name__ == "__main__":
    main()
