"""Merge an adapter into the base model's weights: as a pipeline folder, or as one checkpoint file."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters import ADAPTERS
from diffusekrona_train.adapters.formats import tensorfile
from diffusekrona_train.adapters.formats.adapterfile import AdapterFile, identify
from diffusekrona_train.adapters.formats.names import layers_per_block, model_header
from diffusekrona_train.common.files import atomic
from diffusekrona_train.models.layers import Layer
from diffusekrona_train.models.original import CLIP_PREFIX, original_tensors
from diffusekrona_train.models.source import ModelSource


def to_merged(
    file: AdapterFile, out: Path, *, dtype: str, rank: int | None = None, source: ModelSource | None = None
) -> list[str]:
    """Write a diffusers pipeline folder with the adapter summed into the weights; `source` is the opened base model."""
    no_rank(rank, "merged")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; a merged pipeline needs a new one")
    source = _given(source, "merged")
    parts = _merged_parts(file, source, dtype)
    denoiser, pipe = parts["denoiser"], source.family.pipeline(parts)
    _check_room(out, denoiser.parameters())
    with atomic(out) as folder:
        pipe.save_pretrained(str(folder))
        _name_the_folder(folder, out)
        _compare(denoiser, folder / source.family.parts.denoiser.folder, out)
    return [f"{len(file.layers)} layers of {kind_of_adapter(file)} summed into {source.identity}"]


def to_checkpoint(
    file: AdapterFile, out: Path, *, dtype: str, rank: int | None = None, source: ModelSource | None = None
) -> list[str]:
    """Write the same as one .safetensors file in the layout of the original releases, which ComfyUI and A1111 load."""
    no_rank(rank, "checkpoint")
    source = _given(source, "checkpoint")
    if source.family.name not in CLIP_PREFIX:
        raise ValueError(
            f"--to checkpoint supports only SD and SDXL; use --to merged for family {source.family.name!r}"
        )
    parts = _merged_parts(file, source, dtype)
    config, family = source.place.config, source.family.name
    second = family == "sd" and bool(config("unet").get("use_linear_projection"))
    modules = {"unet": parts["denoiser"], "vae": parts["vae"]}
    modules |= {
        part.folder: module
        for part, module in zip(source.family.parts.text_encoders, parts["text_encoders"], strict=True)
    }
    tensors: dict[str, Tensor] = {}
    for part, module in modules.items():
        try:
            tensors |= original_tensors(part, family, module.state_dict(), config(part), second)
        except ValueError as error:
            raise ValueError(f"{out}: {part} of {source.identity}: {error}; use --to merged") from None
    predicts, remarks = source.prediction_type, []
    if predicts == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)  # the mark by which ComfyUI and others know SDXL models of this kind
        if family == "sd" and not second:
            remarks = ["SD 1 with v prediction: other programs take it for epsilon until you tell them"]
    if source.scheduler_config.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = torch.zeros(0)
    _check_room(out, tensors.values())
    base = source.family.metadata(source.layers(), predicts)
    tensorfile.write(out, tensors, model_header(out, base, source.default_resolution))
    return [f"{len(file.layers)} layers of {kind_of_adapter(file)} summed into {source.identity}", *remarks]


def _given(source: ModelSource | None, name: str) -> ModelSource:
    if source is None:
        raise ValueError(f"--to {name} needs the base model: give --model with an alias, hub name, folder or file")
    return source


def _merged_parts(file: AdapterFile, source: ModelSource, dtype: str) -> dict[str, Any]:
    """Return all parts of the base in `dtype`, the adapter summed into its denoiser in fp32 and rounded once."""
    denoiser = source.load("denoiser", dtype=torch.float32, device="cpu")["denoiser"]
    merge(
        denoiser,
        identify(file, [*source.layers(), *source.others()], source.family.name, layers_per_block(denoiser.config)),
    )
    denoiser.to(tensorfile.DTYPES[dtype])
    others = source.load(
        "vae", "text_encoders", "tokenizers", "scheduler", dtype=tensorfile.DTYPES[dtype], device="cpu"
    )
    return {"denoiser": denoiser, **others}


def _check_room(out: Path, tensors: Iterable[Tensor]) -> None:
    """Raise ValueError if the disk has no space for these tensors."""
    free, needed = shutil.disk_usage(_standing(out)).free, sum(one.numel() * one.element_size() for one in tensors)
    if free < needed:
        raise ValueError(
            f"{out}: the merged model needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free there"
        )


@torch.no_grad()
def merge(model: nn.Module, file: AdapterFile, strength: float = 1.0) -> None:
    """Add the ΔW of an identified file to a denoiser's weights: summed in fp32, rounded once to the weight's type."""
    for layer in file.layers:
        if layer.kind == "all":
            for suffix, difference in file.groups[layer.name].items():
                name = {"diff": "weight", "diff_b": "bias"}.get(suffix, suffix.removeprefix("diff_"))
                parameter = model.get_submodule(layer.name).get_parameter(name)
                parameter.copy_(parameter.float() + strength * difference.to(parameter.device).float())
            continue
        weight = model.get_submodule(layer.name).weight
        weight.copy_(weight.float() + strength * delta(file, layer).view_as(weight).to(weight.device))  # type: ignore[operator,arg-type,union-attr]


def delta(file: AdapterFile, layer: Layer) -> Tensor:
    """Return the dense ΔW (out, in), fp32, of a layer of an identified file."""
    assert file.spec is not None
    refuse_over_base(file)
    adapter = ADAPTERS[file.spec.type](layer, file.options[layer.name], file.spec)
    adapter.load_file_tensors(file.groups[layer.name])
    return adapter.delta()


def _name_the_folder(folder: Path, out: Path) -> None:
    """Let the index of a modular pipeline, which names the folder that it was saved to, name the final one."""
    index = folder / "modular_model_index.json"
    if index.is_file():
        index.write_text(index.read_text(encoding="utf-8").replace(str(folder), str(out)), encoding="utf-8")


def _compare(denoiser: nn.Module, folder: Path, out: Path) -> None:
    """Compare every tensor of the written denoiser with the one in memory; OSError if one differs."""
    expected = denoiser.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in tensorfile.read(path)[0].items():
            if not torch.equal(tensor, expected.pop(key)):
                raise OSError(f"{out}: tensor {key} does not read back as it was written; is the disk faulty?")
    if expected:
        raise OSError(f"{out}: {len(expected)} tensors were not written")


OVER_BASE = ("dora", "oft")
"""Types whose ΔW depends on the base's weight, so that a file of them says it only together with its base."""


def refuse_over_base(file: AdapterFile) -> None:
    """Raise ValueError for a type of OVER_BASE."""
    if file.spec is not None and file.spec.type in OVER_BASE:
        raise ValueError(f"{file.path}: is a {file.spec.type} adapter, which changes with its base; it has no exports")


def kind_of_adapter(file: AdapterFile) -> str:
    """Return krona, lora, … (the rows of ADAPTERS)."""
    assert file.spec is not None and file.layers, "identify the file first"
    return file.spec.type


def no_rank(rank: int | None, name: str) -> None:
    """Raise ValueError if a rank is given to a format that is always exact."""
    if rank is not None:
        raise ValueError(f"--rank {rank} is for --to lora and --to diffusers; {name} is always exact")


def _standing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(parent for parent in path.resolve().parents if parent.exists())
