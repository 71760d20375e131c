"""Compare the photos of a resumed run with those it started with, by content, and restore their order.

A run begins in the order of file names. From then on its own order holds, by content: a photo that was renamed, moved
or copied with its folder is used when it would have been used before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffusekrona_train.data.names import printable


@dataclass(frozen=True)
class Row:
    """A row of a bucket: the SHA-256 of its photo, its captions by turns, and the photo's name, for messages."""

    content: str
    captions: tuple[str, ...]
    name: str

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        return self.content, self.captions


def written(rows: Iterable[Row]) -> list[list]:
    """Return the rows as JSON takes them."""
    return [[row.content, list(row.captions), row.name] for row in rows]


def read(rows: Iterable[Sequence]) -> list[Row]:
    """Return the rows that `written` gave."""
    return [Row(content, tuple(captions), name) for content, captions, name in rows]


def order_as_before(before: Sequence[Row], now: Sequence[Row]) -> list[int]:
    """Return for each row of `before` the number of today's row that it is. Both hold the same rows in any order."""
    places: dict[tuple, list[int]] = {}
    for index, row in enumerate(now):
        places.setdefault(row.key, []).append(index)
    return [places[row.key].pop(0) for row in before]


def refuse_changes(before: Sequence[Row], now: Sequence[Row]) -> None:
    """Raise ValueError naming the photos that are missing, new or changed, or whose captions changed; names may
    differ."""
    gone, new = _without(before, now, by_content=True), _without(now, before, by_content=True)
    if gone or new:
        before_names, now_names = {row.name for row in before}, {row.name for row in now}
        told = {
            "is another image now": [row for row in gone if row.name in now_names],
            "is not there any more": [row for row in gone if row.name not in now_names],
            "is new": [row for row in new if row.name not in before_names],
        }
        lines = [f"{_names(rows)} {what}" for what, rows in told.items() if rows]
        lines = lines or [f"{_names(new)} is there more often"]
        raise ValueError(f"the photos are not those that it was trained on: {'; '.join(lines)}")
    old, today = _without(before, now), _without(now, before)
    if old:
        row = old[0]
        text = next((other.captions for other in today if other.content == row.content), ())
        was, is_now = (" / ".join(captions) for captions in (row.captions, text))
        more = len({other.content for other in old}) - 1
        raise ValueError(
            f"the caption of {printable(row.name)} was {_short(was)} and is {_short(is_now)}"
            + (f", and those of {more} more photos changed" if more else "")
        )


def _without(rows: Sequence[Row], others: Sequence[Row], by_content: bool = False) -> list[Row]:
    """Return the rows that are not among `others`, each of those counting once."""
    counts = Counter(row.content if by_content else row.key for row in others)
    kept = []
    for row in rows:
        key = row.content if by_content else row.key
        if not counts[key]:
            kept.append(row)
        counts[key] -= counts[key] > 0
    return kept


def _names(rows: Iterable[Row]) -> str:
    names = list(dict.fromkeys(printable(row.name, limit=40) for row in rows))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")
