"""Split a width in two: divisors, LoKr's FACTORIZATION, and (a1, a2) from a budget of parameters. Integers only.

A layer of in × out with A (a2, a1) trains a1*a2 + in*out/(a1*a2) numbers: below the square root of in*out, bigger
factors mean fewer parameters. Nobody guesses that right, so a budget can be given instead.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
import re

from diffusekrona_train.common.files import ASSETS
from diffusekrona_train.config.run import MODEL_ALIASES, RunConfig

NEAR_BUDGET = 0.9
"""A choice is near the budget when it uses this share of what the most generous fitting one uses."""


@functools.cache
def divisors(width: int) -> tuple[int, ...]:
    """Return all divisors of `width`, ascending."""
    small = [i for i in range(1, math.isqrt(width) + 1) if width % i == 0]
    return tuple(small + [width // i for i in reversed(small) if i * i != width])


def nearest_divisors(width: int, wanted: int) -> list[int]:
    """Return the divisors of `width` on both sides of `wanted`, the nearer one (of a tie: the smaller) first."""
    options = divisors(width)
    i = bisect.bisect_left(options, wanted)
    return sorted(options[max(0, i - 1) : i + 1], key=lambda divisor: (abs(divisor - wanted), divisor))


def factorization(width: int, factor: int) -> tuple[int, int]:
    """Return LoKr's split of a width, smaller part first (LyCORIS).

    (factor, width / factor) where a positive factor divides; else the most balanced pair whose smaller part is at most
    `factor` (-1: no bound). Raises ValueError for 0 and for numbers below -1.
    """
    if factor == 0 or factor < -1:
        raise ValueError(f"factor: {factor} is neither a positive number nor -1 (the most balanced divisors)")
    if factor > 0 and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    bound = width if factor == -1 else factor
    small = max(d for d in divisors(width) if d * d <= width and d <= bound)
    return small, width // small


def pair_count(width_in: int, width_out: int, a1: int, a2: int) -> int:
    """Count the trainable numbers of A (a2, a1) and B on a layer of these widths."""
    return a1 * a2 + (width_in // a1) * (width_out // a2)


def pair_cost(width_in: int, width_out: int, a1: int, a2: int) -> int:
    """Count multiplications per token in the cheaper order (kron.kron_macs, without torch)."""
    b1, b2 = width_in // a1, width_out // a2
    return min(a1 * b1 * b2 + a1 * a2 * b2, a1 * a2 * b1 + a2 * b1 * b2)


def fit_budget(widths: list[tuple[int, int]], budget: int, field: str) -> dict[tuple[int, int], tuple[int, int]]:
    """Return (in, out) -> (a1, a2) for layers of these widths (one entry a layer) that train together at most `budget`
    numbers.

    The budget is shared as one product a1*a2 for all layers would share it. Of the pairs that fit a layer's share and
    use most of it, those with 4 <= a1 < a2 are preferred (the paper's recommended side), and of them the cheapest
    contraction. Raises ValueError where even the smallest factors need more.
    """
    least = sum(pair_count(*width, *_smallest(*width)) for width in widths)
    if least > budget:
        raise ValueError(
            f"{field} allows {budget:,} parameters, but the smallest factors of these {len(widths)} layers "
            f"need {least:,}; give a larger budget, or fewer layers (targets, attention, blocks)"
        )
    dense = sum(width_in * width_out for width_in, width_out in widths)
    product = (budget - math.sqrt(max(0, budget**2 - 4 * len(widths) * dense))) / (2 * len(widths))
    chosen = {width: _cheapest_near(*width, product) for width in set(widths)}
    if sum(pair_count(*width, *chosen[width]) for width in widths) > budget:
        return {width: _smallest(*width) for width in set(widths)}
    return chosen


def _pairs(width_in: int, width_out: int) -> list[tuple[int, int]]:
    return [(a1, a2) for a1 in divisors(width_in) for a2 in divisors(width_out)]


def _smallest(width_in: int, width_out: int) -> tuple[int, int]:
    return min(_pairs(width_in, width_out), key=lambda pair: (pair_count(width_in, width_out, *pair), *_order(pair)))


def _cheapest_near(width_in: int, width_out: int, product: float) -> tuple[int, int]:
    """Return the preferred pair with a1*a2 >= product (so within the share) that is near it."""
    smallest = _smallest(width_in, width_out)
    most = max(product * (1 - 1e-9), 1.0)
    fitting = [pair for pair in _pairs(width_in, width_out) if most <= pair[0] * pair[1] <= smallest[0] * smallest[1]]
    if not fitting:
        return smallest
    best = max(pair_count(width_in, width_out, *pair) for pair in fitting)
    near = [pair for pair in fitting if pair_count(width_in, width_out, *pair) >= NEAR_BUDGET * best]
    return min(near, key=lambda pair: (_order(pair)[0], pair_cost(width_in, width_out, *pair), pair))


def _order(pair: tuple[int, int]) -> tuple[int, int, int]:
    """Return the sort key: the preferred sides first."""
    a1, a2 = pair
    return 0 if 4 <= a1 < a2 else 1 if 2 <= a1 < a2 else 2 if a1 <= a2 else 3, a1, a2


TABLES = ASSETS / "layers"


def check_factors(config: RunConfig) -> None:
    """Raise ValueError naming the first width of a known model that a1 or a2 does not divide, with the nearest
    divisors."""
    spec = config.adapter
    alias = next((alias for alias, name in MODEL_ALIASES.items() if config.model in (alias, name)), None)
    fixed = spec.params is None and spec.match_lora_rank is None and spec.on_indivisible == "error"
    if alias is None or spec.type != "krona" or not fixed or spec.blocks is not None:
        return
    kinds = {"both": ("attn1", "attn2"), "self": ("attn1",), "cross": ("attn2",)}[spec.attention]
    for kind, projection, width_in, width_out in _widths("sd15" if alias == "sd14" else alias):
        if not (spec.ffn if projection == "ffn" else projection in spec.targets and kind in kinds):
            continue
        by_projection = dict(spec.factors).get(projection)  # type: ignore[call-overload]
        a1, a2 = by_projection or spec.factors_by_width.get(width_out) or (spec.a1, spec.a2)
        for name, value, side, width in (("a1", a1, "input", width_in), ("a2", a2, "output", width_out)):
            if width % value:
                near = " and ".join(map(str, sorted(nearest_divisors(width, value))))
                raise ValueError(
                    f"adapter.{name}: {value} does not divide the {side} width {width} of the {projection} layers "
                    f"of {alias}; nearest are {near} (or set adapter.on_indivisible: nearest)"
                )


@functools.cache
def _widths(alias: str) -> list[tuple[str, str, int, int]]:
    """Return (attn1, attn2 or ff; projection; width in; width out) of a known model's layers, each once."""
    table = TABLES / f"{alias}.json"
    if not table.is_file():
        return []
    found = {}
    for name, width_in, width_out in json.loads(table.read_text(encoding="utf-8"))["layers"]:
        match = re.search(r"\.(attn1|attn2|ff)\.(?:to_(q|k|v|out)|net)", name)
        if match:
            projection = {"out": "o", None: "ffn"}.get(match[2], match[2])
            found[match[1], projection, width_in, width_out] = None
    return list(found)
