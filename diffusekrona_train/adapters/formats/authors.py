"""Import checkpoints of the DiffuseKronA authors (IBM/DiffuseKronA): their keys, and their order of rows.

A layer has `down` D (a1, a2) and `up` U (b2, b1) and adds ΔW[β*a2 + α, p*b1 + q] = U[β, q] * D[p, α]. With A = Dᵀ and
B = U that is A ⊗ B with its rows read in another order; it is a plain product only where a factor is 1 wide.

The order is kept as an option of the layer and is not written out as the exact LoRA that it also is. That LoRA has rank
min(A.shape) * min(B.shape): 70 times as many numbers for a 2048 -> 640 layer in the authors' (64, 8), and for square
factors more than the dense difference. Native files would lose their size, and krona-inspect their factors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffusekrona_train.adapters.formats import tensorfile
from diffusekrona_train.adapters.formats.adapterfile import AdapterFile, identify
from diffusekrona_train.adapters.formats.names import AUTHORS_KEY
from diffusekrona_train.models.layers import Layer


def import_diffusekrona(path: str | Path, layers: list[Layer], family: str, layers_per_block: int = 2) -> AdapterFile:
    """Read an authors' checkpoint for the model with these layers, in their KronA mode or their LoRA mode.

    The same keys serve both modes, so the shapes decide. Raises a one-line ValueError for damage, a pickle, other keys,
    half a pair, and shapes that fit neither mode.
    """
    tensors, _ = tensorfile.read(path)
    try:
        groups = _groups(tensors, {layer.name: layer for layer in layers})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    file = identify(AdapterFile(str(path), groups), layers, family, layers_per_block)
    assert file.spec is not None
    if file.spec.type == "krona":
        for option in file.options.values():
            option["row_permutation"] = True
    return file


def _groups(tensors: dict[str, Tensor], by_name: dict[str, Layer]) -> dict[str, dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = AUTHORS_KEY.match(key)
        if match is None:
            raise ValueError(
                f"tensor {key} is extra: the authors' keys read unet.<path>.processor.to_q_lora.down.weight"
            )
        projection = "to_out.0" if match[2] == "to_out" else match[2]
        pairs.setdefault(f"{match[1]}.{projection}", {})[match[3]] = tensor.float()
    result = {}
    for name, pair in pairs.items():
        if name not in by_name:
            raise ValueError(f"layer {name} is not in this model: is the checkpoint for another one?")
        if missing := {"down", "up"} - pair.keys():
            raise ValueError(f"layer {name}: tensor {missing.pop()} is missing")
        result[name] = _layer(by_name[name], pair["down"], pair["up"])
    return result


def _layer(layer: Layer, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if down.ndim == up.ndim == 2:
        if (down.shape[1] * up.shape[0], down.shape[0] * up.shape[1]) == (layer.out_features, layer.in_features):
            A = down.T.clone(memory_format=torch.contiguous_format)
            return {"lokr_w1": A, "lokr_w2": up, "alpha": torch.tensor(1.0)}
        if (up.shape[0], down.shape[1], up.shape[1]) == (layer.out_features, layer.in_features, down.shape[0]):
            return {"lora_down.weight": down, "lora_up.weight": up}
    raise ValueError(
        f"layer {layer.name}: down {tuple(down.shape)} and up {tuple(up.shape)} fit neither a Kronecker pair "
        f"nor a LoRA of {layer.in_features} -> {layer.out_features}"
    )
