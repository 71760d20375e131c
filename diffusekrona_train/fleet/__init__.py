"""Many subjects at once on one frozen base: `personalise(jobs, model="sdxl", pack=8)` yields each as it is done.

Importing this package is cheap: torch comes with the first job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusekrona_train.common.progress import EventLog, Progress
from diffusekrona_train.config import RunConfig, make_config
from diffusekrona_train.fleet.jobs import JobError, Tree, common_tree, placeholder, read_line

if TYPE_CHECKING:
    from diffusekrona_train.fleet.service import Done, Source

__all__ = ["Call", "lines_of", "personalise"]


@dataclass(frozen=True)
class Call:
    """What is common to all jobs of a call."""

    common: Tree
    """As a config in YAML, without subject and output."""
    output: str = "runs/fleet"
    """A folder, or a URL that fsspec writes to."""
    pack: int = 8
    """Slots: how many subjects are trained at once."""
    overwrite: bool = False
    """Replace another job that is under the same id."""
    on: str = "here"
    """here, or ray."""
    address: str | None = None
    """A Ray cluster to join; a new one here if omitted."""
    workers: int | None = None
    """Ray actors; one for each GPU if omitted."""
    webhook: str | None = None
    """URL that gets a POST when a job ends."""
    dollars_an_hour: float | None = None
    """What the machine costs, for fleet.html."""

    def __post_init__(self) -> None:
        if not 1 <= self.pack <= 256:
            raise ValueError(f"--pack {self.pack}: give a number of slots from 1 to 256")
        if self.on not in ("here", "ray"):
            raise ValueError(f"--on {self.on!r}: there are here and ray")
        if self.on == "here" and (self.address or self.workers):
            raise ValueError(f"--{'address' if self.address else 'workers'} is for --on ray")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: give 1 or more")
        if self.dollars_an_hour is not None and not 0 <= self.dollars_an_hour < float("inf"):
            raise ValueError(f"--dollars-an-hour {self.dollars_an_hour}: give a price of 0 or more")
        if self.webhook is not None and not self.webhook.startswith(("http://", "https://")):
            raise ValueError(f"--webhook {self.webhook!r}: give an http or https URL")
        if Path(self.output).is_file():
            raise ValueError(f"--output {self.output}: is a file; give a folder")

    @property
    def config(self) -> RunConfig:
        """Return the config that every job starts from, with a subject that stands for all."""
        return make_config(placeholder(self.common))


def personalise(
    jobs: str | Path | Iterable[Mapping[str, Any]],
    *,
    model: str | None = None,
    pack: int = 8,
    output: str | Path = "runs/fleet",
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Iterator[Done]:
    """Train an adapter for each job, `pack` of them at once on one frozen model, and yield each as it ends.

    jobs: a JSONL file, or mappings with `id`, `images`, `class` and whatever a job may set (docs/services.md). What is
    common to all is the model and `config`, a tree as a YAML config gives it. The adapter of a job is
    `output/ID/ID.safetensors`. A job that was done before is skipped, one that was interrupted is resumed, and one that
    fails is a line in `output/failed.jsonl`.

    Raises a one-line ValueError, before any job, for a mistake in what is common to all.
    """
    tree = dict(config or {})
    call = Call(common_tree(model, tree, ()), str(output), pack, overwrite)
    from diffusekrona_train.common.process import step_by_step
    from diffusekrona_train.fleet.service import Rows, check

    check(call)
    rows = lines_of(Path(jobs).expanduser()) if isinstance(jobs, str | Path) else map(dict, jobs)
    return step_by_step(train_all(call, Rows(iter(rows)), progress or Progress()))


def train_all(call: Call, source: Source, progress: Progress) -> Iterator[Done]:
    """Train all jobs of a checked call on this machine; at the end the model is freed."""
    from diffusekrona_train.common.device import free
    from diffusekrona_train.fleet.outlet import open_outlet
    from diffusekrona_train.fleet.service import Fleet

    outlet = open_outlet(call.output)
    outlet.root.mkdir(parents=True, exist_ok=True)
    events = EventLog(progress)
    events.open(outlet.root / "events.jsonl")
    fleet = Fleet(source, call.common, outlet, call.pack, events, overwrite=call.overwrite)
    try:
        yield from fleet.ends()
    finally:
        del fleet
        outlet.close()
        free()


def lines_of(path: Path) -> Iterator[Tree | JobError]:
    """Return the rows of a JSONL file; what is wrong with a line stands for it. ValueError where there is no file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a file with one JSON object a line, or - for a stream")
    return rows_of(path.read_text(encoding="utf-8-sig", errors="replace").splitlines())


def rows_of(lines: Iterable[str]) -> Iterator[Tree | JobError]:
    """Return the object of each line that is not empty and no comment."""
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield row_of(line, number)


def row_of(line: str, number: int) -> Tree | JobError:
    """Return the object of a line, or what is wrong with it."""
    try:
        return read_line(line, number)
    except JobError as error:
        return error
