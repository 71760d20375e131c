"""Many subjects at once on one frozen base: `personalise(jobs, model="sdxl", pack=8)` yields each as it is done.

Importing this package is cheap: torch comes with the first job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusekrona_train.common.progress import Progress
from diffusekrona_train.fleet.call import Call
from diffusekrona_train.fleet.jobs import common_tree, lines_of

if TYPE_CHECKING:
    from diffusekrona_train.fleet.service import Done, Source

__all__ = ["personalise", "train_all"]


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
    """Train all jobs of a checked call, here or on Ray."""
    if call.on == "ray":
        from diffusekrona_train.fleet.spread import train_on_ray

        return train_on_ray(call, source, progress)
    from diffusekrona_train.fleet.service import train_here

    return train_here(call, source, progress)
