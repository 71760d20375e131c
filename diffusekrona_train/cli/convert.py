"""krona-convert: an adapter file as another tool wants it, and the authors' checkpoints as ours."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffusekrona_train.cli import PLAIN, enter, guarded

app = typer.Typer(**PLAIN)


class Target(StrEnum):
    native = "native"
    lokr = "lokr"
    lora = "lora"
    diffusers = "diffusers"
    merged = "merged"
    checkpoint = "checkpoint"


class Origin(StrEnum):
    auto = "auto"
    diffusekrona = "diffusekrona"


class DType(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


WHOLE = (Target.merged, Target.checkpoint)
"""Formats that hold the base model too."""


@app.command()
@guarded
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Adapter file (.safetensors).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; for merged: a new folder.")],
    to: Annotated[
        Target,
        typer.Option(
            help="native: ours with its JSON; lokr: plain LoKr (ComfyUI, A1111, Forge); lora: exact LoRA in kohya "
            "keys, for readers without LoKr; diffusers: for its load_lora_weights, LoKr or PEFT keys, which ComfyUI, "
            "A1111, Forge and InvokeAI do not read; merged: a pipeline folder; checkpoint: a merged single "
            "file for ComfyUI and A1111."
        ),
    ],
    from_: Annotated[
        Origin, typer.Option("--from", help="diffusekrona: a checkpoint of the paper's authors.")
    ] = Origin.auto,
    dtype: Annotated[DType, typer.Option(help="Type of the tensors written.")] = DType.fp32,
    rank: Annotated[int | None, typer.Option(help="lora, diffusers: cut to this rank and print the error.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that the file is for, if the file does not name it: sdxl, sd15, sd21, toybox, a hub name "
            "or a pipeline folder. For merged and checkpoint: the base."
        ),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="merged, checkpoint: another VAE (hub name, folder, file).")] = None,
    model_config_dir: Annotated[str | None, typer.Option(help="Configs for a single-file --model.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, for a --model whose file does not name it.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Convert an adapter file; what is written is read back and compared before it takes its name."""
    from diffusekrona_train.adapters.formats import EXPORTERS, open_adapter, write_sidecar
    from diffusekrona_train.models import open_model

    _check_target(source, target, to)
    given = {"vae": vae, "model_config_dir": model_config_dir}
    file = open_adapter(source, model, authors=from_ is Origin.diffusekrona, model_config_dir=model_config_dir)
    base = None
    if to in WHOLE:
        named = model or str(file.info.get("model", ""))
        if not named or "sha256:" in named:
            raise ValueError(f"{source}: --to {to.value} needs the base model's weights; give --model")
        given["prediction_type"] = prediction_type or file.said_prediction(model)
        base = open_model(named, **given)
    remarks = EXPORTERS[to.value](file, target, dtype=dtype.value, rank=rank, source=base)
    size = sum(part.stat().st_size for part in ([target] if target.is_file() else target.rglob("*")) if part.is_file())
    print(f"{target}: {to.value}, {dtype.value}, {size / 2**20:.1f} MiB, read back and equal")
    if to in (Target.native, Target.lokr, Target.lora):
        remarks = [*remarks, write_sidecar(target)]
    for remark in filter(None, remarks):
        print(f"  {remark}")


def _check_target(source: Path, target: Path, to: Target) -> None:
    """Raise ValueError where the name of what is to be written does not suit its format, or is the input's."""
    is_file = target.suffix.lower() in (".safetensors", ".sft")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the input itself; give another name")
    if to is Target.merged and is_file:
        raise ValueError(
            f"{target}: --to merged writes a pipeline folder; give a name without {target.suffix}, "
            "or use --to checkpoint for one file"
        )
    if to is not Target.merged and not is_file:
        raise ValueError(f"{target}: give a name that ends in .safetensors")


def main() -> None:
    enter(app)


if __name__ == "__main__":
    main()
