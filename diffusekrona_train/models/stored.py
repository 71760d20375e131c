"""Frozen linears whose weights are held in another form than they are used in: as fp8, or in host memory as well.

A weight is brought to the device and into the input's type for one product, and again for the backward pass: nothing
but the stored form outlives the product, with gradient checkpointing and without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stored = tuple[Tensor, ...]
FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of FP8."""
ALIGNED = 256
"""Bytes that the tensors of a shelf begin at a multiple of."""
NF4_BLOCK = 64
"""Numbers that share a scale, as bitsandbytes has it for its 4-bit linears."""


# ---- forms of a weight ----------------------------------------------------------------------------------------------


def pack_plain(weight: Tensor) -> Stored:
    """Keep a weight as it is."""
    return (weight.detach(),)


def unpack_plain(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) in `dtype`."""
    return stored[0].to(dtype)


def pack_fp8(weight: Tensor) -> Stored:
    """Return (out, in) float8_e4m3fn and a scale for each row, (out, 1) fp32.

    Without scales, the smaller half of a usual weight would fall below what fp8 counts finely.
    """
    rows = weight.detach().float()
    scale = (rows.abs().amax(1, keepdim=True) / LARGEST).clamp(min=1e-12)
    return (rows / scale).to(FP8), scale


def unpack_fp8(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) in `dtype`."""
    values, scale = stored
    return values.to(dtype) * scale.to(dtype)


def pack_nf4(weight: Tensor) -> Stored:
    """Return bitsandbytes' packed numbers, their scales, and the table of the 16 values.

    Scales are rounded as its 4-bit linears round them, so that the numbers are the same at the level above.
    """
    from bitsandbytes import functional

    flat = weight.detach().contiguous()
    packed, state = functional.quantize_4bit(flat, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    scales = functional.dequantize_blockwise(torch.as_tensor(state.absmax), state.state2)
    scales = scales + torch.as_tensor(state.offset)
    return packed, scales, torch.as_tensor(state.code)


def unpack_nf4(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) in `dtype`."""
    from bitsandbytes import functional

    packed, scales, code = stored
    state = functional.QuantState(scales, shape, code, NF4_BLOCK, "nf4", dtype)
    return functional.dequantize_4bit(packed, state)


@dataclass(frozen=True)
class Form:
    """How a weight is stored: both ways between it and its stored tensors."""

    pack: Callable[[Tensor], Stored]
    unpack: Callable[[Stored, torch.Size, torch.dtype], Tensor]


FORMS = {"none": Form(pack_plain, unpack_plain), "fp8": Form(pack_fp8, unpack_fp8), "nf4": Form(pack_nf4, unpack_nf4)}
"""Row of train.quantize -> form."""


# ---- in host memory -------------------------------------------------------------------------------------------------


@dataclass
class Shelf:
    """The weights of one block, side by side in one buffer of host memory."""

    flat: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    stored: list[Stored] = field(default_factory=list)
    """Until `close`: what `flat` is made of."""
    slots: list[list[tuple[int, int, torch.dtype, torch.Size]]] = field(default_factory=list)
    """For each linear where its tensors are: (start, end) in bytes, type and shape."""

    def add(self, stored: Stored) -> int:
        """Add the tensors of a linear; return its number."""
        self.stored.append(stored)
        return len(self.stored) - 1

    def close(self, pinned: bool) -> None:
        """Move everything into one buffer, page-locked if `pinned`."""
        end = 0
        for stored in self.stored:
            row = []
            for tensor in stored:
                start = math.ceil(end / ALIGNED) * ALIGNED
                end = start + tensor.nbytes
                row.append((start, end, tensor.dtype, tensor.shape))
            self.slots.append(row)
        self.flat = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for stored, row in zip(self.stored, self.slots, strict=True):
            for tensor, (start, stop, *_) in zip(stored, row, strict=True):
                self.flat[start:stop].copy_(tensor.cpu().contiguous().flatten().view(torch.uint8))
        self.stored = []

    def tensors(self, flat: Tensor, number: int) -> Stored:
        """Return the tensors of a linear, views into `flat`, a copy of the buffer."""
        return tuple(flat[start:stop].view(dtype).view(shape) for start, stop, dtype, shape in self.slots[number])


class Host:
    """The blocks of a model in host memory. On the device are the block in use and the one that comes next.

    Blocks are used up in the forward pass and down in the backward pass: the neighbour in the present direction is
    copied on a stream of its own meanwhile.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.shelves: dict[str, Shelf] = {}
        self._order: list[str] = []
        """Blocks in the order of their first use."""
        self._here: dict[str, tuple[Tensor, torch.Event | None]] = {}
        """Block -> its buffer on the device, and the event after which it is complete."""
        self._current: str | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def shelf(self, block: str) -> Shelf:
        """Return the shelf of a block, a new one at first."""
        return self.shelves.setdefault(block, Shelf())

    def close(self) -> None:
        """Fix all shelves: nothing is added after this."""
        for shelf in self.shelves.values():
            shelf.close(self.device.type == "cuda")

    def take(self, block: str, number: int) -> Stored:
        """Return the tensors of a linear on the device."""
        if block != self._current:
            self._turn(block)
        return self.shelves[block].tensors(self._here[block][0], number)

    def _turn(self, block: str) -> None:
        if block not in self._order:
            self._order.append(block)
        place = self._order.index(block)
        before = self._order.index(self._current) if self._current is not None else place - 1
        for other in self._here.keys() - {block}:
            del self._here[other]
        self._bring(block)
        flat, event = self._here[block]
        if event is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(event)
            flat.record_stream(now)  # or its memory could be handed out while this stream still reads it
        self._current = block
        following = place + (1 if place > before else -1)
        if 0 <= following < len(self._order):
            self._bring(self._order[following])

    def _bring(self, block: str) -> None:
        if block in self._here:
            return
        flat, event = self.shelves[block].flat, None
        if self._stream is None:
            here = flat.to(self.device, copy=True)
        else:
            with torch.cuda.stream(self._stream):
                here = flat.to(self.device, non_blocking=True)
                event = self._stream.record_event()
        self._here[block] = here, event


# ---- in a model -----------------------------------------------------------------------------------------------------


class StoredLinear(nn.Module):
    """A frozen linear, (..., in) -> (..., out), whose weight is stored in a Form, on its device or in a Host."""

    def __init__(self, linear: nn.Linear, form: Form, stored: Stored, host: tuple[Host, str] | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form, self.shape, self.dtype = form, linear.weight.shape, linear.weight.dtype
        # says where the linear is, to whoever asks its parameters
        self.anchor = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
        has_bias = linear.bias is not None  # pyright: ignore[reportUnnecessaryComparison]  torch types it as never None
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False) if has_bias else None
        self.count, self._host = len(stored), None
        if host is None:
            for index, tensor in enumerate(stored):
                self.register_buffer(f"stored_{index}", tensor)
        else:
            self._host = (*host, host[0].shelf(host[1]).add(stored))

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) on the device in `dtype`, made for this call."""
        if self._host is not None:
            host, block, number = self._host
            stored = host.take(block, number)
        else:
            stored = tuple(getattr(self, f"stored_{index}") for index in range(self.count))
        return self.form.unpack(stored, self.shape, dtype)

    @property
    def weight(self) -> Tensor:
        """Return the weight in the type that it was loaded in: a copy, to read."""
        return self.weight_as(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self)


class _Context(Protocol):
    """What autograd hands from the forward to the backward pass."""

    linear: StoredLinear
    needs_input_grad: tuple[bool, ...]


class _Product(torch.autograd.Function):
    """x W^T + b; keeps no weight for the backward pass."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, linear: StoredLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight_as(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad @ ctx.linear.weight_as(grad.dtype), None


_product = cast("Callable[[Tensor, StoredLinear], Tensor]", torch.compiler.disable(_Product.apply))
"""Streams and copies from host memory are not for a compiled graph."""

_BLOCK = re.compile(r"(?:.*?\.)?\w*transformer_blocks\.\d+|.+?\.\d+")


def block_of(name: str) -> str:
    """Return the dotted path of the repeated block that a linear is in; its first part where there is none."""
    match = _BLOCK.match(name)
    return match[0] if match else name.partition(".")[0]


def store_linears(
    model: nn.Module, kind: str, wanted: Callable[[str], bool], offload_from: torch.device | None = None
) -> int:
    """Replace in place every linear whose dotted name is `wanted`; return how many.

    `kind` is a row of FORMS. With `offload_from`, a device, the stored weights stay in host memory and are used there.
    ValueError where no linear is wanted.
    """
    targets = [name for name, module in model.named_modules() if type(module) is nn.Linear and wanted(name)]
    if not targets:
        raise ValueError(f"quantize: {kind} finds no linear to replace in this {type(model).__name__}")
    form, host = FORMS[kind], Host(offload_from) if offload_from else None
    for name in targets:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        linear: nn.Linear = getattr(holder, child)
        # a GPU packs in no time what takes a CPU minutes
        stored = form.pack(linear.weight.to(offload_from) if offload_from else linear.weight)
        stored = tuple(tensor.to(linear.weight.device) for tensor in stored)
        setattr(holder, child, StoredLinear(linear, form, stored, (host, block_of(name)) if host else None))
    if host:
        host.close()
    return len(targets)
