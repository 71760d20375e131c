"""All benchmarks at real size on a GPU in one table, each in a process of its own; scripts/gpu/measure.sh starts it.

Each file here is a benchmark that also runs by itself, on a CPU too: `python -m scripts.bench.layer --help`.
`--first` takes the most valuable numbers of them within minutes (first.py).
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from scripts.bench import first
from scripts.bench.first import OUT_OF_TIME
from scripts.bench.setting import ROOT, Rows, Setting, TimeIsUp, reason, table, write_markdown

POINTS = {
    1: "layer:measure",
    2: "step:measure",
    3: "run:measure_peaks",
    4: "run:measure",
    5: "sample:measure",
    6: "run:measure_precision",
    7: "peers:measure",
}
"""Number -> the function that measures the point."""
TITLES = {
    0: "What comes before",
    1: "Adapter layer, forward and backward",
    2: "Training step",
    3: "Peak memory (GiB allocated / reserved)",
    4: "Whole runs, from start to file (seconds)",
    5: "Sampling",
    6: "Precision: losses of the same steps as fp32's",
    7: "Peers: diffusers' train_dreambooth_lora_sdxl.py",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/gpu/measure.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=["real", "small"], default="real", help="small: a dry run, on a CPU too")
    parser.add_argument("--first", action="store_true", help="the most valuable numbers first, in 9.3 minutes")
    parser.add_argument("--out", type=Path, help="models and runs lie here (runs/measure; --first: a RAM disk)")
    parser.add_argument("--results", type=Path, help="what is measured (results.json in --out; --first: in $OUT)")
    parser.add_argument("--only", default="1,2,3,4,5,6,7", help="points, with commas between them")
    parser.add_argument("--minutes", type=float, help="begin no row after so long; the same command then continues")
    parser.add_argument("--again", action="store_true", help="measure rows of --only that are there already")
    parser.add_argument("--diffusers-script", type=Path, help="train_dreambooth_lora_sdxl.py of a diffusers checkout")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, as docs/performance.md")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--piece", choices=first.PIECES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out = (given.out or (first.default_out() if given.first else Path("runs/measure"))).resolve()
    if given.results is None:
        given.results = first.default_results(given.out) if given.first else given.out / "results.json"
    given.results = given.results.resolve()
    if given.piece:
        sys.exit(first.measure_piece(given))
    if given.point:
        measure_one(given)
        return
    wanted = chosen(given.only)
    if given.diffusers_script and not given.diffusers_script.is_file():
        refuse(f"--diffusers-script: there is no {given.diffusers_script}")
    given.out.mkdir(parents=True, exist_ok=True)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    if given.again:
        forget(given.results, wanted)
    left = first.conduct(given) if given.first else conduct(given, wanted)
    tell(given, [f"piece {letter}" for letter in left] if given.first else [f"point {point}" for point in left])


def conduct(given: argparse.Namespace, wanted: list[int]) -> list[int]:
    """Measure the points as far as the time goes; returns those with rows left."""
    until = time.time() + 60 * given.minutes if given.minutes else float("inf")
    return [point for point in wanted if not measured(given, point, until)]


def tell(given: argparse.Namespace, left: list[str]) -> None:
    data = json.loads(given.results.read_text()) if given.results.is_file() else None
    if data is None:
        sys.exit("error: nothing was measured")
    print(f"\n{data['card']}, {data['date']}, " + ", ".join(f"{k} {v}" for k, v in data["versions"].items()) + "\n")
    print(table(data["rows"], TITLES))
    if given.write:
        write_markdown(given.write, data, TITLES)
    if left:
        print(f"\nleft for the next time: {', '.join(left)}; the same command continues")


def refuse(what: str) -> NoReturn:
    print(f"error: {what}", file=sys.stderr)
    sys.exit(2)


def chosen(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    points = [int(word) for word in words if word.isdigit()]
    if len(points) < len(words) or not set(points) <= set(POINTS):
        refuse(f"--only: {text!r} should be some of {', '.join(map(str, POINTS))}, with commas")
    return points


def forget(results: Path, points: list[int]) -> None:
    if results.is_file():
        data = json.loads(results.read_text())
        data["rows"] = [row for row in data["rows"] if row["point"] not in points]
        results.write_text(json.dumps(data, indent=1))


def measured(given: argparse.Namespace, point: int, until: float) -> bool:
    """Runs a point in a process of its own: a crash of one costs the others nothing. False where rows are left."""
    if time.time() > until:
        return False
    command = [sys.executable, "-m", "scripts.bench", "--point", str(point), "--size", given.size]
    command += ["--out", str(given.out), "--results", str(given.results), "--until", str(until)]
    if given.diffusers_script:
        command += ["--diffusers-script", str(given.diffusers_script.resolve())]
    print(f"== {point}. {TITLES[point]}", flush=True)
    status = subprocess.run(command, cwd=ROOT).returncode
    if status not in (0, OUT_OF_TIME):
        Rows(given.results).put(point, "the whole point", error=f"exit status {status}")
    return status != OUT_OF_TIME


def measure_one(given: argparse.Namespace) -> None:
    rows = Rows(given.results, given.until, judging=given.size != "small")
    setting = Setting(given.size, given.out, rows, given.diffusers_script)
    try:
        pkgutil.resolve_name(f"scripts.bench.{POINTS[given.point]}")(setting)
    except TimeIsUp:
        sys.exit(OUT_OF_TIME)
    except Exception as error:
        rows.put(given.point, "the whole point", error=reason(error))


if __name__ == "__main__":
    main()
