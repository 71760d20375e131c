"""docs/reliability.md: the table of the fault matrix as it was last printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.faults.harness import Result

TITLE = """\
# Reliability

What happens when input is wrong, a disk is full, or a process dies: {held} of {all} cases held, {fuzzed} random inputs
besides. This page is written by the harness, which runs the real commands:

    python scripts/fault_matrix.py --fuzz-seconds 60 --markdown docs/reliability.md

Held in every case:

- no traceback (`--debug` shows it), and one line on stderr that begins with `error:` or `fault:`, the same for no two
  cases but where the tables say why;
- exit status 2 for a user's mistake, 1 for a fault, 130 and 143 after SIGINT and SIGTERM;
- no half-written file under its final name, no earlier checkpoint harmed;
- no file written outside the output and cache folders, no code run from a file;
- nothing from a file name or a prompt moves the terminal's cursor.
"""
AREAS = {
    "config": "Wrong values, wrong YAML, wrong files: found before a weight is loaded, and all but those about layers "
    "before torch is.",
    "images": "Photos, captions and folders, by `krona-train --check`.",
    "adapters": "Adapter files, by `krona-convert` and `krona-inspect factors`.",
    "runs": "Signals, full disks, missing rights and damage between two runs. A run that died goes on with `--resume` "
    "and ends with the adapter of a run that did not, bit for bit.",
    "sampling": "What `krona-sample`, `krona-eval` and `krona-inspect` are given, and what stands in their way.",
}


def write(path: Path, results: Sequence[Result], fuzzed: Sequence) -> None:
    """The page at `path`, atomically."""
    from diffusekrona_train.common.files import atomic

    tried = sum(outcome.tried for outcome in fuzzed)
    held = sum(not result.problems for result in results)
    parts = [TITLE.format(held=held, all=len(results), fuzzed=f"{tried:,}" if tried else "no")]
    for area, about in AREAS.items():
        rows = [result for result in results if result.case.area == area]
        if rows:
            parts.append(
                f"## {area.capitalize()} ({len(rows)})\n\n{about}\n\n| case | exit | says | held |\n|---|---|---|---|\n"
            )
            parts[-1] += "".join(map(_row, rows))
    if fuzzed:
        lines = [f"| {outcome.name} | {outcome.tried:,} | {'yes' if outcome.held else 'no'} |\n" for outcome in fuzzed]
        parts.append("## Random input\n\n| what | examples | held |\n|---|---|---|\n" + "".join(lines))
    with atomic(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def _row(result: Result) -> str:
    case = result.case
    says = result.line if len(result.line) <= 150 else result.line[:149] + "…"
    return f"| {_cell(case.name)} | {case.status} | {_cell(says)} | {'no' if result.problems else 'yes'} |\n"


def _cell(text: str) -> str:
    for mark in "\\|<>*_`[]":
        text = text.replace(mark, "\\" + mark if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return text
