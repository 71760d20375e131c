"""Adapter files to do harm to: made from layer tables, without a model, in milliseconds."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

OWN_KEY = "diffusekrona"
PROMPT = "A [V] dog"


def native(path: Path, alias: str = "toybox", info: dict[str, Any] | None = None, **spec: Any) -> Path:
    """An adapter file of this project for the model `alias`, its B not zero; `spec` as in the YAML."""
    import torch

    from diffusekrona_train.adapters import build_adapter, plan
    from diffusekrona_train.adapters.formats import AdapterFile, write_adapter
    from diffusekrona_train.config import AdapterConfig
    from diffusekrona_train.models import layers as tables
    from diffusekrona_train.models.layers import select_layers

    wanted = AdapterConfig(**{"a1": 4, "a2": 64, "blocks": ["mid_block"], **spec})
    layers = select_layers(tables.layer_table(alias), wanted)
    options = plan(wanted, layers)
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for layer in layers:
        tensors = build_adapter(wanted, layer, options[layer.name], generator).file_tensors()
        groups[layer.name] = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if name != "alpha" else tensor
            for name, tensor in tensors.items()
        }
    about = {"model": alias, "token": "sks", "class": "dog", "prompt": PROMPT, "resolution": 64, "step": 4}
    family = tables.FAMILY_OF[alias]
    per_block = tables.layers_per_block(alias)
    file = AdapterFile(
        str(path), groups, {}, {**about, **(info or {})}, wanted, family, layers, options, layers_per_block=per_block
    )
    write_adapter(path, file)
    return path


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header and the bytes behind it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, header: Any, data: bytes) -> None:
    """Writes a safetensors file with exactly this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Reads a file's tensors, lets `edit` change the dict, writes them under the old metadata."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    edit(tensors)
    save_file(tensors, path, metadata)


def edit_metadata(path: Path, edit: Callable[[dict[str, str]], None]) -> None:
    """Lets `edit` change a file's metadata."""
    header, data = header_and_data(path)
    edit(header["__metadata__"])
    with_header(path, header, data)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Lets `edit` change the project's own JSON in a file's metadata."""

    def change(metadata: dict[str, str]) -> None:
        own = json.loads(metadata[OWN_KEY])
        edit(own)
        metadata[OWN_KEY] = json.dumps(own)

    edit_metadata(path, change)


class Hostile:
    """Unpickled, it makes the file `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


def pickled(path: Path, canary: Path, kind: str = "plain") -> Path:
    """A pickle that runs code when it is loaded: plain, or as torch.save writes it (a zip)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "plain":
        path.write_bytes(pickle.dumps({"state_dict": Hostile(canary)}))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Hostile(canary)}, protocol=2))
            archive.writestr("archive/version", "3\n")
    return path


def authors(path: Path, alias: str = "toybox", half: bool = False) -> Path:
    """A checkpoint under the keys of the DiffuseKronA authors, in their KronA mode."""
    import torch
    from safetensors.torch import save_file

    from diffusekrona_train.models import layers as tables

    tensors = {}
    for layer in [layer for layer in tables.layer_table(alias) if layer.kind != "ffn"][:4]:
        path_, letter = layer.name.removesuffix(".0").rsplit(".", 1)
        name = f"unet.{path_}.processor.{letter}_lora"
        tensors[f"{name}.down.weight"] = torch.randn(4, 4)
        if not half:
            tensors[f"{name}.up.weight"] = torch.randn(layer.out_features // 4, layer.in_features // 4)
    save_file(tensors, path)
    return path
