"""Peak memory of a training step at real size, counted without a GPU on tensors that have no content.

    python -m scripts.bench.trace --kind sdxl [--side 1024] [--batch 1] [--checkpointing]
    python -m scripts.bench.trace --kind sdxl --decode

Autograd runs as it does on a card, so what it keeps is counted exactly, in blocks of 512 bytes. Attention is
taken to be a fused kernel, which keeps q, k, v, its output and one number a row. Not counted: workspaces of cuDNN and
cuBLAS, fragmentation, the CUDA context.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffusekrona_train.adapters import Fp32Module
from diffusekrona_train.training.loss import Batch
from scripts.bench.contender import Bench
from tests.tiny import real_part

GIB = 2**30
SIDES = {"sdxl": 1024, "sd21": 768, "sd15": 512, "z-image": 1024}
"""Model -> the side in pixels that it is trained at."""
DENOISERS = {"z-image": "transformer"}
"""Model -> folder of its denoiser; unet without a row."""


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel allocates and keeps."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, rows = torch.empty_like(q), torch.empty(q.shape[:-1])
        ctx.save_for_backward(q, k, v, output, rows)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def stay(module: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """Take the place of an adapter's `_apply`: a tensor without content cannot be moved, and is there already."""
    return module


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Stand in for torch's scaled_dot_product_attention."""
    return FusedAttention.apply(query, key, value)  # type: ignore[return-value]


class Peak(TorchDispatchMode):
    """Bytes of living tensors at most, those in `known` apart."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.living = known, {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known or (key in self.living and not self.living[key][0].expired()):
            return
        self.now -= self.living.pop(key, (None, 0))[1]
        size = -(-storage.nbytes() // 512) * 512
        self.living[key] = (StorageWeakRef(storage), size)
        self.now += size
        if self.now > self.most:
            for other in [other for other, (reference, _) in self.living.items() if reference.expired()]:
                self.now -= self.living.pop(other)[1]
            self.most = max(self.most, self.now)


def hollow(kind: str, part: str, dtype: torch.dtype) -> Any:
    """A frozen part of the real model, made inside a FakeTensorMode."""
    torch.set_default_dtype(dtype)
    try:
        return real_part(kind, part).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def storages(module: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}


def step_peak(kind: str, side: int, batch: int, checkpointing: bool) -> tuple[float, float]:
    """GiB of the base in 16 bits, and of all else at the peak of two training steps with KronA (4, 64)."""
    with FakeTensorMode():
        unet = hollow(kind, DENOISERS.get(kind, "unet"), torch.bfloat16)
    bench = Bench(unet, side, batch)
    objective = bench.objective(None)  # its captions and schedule have content
    time = objective.process.quantile(0.5)
    with next(unet.parameters()).fake_mode:
        if checkpointing:
            unet.enable_gradient_checkpointing()
        base = sum(parameter.untyped_storage().nbytes() for parameter in unet.parameters())  # before adapters join
        contender = bench.contender({"a1": 4, "a2": 64})
        with Peak(storages(unet)) as peak:
            for _ in range(2):
                told = objective.data.instances[0].extras
                extras = {name: torch.empty(batch, *value.shape[2:]) for name, value in told.items()}
                noise = torch.empty(batch, unet.config.in_channels, side // 8, side // 8)
                count = torch.zeros(batch, dtype=time.dtype)
                sample = Batch(noise, noise.clone(), count, [0] * batch, extras, torch.ones(batch))
                contender.passes(contender.objective.conditioned(sample))
                contender.finish()
    return base / GIB, peak.most / GIB


def decode_peak(kind: str, side: int, dtype: torch.dtype) -> tuple[float, float]:
    """GiB of the VAE, and of all else at the peak of decoding one picture."""
    with FakeTensorMode(), torch.no_grad():
        vae = hollow(kind, "vae", dtype)
        with Peak(storages(vae)) as peak:
            vae.decode(torch.empty(1, 4, side // 8, side // 8, dtype=dtype), return_dict=False)
        base = sum(parameter.untyped_storage().nbytes() for parameter in vae.parameters())
    return base / GIB, peak.most / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=list(SIDES), default="sdxl")
    parser.add_argument("--side", type=int, help="pixels; the model's own size without")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--decode", action="store_true", help="decode one picture in fp32 instead")
    given = parser.parse_args()
    side = given.side or SIDES[given.kind]
    torch.nn.functional.scaled_dot_product_attention = fused_attention
    Fp32Module._apply = stay
    if given.decode:
        base, more = decode_peak(given.kind, side, torch.float32)
        print(f"{given.kind} {side}, decoding in fp32: VAE {base:.2f} GiB, and {more:.2f} GiB at the peak")
        return
    base, more = step_peak(given.kind, side, given.batch, given.checkpointing)
    way = "checkpointing" if given.checkpointing else "plain"
    print(f"{given.kind} {side}, batch {given.batch}, {way}: base {base:.2f} GiB, and {more:.2f} GiB at the peak")


if __name__ == "__main__":
    main()
