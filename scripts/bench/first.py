"""The first minutes on a card: the most valuable numbers first, each piece in a process of its own.

    scripts/gpu/measure.sh --first [--minutes 9.3] [--results FILE]

A row is written into the results as soon as it is there. Nothing is begun that does not fit the time left; a piece that
hangs is ended with the time; after an error that leaves the device unusable the rest of the piece runs in a new
process. A later call continues with what is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusekrona_train.config import TrainConfig
from scripts.bench.setting import GIB, ROOT, TAIL, UNTIL, Broken, Rows, Setting, TimeIsUp, Values

OUT_OF_TIME, BROKEN = 75, 76
"""Exit statuses of a piece: rows are left for another time, the device needs a new process."""
RAM_DISK, ROOM = Path("/dev/shm"), 16 * GIB
"""Where models are made if so much is free there: SDXL in 16 bits is read several times."""
SCRIPT = ROOT / ".wheels" / "peer" / "train_dreambooth_lora_sdxl.py"


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


PIECES = {
    "0": Piece(0, "the random model", 40, begin),
    "a": Piece(4, "a whole run, from photos to a resumed run", 75, whole_runs),
    "b": Piece(2, "training steps in one process", 40, steps),
    "c": Piece(1, "adapter layers", 20, layers),
    "d": Piece(3, "memory at the peak", 35, memory_peaks),
    "e": Piece(7, "diffusers' script", 75, peer),
    "f": Piece(2, "training steps with compiled blocks", 100, compiled),
}
"""In this order."""


# ---- the first process: it measures nothing, and starts the others ---------------------------------------------------


def default_out() -> Path:
    """Return the RAM disk where it has room, else runs/measure."""
    roomy = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > ROOM
    return RAM_DISK / "krona-measure" if roomy else Path("runs/measure")


def default_results(out: Path) -> Path:
    """Return where results.json goes: into the folder that OUT names, where one does; else into `out`."""
    return Path(os.environ.get("OUT", out)) / "results.json"


def conduct(given: argparse.Namespace) -> list[str]:
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
