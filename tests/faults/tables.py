"""All tables of cases, by area."""

from __future__ import annotations

from tests.faults import (
    adapters,
    between,
    config,
    disks,
    foreign,
    images,
    modelfiles,
    models,
    runs,
    sampling,
    stops,
    studio,
)
from tests.faults.harness import Case

TABLES = {
    "config": (config,),
    "images": (images,),
    "adapters": (adapters, foreign),
    "runs": (runs, disks, between, models, modelfiles),
    "sampling": (sampling, stops),
    "studio": (studio,),
}
AREAS = tuple(TABLES)


def all_cases(area: str | None = None) -> list[Case]:
    """The cases of one area, or of all; names differ within an area."""
    rooms = [room for name, rooms in TABLES.items() if area in (None, name) for room in rooms]
    cases = [case for room in rooms for case in room.cases()]
    assert len({(case.area, case.name) for case in cases}) == len(cases), "two cases have the same name"
    return cases
