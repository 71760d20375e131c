"""Trains every subject of a suite, one run each, so that `krona-eval suite` can measure them.

    python scripts/train_suite.py toybox --config configs/toybox.yaml --runs runs/suite-toybox
    python scripts/train_suite.py dreambench --config configs/sdxl.yaml --photos dreambench --runs runs/dreambench
    accelerate launch scripts/train_suite.py …        # each process trains its share of the subjects, on its own GPU

--config gives model, adapter and training; subject and output come from the suite. A run that is finished is passed
over and one that was stopped goes on where it was, so the same command may be started again at any time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from diffusekrona_train.config import dump_config, make_config, read_yaml
from diffusekrona_train.evaluation.inputs import Suite, SuiteRow, load_suite

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def config_of(
    suite: Suite, row: SuiteRow, base: dict[str, Any], runs: Path, photos: Path | None, sets: list[str]
) -> str:
    """The YAML of one subject's run; ValueError of one line where it would not be a config."""
    subject = {"images": suite.images_of(row, photos), "class": row.class_noun, "token": row.token}
    kept = {key: value for key, value in (base.get("subject") or {}).items() if key in ("prompt", "captions", "limit")}
    tree = {**base, "subject": {**kept, **subject}, "output": str(runs / row.name)}
    return dump_config(make_config(tree, sets))


def command_for(run: Path, config: Path) -> list[str] | None:
    """What trains this run from where it is; None where it is finished."""
    if (run / f"{run.name}.safetensors").is_file():
        return None
    states = any((run / "resume").glob("step-*/state.safetensors"))
    started = ["--resume"] if states else ["--overwrite"] if run.is_dir() else []
    return [sys.executable, "-m", "diffusekrona_train", "--config", str(config), *started]


def environment(local_rank: int, world: int) -> dict[str, str]:
    """This process' environment for a lone run: nothing of the launcher, and one GPU of its own."""
    own = {
        key: value for key, value in os.environ.items() if key not in LAUNCHER and not key.startswith("TORCHELASTIC")
    }
    if world > 1 and "CUDA_VISIBLE_DEVICES" not in own:
        own["CUDA_VISIBLE_DEVICES"] = str(local_rank)
    elif world > 1:
        cards = own["CUDA_VISIBLE_DEVICES"].split(",")
        own["CUDA_VISIBLE_DEVICES"] = cards[local_rank % len(cards)]
    return own


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", help="dreambench, toybox, or a YAML file")
    parser.add_argument("--config", type=Path, required=True, help="model, adapter and training of every run")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--photos", type=Path, help="folder with a folder of photos for each subject")
    parser.add_argument("--only", nargs="*", help="names of the subjects to train (all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in krona-train")
    given = parser.parse_args()
    try:
        suite = load_suite(given.suite)
        unknown = sorted(set(given.only or []) - {row.name for row in suite.rows})
        if unknown:
            raise ValueError(f"--only {unknown[0]}: the suite has {', '.join(row.name for row in suite.rows)}")
        rows = [row for row in suite.rows if not given.only or row.name in given.only]
        base = read_yaml(given.config)
        texts = {row.name: config_of(suite, row, base, given.runs, given.photos, given.set) for row in rows}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    env = environment(int(os.environ.get("LOCAL_RANK", "0")), world)
    failed = [row.name for row in rows[rank::world] if not train(given.runs / row.name, texts[row.name], env)]
    if failed:
        print(f"error: {', '.join(failed)} did not finish; the same command goes on with them", file=sys.stderr)
    return 1 if failed else 0


def train(run: Path, text: str, env: dict[str, str]) -> bool:
    """Trains one run in a process of its own; whether it is finished."""
    config = run.parent / "configs" / f"{run.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text)
    command = command_for(run, config)
    if command is None:
        print(f"{run.name}: finished before")
        return True
    print(f"{run.name}: {' '.join(command[1:])}", flush=True)
    return subprocess.run(command, env=env).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
