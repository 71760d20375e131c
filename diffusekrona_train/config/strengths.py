"""A schedule of the adapters' strength over the noise levels of sampling, as text: "0.3@0.25".

Progress runs from 0 (pure noise) to 1 (the finished image). It counts noise levels, not sampling steps: at timestep t
of T it is 1 - t / (T - 1), which is ComfyUI's start_percent. "0.3@0.25" is strength 0.3 in the first quarter and 1
afterwards; parts are joined with "+": "0.2@0.2+0.6@0.5" is 0.2, then 0.6 from 0.2 to 0.5, then 1.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LARGEST = 10.0
"""Strengths beyond this only make noise."""


class Part(NamedTuple):
    """`strength` multiplies what the adapters add until `until`, a progress above 0 and up to 1."""

    strength: float
    until: float


def parse_strengths(text: str) -> tuple[Part, ...]:
    """Return the parts of a schedule, () for "" or "none"; ValueError of one line for anything else."""
    if text in ("", "none"):
        return ()
    parts: list[Part] = []
    for piece in text.split("+"):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)@([0-9]*\.?[0-9]+)\s*", piece)
        if not match:
            raise ValueError(f"strength_schedule: {text!r} should be STRENGTH@UNTIL such as 0.3@0.25, joined with +")
        part = Part(float(match[1]), float(match[2]))
        if part.strength > LARGEST:
            raise ValueError(f"strength_schedule: {text!r}: strength {part.strength:g}; give 0 to {LARGEST:g}")
        if not (parts[-1].until if parts else 0.0) < part.until <= 1:
            raise ValueError(
                f"strength_schedule: {text!r}: {part.until:g} should lie above the part before and up to 1"
            )
        parts.append(part)
    return tuple(parts)


def strength_at(parts: tuple[Part, ...], progress: float) -> float:
    """Return the strength at a progress: that of the first part that is not over, 1 after the last."""
    return next((part.strength for part in parts if progress < part.until), 1.0)
