"""All benchmarks at real size on a GPU in one table, each in a process of its own; scripts/gpu/measure.sh starts it.

Each file here is a benchmark that also runs by itself, on a CPU too: `python -m scripts.bench.layer --help`.

`--first` takes the most valuable numbers of them within minutes, in pieces. A row is written into the results as soon
as it is there. Nothing is begun that does not fit the time left; a piece that hangs is ended when the time is up; after
an error that leaves the device unusable, the rest of the piece runs in a new process. A later call continues with what
is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from diffusekrona_train.config import TrainConfig
from scripts.bench.setting import (
    GIB,
    ROOT,
    TAIL,
    UNTIL,
    Broken,
    Rows,
    Setting,
    TimeIsUp,
    Values,
    reason,
    run_json,
    table,
    write_markdown,
)

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
    8: "toybox-flow, trained further",
}

OUT_OF_TIME, BROKEN = 75, 76
"""Exit statuses of a piece: rows are left for another time, the device needs a new process."""
RAM_DISK, ROOM = Path("/dev/shm"), 16 * GIB
"""Where models are made if so much is free there: SDXL in 16 bits is read several times."""
SCRIPT = ROOT / ".wheels" / "peer" / "train_dreambooth_lora_sdxl.py"
SPRITES = ROOT / ".wheels" / "world" / "sprites.npz"
"""Of toybox's small world, as scripts/toybox/sprites.py packs them."""


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
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out = (given.out or (default_out() if given.first else Path("runs/measure"))).resolve()
    if given.results is None:
        given.results = default_results(given.out) if given.first else given.out / "results.json"
    given.results = given.results.resolve()
    if given.piece:
        sys.exit(measure_piece(given))
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
    left = conduct_pieces(given) if given.first else conduct(given, wanted)
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


# ---- the first minutes: pieces --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    point: int
    title: str
    seconds: int
    """The least time in which a fast card gives its first row."""
    measure: Callable[[Setting], None]


def begin(setting: Setting) -> None:
    """What comes before all else: the wheels, the random SDXL and the photos."""
    if spent := os.environ.get("INSTALL_SECONDS"):
        setting.rows.conclude(0, "wheels installed", {"s": float(spent)})
    setting.rows.attempt(0, "random sdxl made on the device", lambda: make_model(setting))


def make_model(setting: Setting) -> Values:
    began = time.time()
    folder = setting.model("sdxl")
    seconds = time.time() - began
    setting.photos()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"s": seconds, "GiB": size / GIB, "in": str(folder)}


def whole_runs(setting: Setting) -> None:
    """A short run with all that a run does, the same resumed, and its steps without a CUDA graph."""
    from scripts.bench.run import parts

    steps = 6 if setting.small else 60
    changes = {"train.steps": steps, "validation.every": steps // 2, "validation.steps": 2 if setting.small else 20}
    changes["train.checkpoint_every"] = steps // 2
    title, rows = f"configs/sdxl.yaml, {steps} steps, two validations, two saves", setting.rows
    done = rows.attempt(4, title, lambda: parts(setting, changes), needs=75)
    longer = {**changes, "train.steps": steps + 2}
    if done:
        rows.attempt(4, f"{title}: resumed for 2 more", lambda: parts(setting, longer, "--resume"), needs=30)
    if "cuda_graph" in TrainConfig.model_fields:
        eager = {"train.steps": steps // 2, "validation.every": 0, "train.cuda_graph": "false"}
        what = f"configs/sdxl.yaml, {steps // 2} steps, no validation, no CUDA graph"
        rows.attempt(4, what, lambda: parts(setting, eager), needs=30)


def steps(setting: Setting) -> None:
    from scripts.bench.step import measure_first

    measure_first(setting)


def layers(setting: Setting) -> None:
    from scripts.bench.layer import measure_first

    measure_first(setting)


def memory_peaks(setting: Setting) -> None:
    """The peaks of the configs that promise a card."""
    from scripts.bench.run import goal_of, peaks

    for name in ("sdxl-8gb", "sdxl-12gb"):
        path = ROOT / "configs" / f"{name}.yaml"
        setting.rows.attempt(3, f"configs/{path.name}", lambda path=path: peaks(setting, path), goal_of(name), needs=30)


def peer(setting: Setting) -> None:
    from scripts.bench.peers import measure_first

    measure_first(setting)


def compiled(setting: Setting) -> None:
    from scripts.bench.step import measure_compiled

    measure_compiled(setting)


def further(setting: Setting) -> None:
    """The weights of the embedded flow transformer, trained on for the time that is left; they come back too."""
    if SPRITES.is_file():
        title = "the package's weights in what time is left, at half the rates falling to zero"
        goal = ("the loss falls", lambda found: found["loss after"] < found["loss before"])
        setting.rows.attempt(8, title, lambda: train_further(setting), goal, needs=45)


def train_further(setting: Setting) -> Values:
    steps, images = (2, 24) if setting.small else (20_000, 8_000)
    seconds = min(600.0, float(os.environ.get(UNTIL, "inf")) - time.time() - 10)
    weights, result = setting.rows.path.with_name("toybox-flow.safetensors"), setting.out / "further.json"
    command = [
        sys.executable,
        "scripts/toybox/flow.py",
        str(weights),
        "--json",
        str(result),
        "--device",
        setting.device,
    ]
    command += ["--sprites", str(SPRITES), "--steps", str(steps), "--images", str(images), "--seconds", str(seconds)]
    found = run_json(command, result)
    return {**found, "ms a step": 1e3 * found["s"] / max(1, found["steps"]), "MiB": weights.stat().st_size / 2**20}


PIECES = {
    "0": Piece(0, "the random model", 40, begin),
    "a": Piece(4, "a whole run, from photos to a resumed run", 75, whole_runs),
    "b": Piece(2, "training steps in one process", 40, steps),
    "c": Piece(1, "adapter layers", 20, layers),
    "d": Piece(3, "memory at the peak", 35, memory_peaks),
    "e": Piece(7, "diffusers' script", 75, peer),
    "f": Piece(2, "training steps with compiled blocks", 100, compiled),
    "g": Piece(8, "toybox-flow trained further", 45, further),
}
"""In this order."""


# ---- the first process of --first: it measures nothing, and starts the others --------------------------------------


def default_out() -> Path:
    """Return the RAM disk where it has room, else runs/measure."""
    roomy = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > ROOM
    return RAM_DISK / "krona-measure" if roomy else Path("runs/measure")


def default_results(out: Path) -> Path:
    """Return where results.json goes: into the folder that OUT names, where one does; else into `out`."""
    return Path(os.environ.get("OUT", out)) / "results.json"


def conduct_pieces(given: argparse.Namespace) -> list[str]:
    """Measure the pieces as far as the time goes; returns the letters of those that are not finished."""
    began = float(os.environ.get("MEASURE_BEGAN", time.time()))
    until = began + 60 * (given.minutes or 9.3)
    os.environ |= {UNTIL: str(until), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return [letter for letter in PIECES if not finished(letter, given, until)]


def finished(letter: str, given: argparse.Namespace, until: float) -> bool:
    piece, what = PIECES[letter], f"piece {letter}: {PIECES[letter].title}"
    for _ in range(4):  # after an error that leaves the device unusable, once more for the rows that follow
        left = until - time.time()
        if left < piece.seconds:
            told = f"not begun: {piece.seconds} s are needed at least, {max(0.0, left):.0f} s were left"
            Rows(given.results, guest=True).put(piece.point, what, error=told)
            return False
        print(f"== {letter}. {piece.title} ({left:.0f} s left)", flush=True)
        status, said = in_a_process(command_of(letter, given), given.out / f"{letter}.stderr", left + 2)
        if status in (0, OUT_OF_TIME):
            Rows(given.results, guest=True).drop(piece.point, what)
            return status == 0
        if status != BROKEN:
            Rows(given.results, guest=True).put(piece.point, what, error=ending(status), stderr=said)
            return False
    return False


def command_of(letter: str, given: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "scripts.bench", "--first", "--piece", letter, "--size", given.size]
    command += ["--out", str(given.out), "--results", str(given.results)]
    script = given.diffusers_script
    return command + (["--diffusers-script", str(script.resolve())] if script else [])


def in_a_process(command: list[str], log: Path, left: float) -> tuple[int, str]:
    """Return a command's exit status, 124 where it did not end within `left` seconds, and the end of its stderr."""
    with log.open("w") as stderr:
        child = subprocess.Popen(command, cwd=ROOT, stderr=stderr, start_new_session=True)
        try:
            status = child.wait(left)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            if child.poll() is None:  # and all that it has started
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return status, log.read_text(errors="replace")[-TAIL:]


def ending(status: int) -> str:
    return "stopped: the time is up" if status == 124 else f"exit status {status}"


def measure_piece(given: argparse.Namespace) -> int:
    """Measure one piece in this process; the exit status."""
    until = float(os.environ.get(UNTIL, "inf"))
    rows = Rows(given.results, until, judging=given.size != "small", again=False)
    script = given.diffusers_script or (SCRIPT if SCRIPT.is_file() else None)
    try:
        PIECES[given.piece].measure(Setting(given.size, given.out, rows, script))
    except TimeIsUp:
        return OUT_OF_TIME
    except Broken:
        return BROKEN
    return 0


if __name__ == "__main__":
    main()
