"""Read safetensors files with checks, and verify them after writing. Needs only torch and safetensors.

Reading: pickles are refused unread, and every way in which a file can be broken is one line that names the file.
Writing: beside the target, read back, compared, and only then renamed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusekrona_train.common.files import atomic

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors (as stored) and the metadata of a .safetensors file.

    Raises ValueError, one line that starts with the path, for a missing file, a folder, a pickle, a truncated or
    overlong file, a broken header and tensors that are not numbers (NaN, infinity).
    """
    path = Path(path)
    _check_kind(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, KeyError) as error:
        why = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
        raise ValueError(f"{path}: is truncated, damaged or not a safetensors file ({why})") from None
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    for key, tensor in tensors.items():
        _check_numbers(f"{path}: tensor {key}", tensor)
    return tensors, metadata


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors` atomically; the file gets its name after it was read back with equal names, types and values.

    Raises ValueError for NaN or infinity (nothing is written), OSError where the disk gives back something else.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        _check_numbers(f"{path}: not written: tensor {key}", tensor)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
        again, metadata_again = read(temporary)
        same = again.keys() == tensors.keys() and metadata_again == metadata
        if not same or not all(_equal(again[key], tensor) for key, tensor in tensors.items()):
            raise OSError(f"{path}: what was written does not read back the same; is the disk faulty?")


def cast(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Return the tensors in `dtype` ("fp32", "fp16", "bf16"); ValueError names a value that fp16 cannot hold."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; there are {', '.join(DTYPES)}")
    result = {key: tensor.to(DTYPES[dtype]) for key, tensor in tensors.items()}
    for key, tensor in result.items():
        if not bool(torch.isfinite(tensor).all()) and bool(torch.isfinite(tensors[key]).all()):
            largest = float(tensors[key].abs().max())
            raise ValueError(f"tensor {key} reaches {largest:.3g}, too large for {dtype}; write bf16 or fp32")
    return result


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _check_numbers(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float64, *DTYPES.values()):
        raise ValueError(
            f"{what} has type {str(tensor.dtype).removeprefix('torch.')}; an adapter holds fp32, fp16 or bf16"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} holds NaN or infinity")


def _check_kind(path: Path) -> None:
    """Refuse what is no file of tensors before the library opens it."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the .safetensors file inside it")
    if not path.is_file():
        raise ValueError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        start = file.read(9)
    # a header's length may begin with a pickle's \x80 too, but a header begins with a brace
    pickled = start[:1] == b"\x80" and start[8:] not in (b"{", b"")
    if path.suffix.lower() in PICKLES or pickled or start[:4] == b"PK\x03\x04":
        raise ValueError(f"{path}: is a pickle, which runs code when it is loaded; convert it to .safetensors first")
