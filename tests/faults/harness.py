"""A case of the fault matrix, the call of its door, and what must hold in every case.

A case makes its input in a fresh sandbox, calls a real door there (in this process, or in a forked child where a
signal, a limit or missing rights are part of it), and then is judged: exit status, the one line on stderr, which files
stand, and the invariants of `judge_always`.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.doors import Seen, call, fork, spawn
from tests.faults.sandbox import Sandbox, Shared, snapshot, torn

ERROR_LINE = re.compile(r"^(error|fault): ")
PROGRESS = re.compile(r"\d+%\||\bit/s\b|\bs/it\b|\?it/s")
MAY_WRITE = ("runs/*", "cache/*")
NOT_BEGUN = ("runs/*/config.yaml", "runs/*/*.safetensors", "runs/*/checkpoints")
"""What a run that was refused has not written."""
LONGEST_LINE = 700


@dataclass(frozen=True)
class Case:
    """One row of the table. `make` fills the sandbox and returns the door's name and arguments."""

    area: str
    name: str
    make: Callable[[Sandbox], list[str]]
    status: int
    says: str
    """Pattern of the error line (status 1, 2), or of what is printed (status 0 and signals)."""
    same_as: str = ""
    """Why another case may give the same line."""
    exists: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Patterns of files that must, and must not, stand in the sandbox afterwards."""
    may_write: tuple[str, ...] = ()
    """Patterns of files that may be written or changed besides runs/ and cache/."""
    replaced: tuple[str, ...] = ()
    """Patterns of earlier checkpoints that this case replaces, whole, because it was asked to."""
    how: str = "call"
    """call: in this process; fork: in a forked child; spawn: a new process."""
    env: dict[str, str] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    """fork: `file_size` in bytes, `full_at` (files without space), `signal_at` (file, signal), `without` (a package
    that is not installed), `unprivileged`, `kill_after` seconds by `kill_with`."""
    then: Callable[[Sandbox, Seen], None] | None = None
    """Further assertions; an AssertionError is a problem of the case."""
    fast: bool = False
    """Part of the test run."""
    seconds: float = 120
    """It must end within this time."""


@dataclass
class Result:
    case: Case
    problems: list[str]
    line: str
    seconds: float
    status: int


def run_case(case: Case, shared: Shared, keep: Path | None = None) -> Result:
    """Runs one case in a fresh sandbox; the sandbox is kept under `keep` where given and the case fails."""
    room = Path(tempfile.mkdtemp(prefix="krona-fault-"))
    box = Sandbox(room / "box", shared)
    box.folder.mkdir()
    started = time.monotonic()
    try:
        arguments = case.make(box)
        before = snapshot(box.folder)
        door = {"call": call, "fork": fork, "spawn": spawn}[case.how]
        seen = door(arguments, box.folder, case.env, case.limits, case.seconds)
        problems = list(judge(case, box, seen, before))
        line = error_line(seen)
    except Exception as error:
        if not isinstance(error, AssertionError):
            traceback.print_exc()
        problems, line, seen = [f"the case itself failed: {type(error).__name__}: {error}"], "", Seen(-1, "", "")
    if problems and keep:
        shutil.copytree(room, keep / re.sub(r"\W+", "-", case.name), symlinks=True, dirs_exist_ok=True)
        (keep / re.sub(r"\W+", "-", case.name) / "seen.txt").write_text(f"{seen.out}\n--- stderr\n{seen.err}")
    shutil.rmtree(room, ignore_errors=True)
    return Result(case, problems, line.replace(str(box.folder) + "/", ""), time.monotonic() - started, seen.status)


def error_line(seen: Seen) -> str:
    """The line on stderr that says what is wrong, '' where there is none."""
    return next((line for line in seen.err.splitlines() if ERROR_LINE.match(line)), "")


def judge(case: Case, box: Sandbox, seen: Seen, before: dict[str, str]) -> Iterable[str]:
    """What does not hold, as lines; none where the case holds."""
    if seen.status != case.status:
        last = seen.err.strip().splitlines()[-1:] or seen.out.strip().splitlines()[-1:]
        yield f"exit status {seen.status} instead of {case.status} ({' '.join(last)[:300]})"
    said = error_line(seen) if case.status in (1, 2) else seen.out + "\n" + seen.err
    if not re.search(case.says, said, re.DOTALL):
        yield f"does not say {case.says!r}: {said[-500:]!r}"
    for pattern in case.exists:
        if not box.find(pattern):
            yield f"{pattern} is missing"
    for pattern in case.absent:
        if box.find(pattern):
            yield f"{pattern} stands"
    yield from judge_always(case, box, seen, before)
    if case.then and seen.status == case.status:
        try:
            case.then(box, seen)
        except AssertionError as error:
            yield f"afterwards: {error}"


def judge_always(case: Case, box: Sandbox, seen: Seen, before: dict[str, str]) -> Iterable[str]:
    """What holds in every case, whatever it is about."""
    if "Traceback" in seen.err + seen.out:
        yield f"a traceback: {seen.err[-400:]!r}"
    if seen.timed_out:
        yield f"did not end within {case.seconds:.0f} s"
    lines = [line for line in seen.err.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    if len(errors) > 1 or (case.status in (1, 2) and len(errors) != 1):
        yield f"{len(errors)} error lines: {errors[:3]}"
    others = [line for line in lines if line not in errors and not PROGRESS.search(line)]
    if case.status == 2 and others:
        yield f"more than the one line on stderr: {others[0][:200]!r}"
    if any(len(line) > LONGEST_LINE for line in lines):
        yield f"a line of {max(map(len, lines))} characters on stderr"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", re.sub(r"\x1b\[[0-9;]*[mAK]", "", seen.err + seen.out)):
        yield "control characters from the input reach the terminal"
    if box.canary().exists():
        yield "code from a file was run"
    yield from judge_files(case, box, before, killed=seen.signal in (9, 15))


def judge_files(case: Case, box: Sandbox, before: dict[str, str], killed: bool) -> Iterable[str]:
    after = snapshot(box.folder)
    allowed = (*MAY_WRITE, *case.may_write)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) == after.get(name):
            continue
        if not any(fnmatch.fnmatch(name, pattern) for pattern in allowed):
            yield f"{name!r} was {'made' if name not in before else 'removed' if name not in after else 'changed'}"
        if ".writing-" in name or name.endswith((".tmp", ".part")):
            if not killed:
                yield f"the temporary {name} was left"
        elif name in after and (why := torn(box.folder / name)):
            yield f"{name} is not whole: {why}"
    for name in before:
        asked = any(fnmatch.fnmatch(name, pattern) for pattern in case.replaced)
        if "checkpoints/" in name and before[name] != after.get(name) and not asked:
            yield f"the earlier checkpoint {name} was harmed"


def normal_form(line: str) -> str:
    """An error line without what varies: names in quotes, paths, numbers."""
    line = re.sub(r"'[^']*'|\"[^\"]*\"", "…", line)
    line = re.sub(r"\S*/\S*|\S+\.(yaml|png|jpg|txt|safetensors|bin|pt|pth|ckpt|pkl|jsonl)\b", "…", line)
    return re.sub(r"[-+]?\d[\d,._e]*", "0", line)


def same_lines(results: Iterable[Result]) -> list[str]:
    """Pairs of cases that reach the same error line although the table does not say why."""
    seen: dict[str, Case] = {}
    found = []
    for result in results:
        if not result.line:
            continue
        form = normal_form(result.line)
        first = seen.setdefault(form, result.case)
        if first is not result.case and not result.case.same_as and not first.same_as:
            found.append(f"{first.area}: {first.name} = {result.case.area}: {result.case.name} ({result.line[:120]})")
    return found
