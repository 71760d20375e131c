"""`krona-train many jobs.jsonl`: an adapter for each of many subjects, several at once on one frozen model."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusekrona_train.cli import guarded
from diffusekrona_train.cli.terminal import Terminal
from diffusekrona_train.common.progress import Fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.live import Live
    from rich.table import Table

    from diffusekrona_train.fleet.call import Call
    from diffusekrona_train.fleet.service import Done


@guarded
def many(
    jobs: Annotated[str, typer.Argument(help="JSONL file with a job a line, or - for a stream.")],
    model: Annotated[str | None, typer.Option(help="Base model of all jobs: alias, hub name, folder, file.")] = None,
    pack: Annotated[int, typer.Option(help="How many subjects are trained at once.")] = 8,
    output: Annotated[str, typer.Option(help="Folder or fsspec URL; each job gets a folder in it.")] = "runs/fleet",
    config: Annotated[Path | None, typer.Option(help="A YAML with what is common to all jobs.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Sets one common field.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other jobs under the same id.")] = False,
    on: Annotated[str, typer.Option(help="here, or ray: an actor for each GPU.")] = "here",
    address: Annotated[str | None, typer.Option(help="A Ray cluster to join.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray actors (default: one for each GPU).")] = None,
    webhook: Annotated[str | None, typer.Option(help="URL that gets a POST when a job ends.")] = None,
    dollars_an_hour: Annotated[float | None, typer.Option(help="What the machine costs, for fleet.html.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print events as JSON lines instead of a table.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train many subjects at once on one frozen model: krona-train many jobs.jsonl --model sdxl --pack 8"""
    from diffusekrona_train.config import read_yaml
    from diffusekrona_train.fleet.call import Call
    from diffusekrona_train.fleet.jobs import common_tree

    common = common_tree(model, read_yaml(config) if config else None, set_ or [])
    call = Call(common, output, pack, overwrite, on, address, workers, webhook, dollars_an_hour)
    board = Printed() if json_ else Board(pack)
    with board.listening():
        ends = board.through(_ends(call, jobs, board))
    print(_summary(ends), file=sys.stderr if json_ else sys.stdout)
    if board.signum is not None:
        print("stopped; the same command continues", file=sys.stderr)
        board.leave()
    if ends.get("failed"):
        raise SystemExit(1)


def _ends(call: Call, jobs: str, board: Terminal) -> Iterator[Done]:
    from diffusekrona_train.fleet import train_all
    from diffusekrona_train.fleet.jobs import lines_of
    from diffusekrona_train.fleet.service import Rows, check
    from diffusekrona_train.fleet.stream import Stream

    check(call)
    source = Stream(sys.stdin) if jobs == "-" else Rows(lines_of(Path(jobs).expanduser()))
    return train_all(call, source, board)


def _summary(ends: dict[str, int]) -> str:
    order = ("trained", "skipped", "cancelled", "stopped", "failed")
    return ", ".join(f"{ends[end]} {end}" for end in order if end in ends) or "no jobs"


class Board(Terminal):
    """The slots as a table that is drawn over itself; where there is no terminal, a line for each job that ends."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self._live: Live | None = None
        self._pack: Fields = {}
        self._began = time.monotonic()

    def through(self, ends: Iterator[Done]) -> dict[str, int]:
        """Take all jobs; return how many ended in which way."""
        counts: dict[str, int] = {}
        self._open()
        try:
            for done in ends:
                counts[done.end] = counts.get(done.end, 0) + 1
                self._line(_sentence(done), warning=done.end == "failed")
        finally:
            self._close()
        return counts

    def report(self, event: str, **fields: object) -> None:
        if event == "pack":
            self.interruptible = True
            self._pack = fields
            self._draw()
        elif event == "warning" or (event == "message" and "job" not in fields):
            about = f"{fields['job']}: " if "job" in fields else ""
            self._line(about + str(fields["text"]), warning=event == "warning")

    def _open(self) -> None:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4)
            self._live.start()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(table_of(self._pack))

    def _line(self, text: str, warning: bool) -> None:
        if self._live is not None:
            self._live.console.print(("warning: " if warning else "") + text, markup=False, highlight=False)
        else:
            super()._line(text, warning)


class Printed(Board):
    """Every event as a line of JSON on stdout."""

    def __init__(self) -> None:
        super().__init__(0)

    def report(self, event: str, **fields: object) -> None:
        self.interruptible = self.interruptible or event == "pack"
        print(json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str), flush=True)

    def _open(self) -> None:
        pass

    def _line(self, text: str, warning: bool) -> None:
        pass


def _sentence(done: Done) -> str:
    if done.end == "trained":
        return f"{done.id}: {done.steps} steps in {done.seconds:.0f} s: {done.adapter}"
    return f"{done.id}: {done.end}{f': {done.reason}' if done.reason else ''}"


def table_of(pack: Fields) -> Table:
    """Return rich's table of the slots, and a line under it: what is done, subjects an hour, time left."""
    from rich.table import Table

    table = Table(caption=caption_of(pack), min_width=64)  # the line under it is not broken
    for name in ("slot", "job", "step", "loss"):
        table.add_column(name)
    running = {row["slot"]: row for row in pack["running"]}
    for slot in range(pack["slots"]):
        row = running.get(slot)
        loss = f"{row['loss']:.4f}" if row and row["loss"] is not None else ""
        table.add_row(str(slot), *((row["job"], f"{row['step']} / {row['steps']}", loss) if row else ("", "", "")))
    return table


def caption_of(pack: Fields) -> str:
    """Return how many jobs ended, how many an hour, and how long those that are running need."""
    parts = [f"{pack[end]} {end}" for end in ("trained", "skipped", "failed", "cancelled") if pack.get(end)]
    if pack.get("trained") and pack["seconds"] > 0:
        parts.append(f"{3600 * pack['trained'] / pack['seconds']:.0f} subjects an hour")
    if pack.get("steps_a_second"):
        left = max((row["steps"] - row["step"] for row in pack["running"]), default=0)
        parts.append(f"{left / pack['steps_a_second']:.0f} s left for these")
    return ", ".join(parts)
