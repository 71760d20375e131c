"""What every benchmark shares: its rows in one table, sizes, folders, random pipelines and photos, one process a piece.

Rows are kept in JSON after each measurement, taken up again by a later call, and shown as text or Markdown.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
BROKEN: dict[Path, str] = {}
"""Models that could not be made, and why: they are not tried again for every row."""


UNTIL = "MEASURE_UNTIL"
"""Environment variable: seconds since the epoch at which every process of a measurement has to be done."""
TAIL = 4000
"""Characters of a failed process's stderr that are kept."""


class Failed(RuntimeError):
    """A process of its own ended with an error: the last line that it said, and the end of its stderr."""

    def __init__(self, line: str, stderr: str = ""):
        super().__init__(line)
        self.stderr = stderr[-TAIL:]


@dataclass(frozen=True)
class Setting:
    """`size`: 'real', or 'small' for a dry run. Everything made lies in `out`."""

    size: str
    out: Path
    rows: Rows
    script: Path | None = None
    """diffusers' train_dreambooth_lora_sdxl.py, for the comparison in point 7."""

    @property
    def small(self) -> bool:
        return self.size == "small"

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def side(self, kind: str) -> int:
        """Pixels of a picture."""
        return 64 if self.small else {"sdxl": 1024, "sd21": 768}.get(kind, 512)

    def model(self, kind: str) -> Path:
        """The random pipeline of `kind` ('sdxl', 'sd15', 'sd21'), made at the first call."""
        folder = self.out / "models" / (f"small-{kind}" if self.small else kind)
        if (why := BROKEN.get(folder)) is not None:
            raise Failed(why)
        if not (folder / "model_index.json").is_file():
            size = f"small-{kind}" if self.small else kind
            command = [sys.executable, "-m", "tests.tiny", "--size", size, "--device", self.device]
            if folder.exists():  # half-made by a run that was stopped
                folder.rename(folder.with_name(f"{folder.name}-broken-{time.time():.0f}"))
            try:
                run([*command, str(folder)])
            except Failed as error:
                BROKEN[folder] = str(error)
                raise
        return folder

    def photos(self) -> Path:
        """Five drawn photos with captions, a little larger than the pictures."""
        from tests.tiny.photos import draw_photos

        folder = self.out / "photos"
        if not folder.is_dir():
            side = self.side("sdxl")
            draw_photos(folder, 5, sizes=((side + 16, side + 8), (side + 8, side + 40)))
            for file in folder.glob("*.png"):
                file.with_suffix(".txt").write_text("a photo of a sks dog on the beach")
        return folder


def left() -> float:
    """Return the seconds until this measurement has to be done; infinite where nobody said."""
    return float(os.environ.get(UNTIL, "inf")) - time.time()


def run(command: list[str], **environment: str) -> str:
    """Output of a command in the project folder; Failed with its last line of stderr, or where the time is up."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    longest = min(3600.0, max(1.0, left()))
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=longest,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        raise Failed(f"stopped after {longest:.0f} s", said) from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Failed(said[-1] if said else f"exit status {done.returncode}", done.stderr)
    return done.stdout


def run_json(command: list[str], result: Path, **options: Any) -> dict[str, Any]:
    """What a command wrote to the JSON file `result`."""
    result.unlink(missing_ok=True)
    run(command, **options)
    return json.loads(result.read_text())


def free() -> None:
    """Memory of dropped modules back to the device."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- rows ------------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "bitsandbytes", "peft", "lycoris_lora")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Values = dict[str, Any]
"""What was measured, by unit or by name; underscored names are for later reading and not shown."""
Goal = tuple[str, Callable[[Values], bool]]
"""What is hoped for in words, and whether values fulfil it."""


class TimeIsUp(Exception):
    """No further row is begun; the same command goes on where this one left off."""


class Broken(Exception):
    """The process cannot use its device any more: every further row needs a new process."""


STICKY = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure", "CUBLAS_STATUS")
"""Words of errors after which each further call of the device fails too."""


class Rows:
    """Rows in `path`, written anew after each. After `until` (seconds since the epoch) none is begun.

    Without `judging`, goals are left out: a small model cannot meet or miss them. Without `again`, a row that failed
    before is not tried again. A `guest` measures nothing itself: card and versions stay as they are written.
    """

    def __init__(
        self,
        path: Path,
        until: float = float("inf"),
        judging: bool = True,
        again: bool = True,
        guest: bool = False,
    ):
        self.path, self.until, self.judging, self.again = path, until, judging, again
        whole = json.loads(path.read_text()) if path.is_file() else {"rows": []}
        self.rows: list[dict[str, Any]] = whole.pop("rows")
        self.about = whole if guest and whole else machine()

    def find(self, point: int, what: str) -> Values | None:
        """The values of a row that was measured, in this run or an earlier one."""
        row = next((row for row in self.rows if (row["point"], row["what"]) == (point, what)), None)
        return row["values"] if row and "error" not in row else None

    def put(self, point: int, what: str, **fields: Any) -> None:
        """Takes the place of an earlier row of that name."""
        new = {"point": point, "what": what, "values": {}, "taken": now(), **fields}
        self.rows = [row for row in self.rows if (row["point"], row["what"]) != (point, what)] + [new]
        self.rows.sort(key=lambda row: row["point"])
        self.write()
        print(line(new), flush=True)

    def drop(self, point: int, what: str) -> None:
        """Remove a row, if it is there."""
        kept = [row for row in self.rows if (row["point"], row["what"]) != (point, what)]
        if len(kept) < len(self.rows):
            self.rows = kept
            self.write()

    def write(self) -> None:
        about = {**self.about, "date": now()}
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps({**about, "rows": self.rows}, indent=1))
        temporary.replace(self.path)

    def failed(self, point: int, what: str) -> bool:
        """Return whether a row was tried and failed."""
        return any((row["point"], row["what"]) == (point, what) and "error" in row for row in self.rows)

    def attempt(
        self, point: int, what: str, measure: Callable[[], Values], goal: Goal | None = None, needs: float = 0
    ) -> Values | None:
        """Measures a row that is not there yet; what goes wrong becomes its reason.

        TimeIsUp where fewer than `needs` seconds are left, Broken after an error that leaves the device unusable.
        """
        if (known := self.find(point, what)) is not None:
            return known
        if not self.again and self.failed(point, what):
            return None
        self.check_time(needs)
        began = time.time()
        try:
            values = measure()
        except Exception as error:
            told = getattr(error, "stderr", "") or traceback.format_exc()
            self.put(point, what, error=reason(error), stderr=told[-TAIL:])
            if not isinstance(error, Failed) and any(words in str(error) for words in STICKY):
                raise Broken from error
            return None
        self.conclude(point, what, values, goal, took_s=round(time.time() - began, 1))
        return values

    def conclude(self, point: int, what: str, values: Values, goal: Goal | None = None, **fields: Any) -> None:
        """Puts a row that follows from others, or was measured together with others."""
        judged = {"goal": goal[0], "met": bool(goal[1](values))} if goal and self.judging else {}
        self.put(point, what, values=values, **judged, **fields)

    def check_time(self, needs: float = 0) -> None:
        if time.time() + needs > self.until:
            raise TimeIsUp


def reason(error: BaseException) -> str:
    """An error as one short line."""
    first = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    if first and isinstance(error, ValueError | RuntimeError):  # messages that speak for themselves
        return first[:200]
    return f"{type(error).__name__}: {first[:160]}" if first else type(error).__name__


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> dict[str, Any]:
    """The card (or the processor), what drives it, and the versions that ran."""
    import torch

    about: dict[str, Any] = {"card": f"no GPU ({platform.machine()}, {os.cpu_count()} cores)"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["card"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**about, "versions": versions}


def shown(row: dict[str, Any]) -> str:
    """'0.21 ms, 1.30 x frozen', or why there is nothing."""
    if "error" in row:
        return f"not measured: {row['error']}"
    return ", ".join(
        f"{figure(value)} {name}" if not isinstance(value, str) else f"{name}: {value}"
        for name, value in row["values"].items()
        if not name.startswith("_") and value is not None
    )


def figure(value: float) -> str:
    """Three digits that count, whole numbers whole."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def verdict(row: dict[str, Any]) -> str:
    return f"{row['goal']}: {'yes' if row['met'] else 'NO'}" if "goal" in row else ""


def line(row: dict[str, Any]) -> str:
    ending = f"   [{verdict(row)}]" if verdict(row) else ""
    return f"{row['point']}  {row['what']:58} {shown(row)}{ending}"


def table(rows: Iterable[dict[str, Any]], titles: dict[int, str]) -> str:
    """The whole as text, a heading for each point."""
    lines, last = [], None
    for row in rows:
        if row["point"] != last:
            last = row["point"]
            lines += ["", f"{last}. {titles[last]}"]
        lines.append(line(row))
    return "\n".join(lines[1:])


def write_markdown(page: Path, data: dict[str, Any], titles: dict[int, str]) -> None:
    """Puts the table between the two marks of `page`; ValueError where it has none."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN} and {END} to write between")
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    lines = [f"Measured on {data['card']}; {data['date']}; {versions}.", ""]
    last = None
    for row in data["rows"]:
        if row["point"] != last:
            last = row["point"]
            lines += ["", f"### {last}. {titles[last]}", "", "| what | measured | goal |", "|---|---|---|"]
        lines.append(f"| {cell(row['what'])} | {cell(shown(row))} | {cell(verdict(row))} |")
    before, rest = text.split(BEGIN, 1)
    page.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.split(END, 1)[1], encoding="utf-8")


def cell(text: str) -> str:
    return text.replace("|", "\\|")
