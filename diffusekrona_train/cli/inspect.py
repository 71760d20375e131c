"""krona-inspect: how many parameters a choice of factors means, the paper's Table 2, and what an adapter learnt."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusekrona_train.cli import PLAIN, enter, guarded

if TYPE_CHECKING:
    from diffusekrona_train.adapters.formats.adapterfile import AdapterFile
    from diffusekrona_train.config import AdapterConfig

app = typer.Typer(
    **PLAIN,
    no_args_is_help=True,
    help="Count parameters, print the paper's Table 2, and plot what an adapter learnt.",
)

Model = Annotated[
    str, typer.Option(help="An alias (see krona-inspect models; no weights needed) or a pipeline folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Ffn = Annotated[bool, typer.Option("--ffn", help="The feed-forward layers too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Kind(StrEnum):
    krona = "krona"
    lora = "lora"
    lokr = "lokr"
    loha = "loha"
    full = "full"


@app.command()
@guarded
def params(
    model: Model = "sdxl",
    adapter: Annotated[Kind, typer.Option(help="Kind of adapter.")] = Kind.krona,
    a1: Annotated[int | None, typer.Option(help="krona: parts of the input width (the paper's a1).")] = None,
    a2: Annotated[int | None, typer.Option(help="krona: parts of the output width (the paper's a2).")] = None,
    rank: Annotated[int | None, typer.Option(help="lora, lokr, loha: the rank.")] = None,
    factor: Annotated[int | None, typer.Option(help="lokr: FACTORIZATION factor, -1 for the most balanced.")] = None,
    full_matrix: Annotated[bool, typer.Option("--full-matrix", help="lokr: both factors as full matrices.")] = False,
    decompose_both: Annotated[
        bool, typer.Option("--decompose-both", help="lokr: the smaller factor thin too.")
    ] = False,
    ffn: Ffn = False,
    targets: Annotated[str, typer.Option(help="Projections, as letters.")] = "qkvo",
    attention: Annotated[str, typer.Option(help="both, self or cross.")] = "both",
    streams: Annotated[
        list[str] | None, typer.Option(help="image, text: only layers that see these tokens; repeat it for both.")
    ] = None,
    blocks: Annotated[list[str] | None, typer.Option(help="Only layers whose name matches.")] = None,
    budget: Annotated[
        str | None, typer.Option("--params", help="krona: a budget such as 4M instead of a1, a2.")
    ] = None,
    match_lora_rank: Annotated[int | None, typer.Option(help="krona: stay within LoRA of this rank.")] = None,
    nearest: Annotated[bool, typer.Option("--nearest", help="krona: take the nearest divisor of a width.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Count what an adapter would train, by projection and width, without loading a model."""
    chosen = {
        "a1": a1,
        "a2": a2,
        "rank": rank,
        "factor": factor,
        "streams": streams or None,
        "blocks": blocks or None,
        "params": budget,
        "match_lora_rank": match_lora_rank,
        "on_indivisible": "nearest" if nearest else None,
    }
    given = {key: value for key, value in chosen.items() if value is not None}
    flags = {"full_matrix": full_matrix, "decompose_both": decompose_both, "ffn": ffn}
    spec = _spec(model, {"type": adapter.value, "targets": list(targets), "attention": attention, **flags, **given})
    layers, base = _layers(model)
    from diffusekrona_train.adapters import plan, plan_notes
    from diffusekrona_train.models.layers import select_layers

    layers = select_layers(layers, spec)
    options = plan(spec, layers)
    rows = _rows(spec, layers, options)
    total = {name: sum(row[name] for row in rows) for name in SUMS}
    if json_:
        settings = spec.model_dump(mode="json")
        print(
            json.dumps(
                {
                    "model": model,
                    "adapter": settings,
                    **total,
                    "base": base,
                    "share": total["trainable"] / base,
                    "rows": rows,
                }
            )
        )
        return
    _print_table(rows, total, base)
    for note in plan_notes(spec, layers, options):
        print(note)


@app.command()
@guarded
def models(json_: Json = False, debug: Debug = False) -> None:
    """List the models that have a short name: hub name, licence, download."""
    from dataclasses import asdict

    from diffusekrona_train.config import EMBEDDED, MODEL_ALIASES
    from diffusekrona_train.config.known import known_models

    known = known_models()
    if json_:
        told = {alias: asdict(known[alias]) if alias in known else {"hub": hub} for alias, hub in MODEL_ALIASES.items()}
        print(json.dumps(told))
        return
    for alias, hub in MODEL_ALIASES.items():
        about = "in the package" if alias in EMBEDDED else ""
        if alias in known:
            gated = ", gated" if known[alias].gated else ""
            about = f"{known[alias].licence}{gated}, {known[alias].download_gb:g} GB"
        print(f"{alias:<16} {hub:<44} {about}".rstrip())


@app.command()
@guarded
def grid(model: Model = "sdxl", ffn: Ffn = False, json_: Json = False, debug: Debug = False) -> None:
    """Print the paper's Table 2: trainable parameters for a1, a2 in powers of two to 128, by the formula."""
    from diffusekrona_train.models.layers import select_layers

    spec = _spec(model, {"ffn": ffn})
    layers = select_layers(_layers(model)[0], spec)
    powers = [2**n for n in range(8)]
    counts = [[_count(layers, a1, a2) for a2 in powers] for a1 in powers]
    if json_:
        print(json.dumps({"model": model, "layers": len(layers), "a1": powers, "a2": powers, "trainable": counts}))
        return
    print(f"trainable parameters of A ⊗ B in {len(layers)} layers of {model}: sum of a1*a2 + d*h / (a1*a2)")
    print("  a1 \\ a2" + "".join(f"{a2:>14}" for a2 in powers))
    for a1, row in zip(powers, counts, strict=True):
        print(f"{a1:>9}" + "".join(f"{'-' if count is None else format(count, ','):>14}" for count in row))
    if model == "sdxl":
        print(
            "remark: the paper's a1 = 1 row counts a B four times smaller than its shapes allow; the row here is exact."
        )
    print("        a1 and a2 count only through their product; '-': a1 or a2 does not divide a width.")


@app.command()
@guarded
def factors(
    file: Annotated[Path, typer.Argument(help="Adapter file (.safetensors).")],
    output: Annotated[Path, typer.Option(help="Folder for the plots and spectra.json.")],
    model: Annotated[str | None, typer.Option(help="The base, for norms relative to its weights.")] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Plot what an adapter learnt: norms by layer, singular values, the factors A; the same as JSON."""
    from diffusekrona_train.adapters import spectra
    from diffusekrona_train.adapters.formats import open_adapter
    from diffusekrona_train.report import factors as plots

    adapter = open_adapter(file, model)
    if any(layer.kind == "all" for layer in adapter.layers):
        raise ValueError(f"{file}: full fine-tuning of the whole denoiser has no factors to plot")
    norms, remark = _base_norms(adapter, model)
    rows = spectra.measure(adapter.groups, adapter.layers, norms)
    written = plots.write_pictures(rows, adapter.groups, output)
    if json_:
        print(json.dumps(plots.summary(rows)))
        return
    assert adapter.spec is not None
    print(f"{file}: {adapter.spec.type}, {len(rows)} layers, {remark}")
    print("changed most (‖ΔW‖ / ‖W‖):" if norms else "changed most (‖ΔW‖):")
    for row in spectra.strongest(rows)[:5]:
        print(f"  {row.size:10.4g}  {row.name}  (90 % of ‖ΔW‖² in rank {row.energy_rank_90})")
    for path in written:
        print(path)


def _spec(model: str, values: dict[str, Any]):
    """Return AdapterConfig with the model's own defaults under `values`; a given factor is never one of those
    defaults."""
    from pydantic import ValidationError

    from diffusekrona_train.config import MODEL_DEFAULTS, AdapterConfig, one_line

    defaults = MODEL_DEFAULTS.get(model, {}).get("adapter", {}) if values.get("type", "krona") == "krona" else {}
    try:
        return AdapterConfig.model_validate({**defaults, **values})
    except ValidationError as error:
        raise ValueError(one_line(error)) from None


def _layers(model: str) -> tuple[list, int]:
    """Return all layers that can be adapted and the denoiser's parameters; a known alias needs no weights."""
    from diffusekrona_train.models import layers as tables
    from diffusekrona_train.models import open_model

    if model in tables.TABLES:
        return tables.layer_table(model), tables.base_parameters(model)
    source = open_model(model)
    return source.layers(), source.base_parameters()


def _rows(spec: AdapterConfig, layers: list, options: dict) -> list[dict[str, Any]]:
    """Return one row for each projection, pair of widths and choice of factors, in the order of the model."""
    from diffusekrona_train.adapters import ADAPTERS, macs

    rows: dict[tuple, dict[str, Any]] = {}
    single: dict[tuple, tuple[int, int]] = {}
    for layer in layers:
        shapes = ADAPTERS[spec.type].shapes(layer, options[layer.name], spec)
        factors = ", ".join("x".join(map(str, shape)) for suffix, shape in shapes.items() if suffix != "alpha")
        key = (layer.projection, layer.in_features, layer.out_features, factors)
        if key not in rows:
            fields = ("projection", "in", "out", "factors")
            rows[key] = {**dict(zip(fields, key, strict=True)), **dict.fromkeys(SUMS, 0)}
            rows[key]["lora_rank"] = _lora_rank(spec.type, shapes)
            single[key] = _size(shapes), macs(spec, layer, options[layer.name])
        count, cost = single[key]
        values = (1, count, cost, layer.in_features * layer.out_features)
        for name, value in zip(SUMS, values, strict=True):
            rows[key][name] += value
    return list(rows.values())


SUMS = ("layers", "trainable", "macs_per_token", "base_macs_per_token")


def _lora_rank(kind: str, shapes: dict) -> int | None:
    """Return the rank of the LoRA that is exactly this layer's change, None where there is none but a dense one."""
    import torch

    from diffusekrona_train.adapters.formats.exports import exact_rank

    if kind not in ("krona", "lora", "lokr"):
        return None
    factors = {suffix: torch.empty(shape, device="meta") for suffix, shape in shapes.items() if suffix != "alpha"}
    return exact_rank(factors | {"alpha": torch.ones(())})


def _size(shapes: dict) -> int:
    import math

    return sum(math.prod(shape) for suffix, shape in shapes.items() if suffix != "alpha")


def _print_table(rows: list[dict], total: dict, base: int) -> None:
    sums = f"{'layers':>6}  {'trainable':>12}  {'of base':>8}  {'MAC/token':>12}  {'of layer':>8}"
    print(f"{'proj':<5}{'in -> out':>14}  {sums}  {'LoRA':>5}  factors")
    for row in rows:
        widths = f"{row['in']} -> {row['out']}"
        print(
            f"{row['projection']:<5}{widths:>14}  {_numbers(row, base)}  {row['lora_rank'] or '-':>5}  {row['factors']}"
        )
    print(f"{'all':<5}{'':>14}  {_numbers(total, base)}")
    print(
        f"base: {base:,} parameters; MAC/token: multiplications a token adds, summed over the layers; "
        "LoRA: rank of the exact LoRA"
    )


def _numbers(row: dict, base: int) -> str:
    share, cost = row["trainable"] / base, row["macs_per_token"] / row["base_macs_per_token"]
    return f"{row['layers']:>6}  {row['trainable']:>12,}  {share:>8.4%}  {row['macs_per_token']:>12,}  {cost:>8.2%}"


def _count(layers: list, a1: int, a2: int) -> int | None:
    if any(layer.in_features % a1 or layer.out_features % a2 for layer in layers):
        return None
    return sum(a1 * a2 + layer.in_features * layer.out_features // (a1 * a2) for layer in layers)


def _base_norms(adapter: AdapterFile, model: str | None) -> tuple[dict[str, float] | None, str]:
    """Return ‖W‖ of each adapted layer from the base model, and a remark; None where the base is not on this
    machine."""
    import os

    named = model or str(adapter.info.get("model") or "")
    if not named or "sha256:" in named:
        return (
            None,
            f"absolute norms only: the base model ({named or 'not named in the file'}) is not here; give --model",
        )
    if model is None:  # a plot is not a reason to download gigabytes
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from diffusekrona_train.models import open_model

    try:
        source = open_model(named)
        denoiser = source.load("denoiser", dtype=torch.float32, device="cpu")["denoiser"]
    except ValueError:
        if model is not None:
            raise
        return None, f"absolute norms only: the base model {named} is not on this machine; give --model"
    weights = {layer.name: denoiser.get_submodule(layer.name).weight for layer in adapter.layers}
    return {
        name: float(weight.float().norm()) for name, weight in weights.items()
    }, f"relative to the weights of {named}"


def main() -> None:
    enter(app)


if __name__ == "__main__":
    main()
