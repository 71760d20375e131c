"""All tables of cases, by area."""

from __future__ import annotations

from scripts.faults import adapters, config, images, runs, sampling
from scripts.faults.harness import Case

TABLES = {
    "config": config.cases,
    "images": images.cases,
    "adapters": adapters.cases,
    "runs": runs.cases,
    "sampling": sampling.cases,
}
AREAS = tuple(TABLES)


def all_cases(area: str | None = None) -> list[Case]:
    """The cases of one area, or of all; names differ within an area."""
    cases = [case for name, table in TABLES.items() if area in (None, name) for case in table()]
    assert len({(case.area, case.name) for case in cases}) == len(cases), "two cases have the same name"
    return cases
