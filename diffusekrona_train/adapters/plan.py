"""Plan each layer's factors and ranks before anything is built: budgets, indivisible widths."""

from __future__ import annotations

from collections import Counter

from diffusekrona_train.adapters.base import Options
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.config.factors import factorization, fit_budget, nearest_divisors, pair_count
from diffusekrona_train.models.layers import Layer


def plan(spec: AdapterConfig, layers: list[Layer]) -> dict[str, Options]:
    """Return layer name -> options: krona {a1, a2}; lora, loha {rank, alpha}; lokr those and {factor, full_matrix,
    decompose_both}; full {}; terms {rank, rho}; dora {rank, alpha}; oft {block_size}.

    Raises ValueError where factors do not divide a width (with the nearest divisors) or a budget cannot be met.
    """
    if spec.type == "krona":
        pairs = _budget_pairs(spec, layers) or {layer.name: _given_pair(spec, layer) for layer in layers}
        return {name: {"a1": a1, "a2": a2} for name, (a1, a2) in pairs.items()}
    if spec.type == "full":
        return {layer.name: {} for layer in layers}
    if spec.type in _PARTS:
        _check_parts(spec, layers)
    if spec.type == "oft":
        return {layer.name: {"block_size": spec.block_size} for layer in layers}
    if spec.type == "terms":
        return {layer.name: {"rank": spec.rank, "rho": spec.rho} for layer in layers}
    alpha = float(spec.alpha or spec.rank) * (spec.rank**0.5 if spec.rank_scale == "rs" else 1)
    options: Options = {"rank": spec.rank, "alpha": alpha}  # files say alpha / rank, whatever the rule
    if spec.type == "lokr":
        factorization(1, spec.factor)  # names a wrong factor
        options |= {"factor": spec.factor, "full_matrix": spec.full_matrix, "decompose_both": spec.decompose_both}
    return {layer.name: dict(options) for layer in layers}


_PARTS = {"terms": ("rho", ("in_features", "out_features")), "oft": ("block_size", ("in_features",))}
"""Type -> the field that has to divide these widths."""


def _check_parts(spec: AdapterConfig, layers: list[Layer]) -> None:
    """ValueError naming the first layer that the field of a type of _PARTS does not divide."""
    field, widths = _PARTS[spec.type]
    value = getattr(spec, field)
    for layer in layers:
        for side in widths:
            if (width := getattr(layer, side)) % value:
                choices = " and ".join(map(str, sorted(nearest_divisors(width, value))))
                place = f"the {side.split('_')[0]}put width {width} of {layer.name}"
                raise ValueError(f"adapter: {field}={value} does not divide {place}; nearest divisors: {choices}")


def plan_notes(spec: AdapterConfig, layers: list[Layer], options: dict[str, Options]) -> list[str]:
    """Return lines for a command to print: what a budget chose, which divisors were used instead, how a1, a2 are
    named."""
    if spec.type != "krona":
        return []
    notes = _budget_notes(spec, layers, options) or _nearest_notes(spec, layers, options)
    if any(a1 > a2 for a1, a2 in map(_pair, options.values())):
        notes.append(
            "a1 splits the input width, as in the paper; the authors' script names them the other way round: "
            "its (64, 8) is a1: 8, a2: 64 here"
        )
    return notes


def _budget_notes(spec: AdapterConfig, layers: list[Layer], options: dict[str, Options]) -> list[str]:
    if not (spec.params or spec.match_lora_rank):
        return []
    budget, field = _budget(spec, layers)
    chosen = Counter((layer.in_features, layer.out_features, *_pair(options[layer.name])) for layer in layers)
    total = sum(pair_count(*key) * times for key, times in chosen.items())
    rows = [f"  {times} x {i} -> {o}: a1={a1}, a2={a2}" for (i, o, a1, a2), times in sorted(chosen.items())]
    return [f"{field} allows {budget:,} parameters; chosen: {total:,} in {len(layers)} layers", *rows]


def _nearest_notes(spec: AdapterConfig, layers: list[Layer], options: dict[str, Options]) -> list[str]:
    moved = Counter(
        (layer.in_features, layer.out_features, wanted, taken)
        for layer in layers
        if (wanted := _wanted(spec, layer)) != (taken := _pair(options[layer.name]))
    )
    rows = [f"  {times} x {i} -> {o}: (a1, a2) {old} -> {new}" for (i, o, old, new), times in sorted(moved.items())]
    return [f"factors moved to the nearest divisors in {moved.total()} layers:", *rows] if rows else []


def _pair(options: Options) -> tuple[int, int]:
    return options["a1"], options["a2"]


def _wanted(spec: AdapterConfig, layer: Layer) -> tuple[int, int]:
    by_projection = dict(spec.factors).get(layer.projection)  # type: ignore[call-overload]
    pair = by_projection or spec.factors_by_width.get(layer.out_features) or (spec.a1, spec.a2)
    return pair[0], pair[1]


def _given_pair(spec: AdapterConfig, layer: Layer) -> tuple[int, int]:
    pair = []
    for field, value, side, width in zip(
        ("a1", "a2"), _wanted(spec, layer), ("input", "output"), (layer.in_features, layer.out_features), strict=True
    ):
        nearest = nearest_divisors(width, value)
        if nearest[0] != value and spec.on_indivisible == "error":
            choices = " and ".join(map(str, sorted(nearest)))
            raise ValueError(
                f"adapter: {field}={value} does not divide the {side} width {width} of {layer.name}; "
                f"nearest divisors: {choices} (on_indivisible: nearest takes the nearer one)"
            )
        pair.append(nearest[0])
    return pair[0], pair[1]


def _budget(spec: AdapterConfig, layers: list[Layer]) -> tuple[int, str]:
    if spec.params:
        return spec.params, f"adapter.params: {spec.params}"
    rank = spec.match_lora_rank or 0
    widths = sum(layer.in_features + layer.out_features for layer in layers)
    return rank * widths, f"adapter.match_lora_rank: {rank}"


def _budget_pairs(spec: AdapterConfig, layers: list[Layer]) -> dict[str, tuple[int, int]] | None:
    if not (spec.params or spec.match_lora_rank) or not layers:
        return None
    by_width = fit_budget([(layer.in_features, layer.out_features) for layer in layers], *_budget(spec, layers))
    return {layer.name: by_width[layer.in_features, layer.out_features] for layer in layers}
