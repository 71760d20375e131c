"""Do the factors divide the model's layers? Known models answer from their layer tables, before torch is imported."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from diffusekrona_train.config.run import MODEL_ALIASES, RunConfig
from diffusekrona_train.factors import nearest_divisors

TABLES = Path(__file__).resolve().parents[1] / "assets" / "layers"


def check_factors(config: RunConfig) -> None:
    """ValueError naming the first width of a known model that a1 or a2 does not divide, with the nearest divisors."""
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
    """(attn1, attn2 or ff; projection; width in; width out) of a known model's layers, each once."""
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
