"""The paper, reproduced by command: trains, samples and measures what a figure or table of it varies.

    python scripts/paper.py init --model toybox --seeds 3
    python scripts/paper.py all --model sdxl --photos dreambench --workers 4
    python scripts/paper.py factors guidance --on ray                     # RAY_ADDRESS names the cluster
    python scripts/paper.py baselines --export docs/paper/toybox          # tables, plot, sheet and records, small
    python scripts/paper.py all --import-records records.jsonl.gz --report-only
    python scripts/paper.py confirm --photos FOLDER              # the default against LoRA, on your subjects

A study is a YAML in configs/paper/: a base (configs/paper/models/) and the values to vary. Runs that several studies of
a call need are trained once, finished records are never computed again, a run that was stopped goes on. Every study's
table.md, table.csv, sheet.png and plot.png lie in RUNS/STUDY/MODEL/ and are written anew from the records each time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "studies",
        nargs="+",
        metavar="STUDY",
        help="names in configs/paper/, a YAML file, or all",
    )
    parser.add_argument("--model", default="toybox", help="toybox, toybox-flow, sdxl or sd15")
    parser.add_argument("--base", type=Path, help="another base than configs/paper/models/MODEL.yaml")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of every run")
    parser.add_argument("--subjects", help="names in the base's suite, with commas (the base's own)")
    parser.add_argument(
        "--photos", type=Path, help="folder with a folder of photos for each subject (sdxl, sd15, confirm)"
    )
    parser.add_argument("--runs", type=Path, help="folder of runs, records and tables (runs/paper)")
    parser.add_argument("--on", choices=("local", "ray"), default="local", help="where tasks run")
    parser.add_argument("--workers", type=int, help="processes (as many as there are GPUs, else 1)")
    parser.add_argument("--steps", type=int, help="short for --set train.steps=N, where a study does not vary it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in krona-train")
    parser.add_argument("--check", action="store_true", help="say what would be done, and how long it would take")
    parser.add_argument("--report-only", action="store_true", help="write the tables from the records that are there")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write tables, figures and records there too")
    parser.add_argument("--import-records", type=Path, metavar="FILE", help="take up another machine's records first")
    options = parser.parse_args(given)
    for name, least in (("seeds", 1), ("workers", 1), ("steps", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: give {least} or more")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    from diffusekrona_train.cli import USER_MISTAKES, one_line
    from scripts.studies.conduct import conduct

    try:
        return conduct(options)
    except (*USER_MISTAKES, ConnectionError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
