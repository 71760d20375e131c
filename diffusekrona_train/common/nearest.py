"""What a misspelt word was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6, count: int = 1) -> list[str]:
    """Return up to `count` of `known` that look like `word`, the most similar first; `cutoff` in (0, 1]: 1 is equal."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6, shown: str = "{}") -> str:
    """Return 'did you mean dog?', the name written as in `shown`; '' where nothing is similar."""
    found = nearest(word, known, cutoff)
    return f"did you mean {shown.format(found[0])}?" if found else ""
