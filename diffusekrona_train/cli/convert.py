"""krona-convert: an adapter file as another tool wants it, and the authors' checkpoints as ours."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffusekrona_train.cli import PLAIN, door, enter

app = typer.Typer(**PLAIN)


class Target(StrEnum):
    native = "native"
    lokr = "lokr"
    lora = "lora"
    diffusers = "diffusers"
    merged = "merged"


class Origin(StrEnum):
    auto = "auto"
    diffusekrona = "diffusekrona"


class DType(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@app.command()
@door
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Adapter file (.safetensors).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; for merged: a new folder.")],
    to: Annotated[
        Target,
        typer.Option(
            help="native: ours with its JSON; lokr: plain LoKr (ComfyUI, A1111, Forge); lora: exact LoRA in kohya "
            "keys; diffusers: LoRA in PEFT keys; merged: a pipeline folder."
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
            help="The model that the file is for, where the file does not say: sdxl, sd15, sd21, toybox, a hub name or "
            "a pipeline folder. For merged: the base."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Converts an adapter file; what is written is read back and compared before it takes its name."""
    from diffusekrona_train.adapters.formats import EXPORTERS, open_adapter
    from diffusekrona_train.models import open_model

    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the input itself; give another name")
    if to is Target.merged:
        if target.suffix == ".safetensors":
            raise ValueError(f"{target}: --to merged writes a pipeline folder; give a name without .safetensors")
    elif target.suffix != ".safetensors":
        raise ValueError(f"{target}: give a name that ends in .safetensors")
    file = open_adapter(source, model, authors=from_ is Origin.diffusekrona)
    base = None
    if to is Target.merged:
        named = model or str(file.info.get("model", ""))
        if not named or "sha256:" in named:
            raise ValueError(f"{source}: --to merged needs the base model's weights; give --model")
        base = open_model(named)
    remarks = EXPORTERS[to.value](file, target, dtype=dtype.value, rank=rank, source=base)
    size = sum(part.stat().st_size for part in ([target] if target.is_file() else target.rglob("*")) if part.is_file())
    print(f"{target}: {to.value}, {dtype.value}, {size / 2**20:.1f} MiB, read back and equal")
    for remark in remarks:
        print(f"  {remark}")


def main() -> None:
    enter(app)


if __name__ == "__main__":
    main()
