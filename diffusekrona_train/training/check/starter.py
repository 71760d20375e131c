"""A commented YAML fitted to the photos and the card at hand: `krona-train init photos/dog --class dog`."""

from __future__ import annotations

import re
from pathlib import Path

from diffusekrona_train.common.files import atomic
from diffusekrona_train.config import make_config, parse_yaml
from diffusekrona_train.data import collect

TEMPLATE = """\
# {heading}
# Look before training:  krona-train --config {file} --check
# Train:                 krona-train --config {file}
# All fields with their meaning: krona-train schema

model: {model}   # {model_why}

subject:
  images: {images}   # {photos}
  class: {class_noun}   # what it is, in one or two words
  token: sks   # the rare word that [V] stands for
  prompt: "A [V] {{class}}"   # caption of photos that have no .txt beside them

adapter:
  type: krona   # A x B in place of LoRA's two thin matrices
  a1: {a1}   # splits the input width
  a2: {a2}   # splits the output width; [8, 64] shows finer detail on SDXL

data:
  resolution: {resolution}   # {resolution_why}
  buckets: {buckets}   # {buckets_why}

train:
  steps: 500   # 1000 for a complex subject or long prompts
  learning_rate: 5e-4   # from 1e-3 on it overfits, below 1e-4 it ignores the photos
  batch_size: {batch_size}
  memory: auto   # plain, checkpointing or nf4, by what is free on the card
  checkpoint_every: 100
  seed: 0

validation:
  prompts:
    - "A [V] {{class}} on the beach"
    - "A [V] {{class}} in the snow"
  every: 100   # look at the samples and keep the step you like

output: {output}
"""


def write_init(folder: str | Path, class_noun: str, path: str | Path | None = None) -> Path:
    """Write the YAML for the photos in `folder` (or toybox:NAME) to `path` (NAME.yaml here without one).

    ValueError where the folder holds no usable photo or the file is there already: nothing is overwritten.
    """
    where = str(folder)
    name = re.sub(
        r"[^\w.-]+", "-", where.removeprefix("toybox:") if where.startswith("toybox:") else Path(where).resolve().name
    )
    target = Path(path) if path is not None else Path(f"{name.strip('-.') or 'run'}.yaml")
    if target.exists():
        raise ValueError(f"{target}: there is a file of that name; move it or name another")
    text = starter_text(where, class_noun, target)
    make_config(parse_yaml(text))  # what is written can be read
    with atomic(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def starter_text(where: str, class_noun: str, target: Path) -> str:
    """Return the YAML as text."""
    embedded = where.startswith("toybox:")
    model, model_why = ("toybox", "the small model in the package") if embedded else _model_for(free_gib())
    plain = {"subject": {"images": where, "class": class_noun}, "model": model, "output": f"runs/{target.stem}"}
    config = make_config(plain)
    pictures = collect(config).pictures
    sides = sorted(min(picture.width, picture.height) for picture in pictures)
    wide = [picture for picture in pictures if not 0.75 <= picture.width / picture.height <= 1.34]
    resolution, resolution_why = config.data.resolution, "what the model was made for"
    if sides[len(sides) // 2] < 0.6 * resolution:
        resolution_why += f"; the photos are smaller ({sides[0]} to {sides[-1]}) and would be enlarged"
    return TEMPLATE.format(
        heading=f"{class_noun} from {len(pictures)} photos",
        file=target.name,
        model=model,
        model_why=model_why,
        images=_quoted(where),
        photos=f"{len(pictures)} photos, {pictures[0].width} x {pictures[0].height} the first",
        class_noun=_quoted(class_noun),
        a1=config.adapter.a1,
        a2=config.adapter.a2,
        resolution=resolution,
        resolution_why=resolution_why,
        buckets="true" if wide else "false",
        buckets_why=f"{len(wide)} of {len(pictures)} photos are far from square"
        if wide
        else "the photos are about square",
        batch_size=config.train.batch_size,
        output=_quoted(f"runs/{target.stem}"),
    )


def free_gib() -> float | None:
    """Return the free GiB on the first GPU, None without one that torch can use."""
    try:
        from diffusekrona_train.common.device import free_bytes, pick_device
    except ImportError:
        return None
    free = free_bytes(pick_device())
    return None if free is None else free / 2**30


def _model_for(free: float | None) -> tuple[str, str]:
    if free is None:
        return "sdxl", "no GPU is in reach here: this needs one of 8 GB (sd15: 6 GB)"
    if free < 6:
        return "sd15", f"{free:.0f} GiB are free on the card; SDXL needs 6 to 8"
    return "sdxl", f"{free:.0f} GiB are free on the card; smaller: sd15, sd21"


def _quoted(text: str) -> str:
    """Return the text as a YAML scalar: quoted if it is not a plain word."""
    if re.fullmatch(r"[A-Za-z_./][\w./-]*", text) and text.lower() not in ("null", "true", "false"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
