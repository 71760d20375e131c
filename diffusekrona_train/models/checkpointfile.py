"""Read a model's .safetensors file: older names are converted, 8-bit weights multiplied by their scales.

Nothing but the header is read until `read`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusekrona_train.common.files import sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".gguf")
SAFETENSORS = (".safetensors", ".sft")
"""Suffixes that mark a name as a file, in upper or lower case; the header decides what the file is."""

SCALES = (".scale_weight", ".weight_scale")
"""Suffix of the number that a weight in 8 bits is to be multiplied by: older and newer ComfyUI files."""
INPUT_SCALES = (".scale_input", ".input_scale", ".scale_output", ".output_scale", ".comfy_quant", "scaled_fp8")
"""Only for 8-bit products on a GPU: the weights mean the same without them."""
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise")
"""ComfyUI's names of formats that are a weight times its scale."""
_BESIDE = re.compile(r"(?:\.weight[._][^.]+(?:\.[^.]+)?|\.[^.]*(?:scale|absmax|zero_point)[^.]*)$")
"""Ends of tensors that say how a layer's quantised weight is to be read."""

RENAMED = (
    (r"^((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)",
     r"\1text_model."),
    (r"(\.model\.text_projection)\.weight$", r"\1"),
)  # fmt: skip
"""What older and other programs call otherwise. A projection kept as a linear layer's weight is transposed too."""


@dataclass
class CheckpointFile:
    """A model file. `shapes` maps the names of the original releases to shapes; `stored` to the names in the file."""

    path: Path
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    metadata: dict[str, str] = field(init=False)
    stored: dict[str, str] = field(init=False)
    kinds: dict[str, str] = field(init=False)
    """Name in the file -> safetensors' name of its type."""

    @functools.cached_property
    def identity(self) -> str:
        """Return the file's name and a hash of its content; never a path."""
        return f"{self.path.name} sha256:{sha256(self.path)[:16]}"

    def __post_init__(self) -> None:
        found, self.metadata = read_header(self.path)
        self.kinds = {key: kind for key, (_, kind) in found.items()}
        self.stored = {_renamed(key): key for key in found}
        self.shapes = {
            name: found[key][0][::-1] if _is_transposed(key) else found[key][0] for name, key in self.stored.items()
        }
        self._scales = {
            key.removesuffix(suffix) + ".weight": key for key in found for suffix in SCALES if key.endswith(suffix)
        }
        self._check_quantised()

    def weights(self, *prefixes: str) -> list[str]:
        """Return the names that begin with one of `prefixes`, without those of the scales of 8-bit weights."""
        beside = {*self._scales.values(), *(key for key in self.kinds if key.endswith(INPUT_SCALES))}
        return [name for name, key in self.stored.items() if key not in beside and name.startswith(prefixes)]

    def read(self, *prefixes: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return name -> tensor of `weights`, in `dtype` if it is given: each is cast as it is read, so that no file is
        held twice. Without one scaled weights are fp32, others as stored."""
        from safetensors import safe_open

        result: dict[str, Tensor] = {}
        with safe_open(self.path, "pt") as file:
            for name in self.weights(*prefixes):
                key = self.stored[name]
                tensor = file.get_tensor(key)
                if key in self._scales:
                    tensor = _multiplied(tensor, file.get_tensor(self._scales[key]))
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                result[name] = tensor.T.contiguous() if _is_transposed(key) else tensor
        return result

    def check_complete(self, what: str, expected: dict[str, Tensor]) -> None:
        """Raise ValueError naming the tensors of `expected` (name -> any tensor of its shape) that are not in the
        file, or of another shape, or no numbers."""
        if missing := [name for name in expected if name not in self.shapes]:
            raise ValueError(
                f"model file {self.path.name!r} lacks {listed(missing)} of its {what}; use a complete file"
            )
        for name, tensor in expected.items():
            ours, theirs = _squeezed(self.shapes[name]), _squeezed(tuple(tensor.shape))
            if ours != theirs:
                raise ValueError(
                    f"model file {self.path.name!r}: {name} has shape {ours}, its {what} should have {theirs}; "
                    "give model_config_dir with the configs of this model"
                )
        self.check_numbers(expected)

    def check_numbers(self, names: Iterable[str]) -> None:
        """Raise ValueError naming the first of these tensors that holds no numbers that can be read."""
        for name in names:
            kind = self.kinds[self.stored[name]]
            if kind not in FLOATS and self.stored[name] not in self._scales:
                raise ValueError(f"model file {self.path.name!r}: {name} is {kind}, without a scale to convert it")

    def _check_quantised(self) -> None:
        """Raise ValueError for weights in fewer bits that are more than a product with a scale."""
        what = f"model file {self.path.name!r}"
        for layer, kind in self._formats():
            if kind not in FORMATS:
                raise ValueError(f"{what}: {layer} is quantised as {kind}; fp8 with a scale, fp16, bf16, fp32 are read")
        for weight, key in self._scales.items():
            if (
                weight not in self.kinds
                or self.kinds[weight] not in FLOATS + EIGHT_BITS
                or self.kinds[key] not in FLOATS
            ):
                kinds = f"{self.kinds.get(weight, 'missing')} with a scale of {self.kinds[key]}"
                raise ValueError(f"{what}: {weight} is {kinds}; fp8 with a scale, fp16, bf16, fp32 are read")
        known = {*self._scales.values()}
        for key in self.kinds:
            if key in known or key.endswith(INPUT_SCALES):
                continue
            if self.kinds.get(_BESIDE.sub(".weight", key), "F32") in (*EIGHT_BITS, "U8") and _BESIDE.search(key):
                raise ValueError(f"{what}: {key} has an unknown quantised format; use fp16, bf16 or fp32")

    def _formats(self) -> list[tuple[str, str]]:
        """Return (layer, format) of ComfyUI's newer files: from the metadata, or from a tensor of JSON text per
        layer."""
        from safetensors import safe_open

        try:
            said = json.loads(self.metadata.get("_quantization_metadata", "{}")).get("layers", {})
            found = [(layer, _format_of(about)) for layer, about in said.items()]
            marks = [key for key in self.kinds if key.endswith(".comfy_quant")]
            if not marks:  # opening maps the whole file, which some systems refuse for one larger than their memory
                return found
            with safe_open(self.path, "pt") as file:
                texts = {key: bytes(file.get_tensor(key).tolist()) for key in marks}
            return found + [(key.removesuffix(".comfy_quant"), _format_of(json.loads(texts[key]))) for key in marks]
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"model file {self.path.name!r}: its metadata about quantised layers is damaged ({error})"
            ) from None


def read_header(path: Path, shown: str | None = None) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """Return (tensor name -> (shape, type), metadata) of a safetensors file of any suffix; else ValueError.

    `shown` is what errors call the file, if omitted its name.
    """
    shown = shown or path.name
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: (tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()
            }, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if path.suffix.lower() == ".gguf":
            raise ValueError(
                f"model file {shown!r} is a GGUF file, which is not read; use the .safetensors file of this model"
            ) from None
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"model file {shown!r} is not a .safetensors file; convert it (pickles can run code)"
            ) from None
        raise ValueError(f"model file {shown!r} is damaged or not a safetensors file ({error})") from None


def listed(names: list[str], most: int = 3) -> str:
    """Return '3 tensors (a, b, c)', longer lists shortened."""
    more = f", … and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:most])}{more})"


def _format_of(about: dict[str, Any]) -> str:
    return str(about.get("format", "unknown"))


def _renamed(key: str) -> str:
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def _is_transposed(key: str) -> bool:
    return key.endswith(".model.text_projection.weight")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a 1x1 convolution's shape as a linear layer's: files have either."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _multiplied(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply weight (out, in, …) by a scale for all, for each row, or for each block of a grid; fp32."""
    weight, scale = weight.float(), scale.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.shape[0] == weight.shape[0] and scale.numel() == weight.shape[0]:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if scale.ndim == weight.ndim and all(
        -(-w // -(-w // s)) == s for w, s in zip(weight.shape, scale.shape, strict=True)
    ):
        for axis, (w, s) in enumerate(zip(weight.shape, scale.shape, strict=True)):
            scale = scale.repeat_interleave(-(-w // s), axis).narrow(axis, 0, w)
        return weight * scale
    raise ValueError(f"a scale of shape {tuple(scale.shape)} does not fit a weight of shape {tuple(weight.shape)}")
