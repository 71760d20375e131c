"""What one call of many jobs is given: the common config, the output, the slots, where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusekrona_train.config import RunConfig, make_config
from diffusekrona_train.fleet.jobs import Tree, placeholder


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
