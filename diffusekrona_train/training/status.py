"""What a run folder says while its run works and afterwards: state, numbers, samples, warnings, adapters.

Only files are read and torch is never imported, so that a page or a service may ask every second. A run is known by its
folder alone, whoever started it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from diffusekrona_train.common.run_folder import STOP_FILE, adapter_file, read_metrics, step_of
from diffusekrona_train.config import RunConfig, load_config
from diffusekrona_train.report.charts import Line, line_chart
from diffusekrona_train.training.curves import series, smoothed

T = TypeVar("T")
Event = dict[str, Any]
ASKED, USED = "run.yaml", "config.yaml"
"""The config as somebody asked for it before the run began, and the complete one that the run wrote."""
BEST = Path("evaluation", "best.json")
PID, LOG = "train.pid", "train.log"
"""Where who starts a run in another process may note its number, and what it prints."""
STATES = {
    "new": "Not started",
    "queued": "Waiting in the queue",
    "starting": "Getting ready",
    "running": "Training",
    "stopping": "Stopping after this step",
    "measuring": "Choosing the best checkpoint",
    "finished": "Finished",
    "stopped": "Stopped",
    "interrupted": "Interrupted",
    "failed": "Failed",
}
ACTIVE = ("starting", "running", "stopping", "measuring")
RISING = 1.02
"""Held-out loss over its minimum, twice in a row, from which the run seems to overfit."""
_CHARTING = threading.Lock()
_READ: dict[tuple[str, Path], tuple[tuple[int, int], Any]] = {}


@dataclass
class Status:
    """A run in numbers. Times are in seconds; `memory` is a sentence, '' where nothing runs."""

    name: str
    state: str
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    images_per_s: float | None = None
    loss: float | None = None
    error: str = ""
    memory: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """Return the state in words."""
        return STATES[self.state]

    @property
    def active(self) -> bool:
        """Return whether a process works on it."""
        return self.state in ACTIVE


# ---- which folders --------------------------------------------------------------------------------------------------


def all_runs(root: Path) -> list[Path]:
    """Return the run folders in `root`, the newest first; links are left out."""
    found = [path for path in root.iterdir() if is_run(path)]
    return sorted(
        found, key=lambda path: (path / USED if (path / USED).exists() else path).stat().st_mtime, reverse=True
    )


def is_run(path: Path) -> bool:
    """Return whether `path` is a folder with a config in it."""
    plain = not path.name.startswith(".") and path.is_dir() and not path.is_symlink()
    return plain and ((path / USED).is_file() or (path / ASKED).is_file())


def find_run(root: Path, name: str) -> Path:
    """Return the run folder of that very name; LookupError where `root` has none."""
    for path in root.iterdir():
        if path.name == name and is_run(path):
            return path
    raise LookupError(f"no run is called {name!r}")


# ---- files, read again only where they changed -----------------------------------------------------------------------


def signature(path: Path) -> tuple[int, int]:
    """Return (time of the last change, size) of a file; (0, 0) without one."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def cached(kind: str, path: Path, read: Callable[[Path], T]) -> T:
    """Return `read(path)`, kept until the file changes."""
    key, now = (kind, path), signature(path)
    if key not in _READ or _READ[key][0] != now:
        if len(_READ) > 2000:
            _READ.clear()
        _READ[key] = now, read(path)
    return _READ[key][1]


def config_file(folder: Path) -> Path:
    """Return the config that a run uses, or the one that it was asked for with."""
    return folder / (USED if (folder / USED).is_file() else ASKED)


def config_of(folder: Path) -> RunConfig:
    """Return the config of a run; ValueError where it cannot be read."""
    return cached("config", config_file(folder), load_config)


def events_of(folder: Path) -> list[Event]:
    """Return the events of a run; a line cut by a kill is passed over."""
    return cached("events", folder / "events.jsonl", lambda path: list(json_lines(path)))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return cached("metrics", folder / "metrics.jsonl", read_metrics)


def best_of(folder: Path) -> dict[str, Any] | None:
    """Return evaluation/best.json, None where the checkpoints were not measured."""
    found = cached("best", folder / BEST, lambda path: [*json_lines(path, whole=True)])
    return found[0] if found and "checkpoints" in found[0] else None


def json_lines(path: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one a line (or the `whole` file); what is none is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in [text] if whole else text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


# ---- state ---------------------------------------------------------------------------------------------------------


def process_of(folder: Path) -> psutil.Process | None:
    """Return the live process that trains in `folder`, by its lock or by what the studio noted when it started it."""
    return next(filter(None, (live_process(folder / name) for name in (".lock", PID))), None)


def live_process(path: Path) -> psutil.Process | None:
    """Return the process whose number a file holds; None where it ended, or a younger one has its number."""
    try:
        process = psutil.Process(int(path.read_text()))
        since = path.stat().st_mtime
        return process if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + 5 else None
    except (OSError, ValueError, psutil.Error):
        return None


def status_of(folder: Path) -> Status:
    """Return the state and the numbers of a run."""
    events, process = events_of(folder), process_of(folder)
    phases = [event for event in events if event.get("event") == "phase"]
    last = phases[-1] if phases else {}
    status = Status(folder.name, _state(folder, last, process), warnings=warnings_of(folder))
    try:
        status.steps = config_of(folder).train.steps
    except ValueError as error:
        status.error = str(error)
    began = next((event for event in reversed(phases) if event.get("name") == "train"), None)
    done = next((event for event in reversed(events) if isinstance(event.get("step"), int)), None)
    status.step = done["step"] if done else 0
    line = next((line for line in reversed(metrics_of(folder)) if "images_per_s" in line), None)
    if line:
        status.images_per_s, status.loss = line["images_per_s"], line.get("loss")
    if process is not None:
        status.memory = memory_of(process)
        if began and done and done["time"] > began["time"] and status.step > began.get("start", 0):
            pace = (done["time"] - began["time"]) / (status.step - began.get("start", 0))
            status.seconds_left = max(0.0, pace * (status.steps - status.step) - (time.time() - done["time"]))
    if status.state == "failed":
        status.error = (
            str(last.get("error")) if last.get("name") == "failed" else last_error(folder / LOG) or status.error
        )
    return status


def _state(folder: Path, phase: Event, process: psutil.Process | None) -> str:
    name = phase.get("name")
    if process is not None:
        if phase.get("time", 0) < process.create_time():  # what an earlier process reported
            name = None
        return (
            "stopping"
            if (folder / STOP_FILE).exists()
            else {"train": "running", "evaluate": "measuring"}.get(str(name), "starting")
        )
    if _refused(folder):
        return "failed"
    return {"finished": "finished", "stopped": "stopped", "failed": "failed", "None": "new"}.get(
        str(name), "interrupted"
    )


def _refused(folder: Path) -> bool:
    """Whether the last start ended with an error before it reported anything: the log is younger than the events."""
    log, events = signature(folder / LOG)[0], signature(folder / "events.jsonl")[0]
    return log > events and bool(last_error(folder / LOG))


def last_error(log: Path) -> str:
    """Return the error that a command printed last, '' where it ended well."""
    lines = cached("log", log, _tail)
    last = lines[-1] if lines else ""
    return last.split(": ", 1)[1] if last.startswith(("error: ", "fault: ")) else ""


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8000))
            return [line for line in re.split(r"[\r\n]+", file.read().decode(errors="replace")) if line.strip()]
    except OSError:
        return []


def memory_of(process: psutil.Process) -> str:
    """Return what a process holds, in words: '1.2 GB of memory, 6.5 GB on the GPU'."""
    try:
        held = [f"{process.memory_info().rss / 1e9:.1f} GB"]
    except psutil.Error:
        return ""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            rows = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            return held[0]
        used = sum(int(mib) for pid, mib in re.findall(r"^(\d+), (\d+)", rows, re.M) if int(pid) == process.pid)
        held += [f"{used / 1000:.1f} GB on the GPU"] if used else []
    return ", ".join(held)


def warnings_of(folder: Path) -> list[str]:
    """Return what a reader should know: the run's own warnings of its last start, and what its numbers say."""
    events = events_of(folder)
    starts = [i for i, event in enumerate(events) if event.get("name") == "prepare"]
    found = [str(event["text"]) for event in events[starts[-1] if starts else 0 :] if event.get("event") == "warning"]
    metrics = metrics_of(folder)
    if any("loss" in line and line["loss"] is None for line in metrics[-3:]):
        found.append("The loss is not a number any more. Stop, and start a new run with a lower learning rate.")
    steps, held = series(metrics, "validation_loss")
    if len(held) > 2:
        low = min(held)
        if min(held[-2:]) > RISING * low:
            best = steps[held.index(low)]
            found.append(f"The held-out loss has risen since step {best}: an earlier checkpoint may look better.")
    return list(dict.fromkeys(found))[-8:]


# ---- what it made --------------------------------------------------------------------------------------------------


def sample_steps(folder: Path) -> list[int]:
    """Return the steps that have samples, ascending."""
    return sorted(step_of(path) for path in (folder / "samples").glob("step-*") if step_of(path) >= 0)


def jobs_of(config: RunConfig) -> list[tuple[str, int]]:
    """Return (prompt, seed) of each sample, by the number that its file begins with."""
    wanted = config.validation
    return [(config.subject.fill(prompt), seed) for prompt in wanted.prompts for seed in wanted.seeds]


def adapters_of(folder: Path) -> dict[int, Path]:
    """Return the adapter files of a run by step; of a run without checkpoints the final one, at its last step."""
    steps = {step_of(path) for path in (folder / "checkpoints").glob("step-*")}
    found = {step: adapter_file(folder, step) for step in sorted(steps) if adapter_file(folder, step).is_file()}
    final = folder / f"{folder.name}.safetensors"
    return found or ({config_of(folder).train.steps: final} if final.is_file() else {})


def scores_of(folder: Path) -> list[tuple[str, list[int], list[float]]]:
    """Return (metric, steps, values) of what was measured on the checkpoints."""
    best = best_of(folder)
    rows = best["checkpoints"] if best else []
    names = {"dino": "DINO", "clip_t": "CLIP-T"}
    found = []
    for key, title in names.items():
        values = [(row["step"], row["scores"][key]["value"]) for row in rows if key in row.get("scores", {})]
        values = [(step, value) for step, value in values if math.isfinite(value)]
        if values:
            found.append((title, [step for step, _ in values], [value for _, value in values]))
    return found


def charts_of(folder: Path) -> list[tuple[str, str]]:
    """Return (what it shows, SVG) of a run's curves, and of what was measured on its checkpoints."""
    with _CHARTING:
        loss = cached("loss chart", folder / "metrics.jsonl", lambda _: _loss_charts(folder))
        return [*loss, *cached("score charts", folder / BEST, lambda _: _score_charts(folder))]


def _loss_charts(folder: Path) -> list[tuple[str, str]]:
    metrics, charts = metrics_of(folder), []
    x, loss = series(metrics, "loss")
    if x:
        lines = [Line("", x, loss, faint=True), Line("training", x, smoothed(loss), points=len(x) == 1)]
        charts.append((f"Training loss, {smoothed(loss)[-1]:.4f} at step {x[-1]}", line_chart("Training loss", lines)))
    x, held = series(metrics, "validation_loss")
    if x:
        low = x[held.index(min(held))]
        chart = line_chart("Held-out loss", [Line("held-out", x, held, points=True)], mark_x=low)
        charts.append((f"Held-out loss, lowest at step {low}", chart))
    return charts


def _score_charts(folder: Path) -> list[tuple[str, str]]:
    best = (best_of(folder) or {}).get("chosen_step")
    return [
        (f"{title} by step; the best is {best}", line_chart(title, [Line(title, x, y, points=True)], mark_x=best))
        for title, x, y in scores_of(folder)
    ]
