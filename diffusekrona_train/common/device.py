"""The device: which one, in which number type, how its memory is given back, and how running out of it looks."""

from __future__ import annotations

import gc

import torch

OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What else says that memory has ended: cuBLAS, cuDNN and the driver take some past torch's allocator."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    )


def precision(asked: str, device_type: str) -> tuple[str, torch.dtype]:
    """accelerate's name of the precision and the type of the frozen base; ValueError for fp16 without a GPU."""
    if asked == "auto":
        if device_type != "cuda":
            asked = "no"
        else:
            asked = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    if asked == "fp16" and device_type != "cuda":
        raise ValueError("train.mixed_precision: 'fp16' needs a GPU; on a CPU use no or bf16")
    return asked, {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[asked]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """The row of DTYPES that is `dtype`."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def pick_device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type to generate in; auto: fp16 on a GPU, fp32 on a CPU.

    fp16 also where bf16 is as fast: adapters are added to the weights, and bf16 rounds a small ΔW away (of one of 0.4 %
    of W a third is lost, in fp16 a twentieth). SD and SDXL are published in fp16, and the VAE runs in fp32.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.float16


def free() -> None:
    """Give back the memory of dropped modules: Python's cycles, then torch's cached blocks."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
