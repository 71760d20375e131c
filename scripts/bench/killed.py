"""Many jobs with the process killed again and again: is each good job trained once, and nothing lost or half-written?

    python -m scripts.bench.killed                # 1,000 jobs on toybox, 3 steps each, 20 SIGKILLs; an hour or more
    python -m scripts.bench.killed --jobs 12 --kills 2

`krona-train many` is started, killed after a random time, and started again with the same list, until it ends by
itself. A tenth of the jobs cannot be trained, a tenth stands in the list twice. Then every folder is looked at.
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
from pathlib import Path
from typing import Any

from diffusekrona_train.adapters.formats import read_adapter
from diffusekrona_train.data import toybox_subjects

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


def run(listed: Path, output: Path, pack: int, seconds: float | None) -> int:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pack", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=20.0, help="shortest time to a kill, in seconds")
    parser.add_argument("--most", type=float, default=90.0, help="longest time to a kill")
    given = parser.parse_args()
    dice = random.Random(given.seed)
    rows, good, bad = make_list(given.jobs, dice)
    began, kills = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        listed, output = Path(scratch, "jobs.jsonl"), Path(scratch, "fleet")
        listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            left = given.kills - kills
            status = run(listed, output, given.pack, dice.uniform(given.least, given.most) if left else None)
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


if __name__ == "__main__":
    main()
