"""The device: which one, what it can do, in which number type, its memory, and how running out of it looks.

AMD cards are `cuda` too: torch built for ROCm shows them under that name.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "HIP out of memory",
    "HIP error: out of memory",
    "HIPBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "XPU out of memory",
    "OUT_OF_DEVICE_MEMORY",
)
"""Other messages of running out of memory: cuBLAS, cuDNN and the driver allocate past torch's allocator."""


@dataclass(frozen=True)
class Abilities:
    """What torch and bitsandbytes can do on a type of device."""

    pinned: bool = True
    """Copies from pinned host memory queue up behind the device's work."""
    fused: bool = True
    """Fused AdamW changes nothing when its flag says that a gradient is not finite."""
    quantized: bool = True
    """bitsandbytes' NF4, int8 and 8-bit AdamW."""
    float8: bool = True
    """Weights held as float8_e4m3fn."""
    fp16: bool = True
    """Training in fp16, whose loss scale counts in fp64."""
    widest: torch.dtype = torch.float64
    """The widest float."""


ABILITIES = {
    "cpu": Abilities(pinned=False, fp16=False),
    "cuda": Abilities(),
    "xpu": Abilities(),
    "mps": Abilities(pinned=False, fused=False, quantized=False, float8=False, fp16=False, widest=torch.float32),
}
"""Device type -> what works there; training and sampling use these types only."""


def abilities(device: torch.device) -> Abilities:
    """Return what works on `device`; a type without a row is treated as cuda."""
    return ABILITIES.get(device.type, ABILITIES["cuda"])


def device_type() -> str:
    """Return the type of the accelerator in reach of torch: cuda (NVIDIA, AMD), xpu (Intel), mps (Apple), else cpu."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in ABILITIES else "cpu"


def training_device_type() -> str:
    """Return `device_type`, or cpu if ACCELERATE_USE_CPU asks accelerate for it."""
    return "cpu" if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else device_type()


def device_name(kind: str) -> str:
    """Return what a user calls the first device of a type."""
    if kind == "cuda":
        hip = f" (ROCm {torch.version.hip})" if torch.version.hip else ""
        return torch.cuda.get_device_name(0) + hip
    return {"cpu": "CPU", "mps": "Apple GPU (mps)"}.get(kind) or f"{torch.xpu.get_device_name(0)} (xpu)"


def free_bytes(device: torch.device) -> int | None:
    """Return the free bytes of a GPU; None on a CPU and where the driver does not say."""
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        return torch.get_device_module(device).mem_get_info(device)[0] if device.type in ("cuda", "xpu") else None
    except RuntimeError:  # Intel's driver does not report it for every card
        return None


def ran_out(error: BaseException) -> bool:
    """Return whether an error means that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    )


def precision(asked: str, device_type: str) -> tuple[str, torch.dtype]:
    """Return accelerate's precision and the type of the frozen base; ValueError where it cannot train so."""
    if asked == "auto":
        asked = _FASTEST[device_type]()
    if asked == "fp16" and not ABILITIES[device_type].fp16:
        needs = "a GPU; on a CPU" if device_type == "cpu" else "an NVIDIA, AMD or Intel GPU; on an Apple GPU"
        raise ValueError(f"train.mixed_precision: 'fp16' needs {needs} use no or bf16")
    return asked, {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[asked]


def _of_cuda() -> str:
    return "bf16" if torch.version.hip or torch.cuda.get_device_capability()[0] >= 8 else "fp16"


_FASTEST: dict[str, Callable[[], str]] = {
    "cpu": lambda: "no",
    "cuda": _of_cuda,
    "xpu": lambda: "bf16",
    "mps": lambda: "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "no",
}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """Return the row of DTYPES that is `dtype`."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def pick_device(local_rank: int = 0) -> torch.device:
    """Return the accelerator of this process, else the CPU."""
    kind = device_type()
    return torch.device(kind, local_rank) if kind in ("cuda", "xpu") else torch.device(kind)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type to generate in; auto: fp16 on a GPU, fp32 on a CPU.

    fp16 also where bf16 is as fast: adapters are added to the weights, and bf16 rounds a small ΔW away (of one of 0.4 %
    of W a third is lost, in fp16 a twentieth). SD and SDXL are published in fp16, and the VAE runs in fp32.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else torch.float16


def moved(rows: Mapping[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Move tensors to `device`, floating-point ones to `dtype`; integers and booleans keep their type."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in rows.items()}


def random_state_of_cards() -> Callable[[], None]:
    """Return what sets the default generators of all cards back to how they are now."""
    kind = device_type()
    if kind == "mps":
        state = torch.mps.get_rng_state()
        return lambda: torch.mps.set_rng_state(state)
    if kind == "cpu" or not torch.get_device_module(kind).is_initialized():
        return lambda: None
    states = torch.get_device_module(kind).get_rng_state_all()
    return lambda: torch.get_device_module(kind).set_rng_state_all(states)


def empty_cache() -> None:
    """Give the memory that torch keeps for later back to the device."""
    kind = device_type()
    if kind == "mps" or (kind != "cpu" and torch.get_device_module(kind).is_initialized()):
        torch.get_device_module(kind).empty_cache()


def free() -> None:
    """Give back the memory of dropped modules: Python's cycles, then torch's cached blocks."""
    gc.collect()
    empty_cache()
