"""Keep all factors in one fp32 buffer and all gradients in another, with a table of where each one is.

The optimiser then sees one parameter: clearing, averaging, unscaling, clipping and stepping are one kernel each, and a
16-bit copy of all factors is one cast a step. Segments begin at multiples of 256, the block of 8-bit optimisers, so no
block mixes two factors. A slot is a subject: slots have equal layouts one after the other, so that all that is decided
for each subject (rate, norm, step count, finite or not) is a view (slots, slot size) of the buffers.

Adapters of equal shapes lie side by side, so that each factor of all of them is one tensor (`Members`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters.base import Adapter

ALIGN = 256
SPARE = 2
LOSS, STOP = -2, -1
"""Where behind the gradients lies what travels with them: this process's loss, and its wish to stop."""


@dataclass(frozen=True)
class Segment:
    """Where one factor is: `size` numbers from `start`, zeros after them up to the next multiple of 256."""

    slot: int
    layer: str
    factor: str
    start: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As in `Injection.named_parameters`."""
        return f"{self.layer}|{self.factor}"

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def step(self) -> int:
        """Count numbers from the start of this segment to the next one."""
        return aligned(self.size)

    def of(self, buffer: Tensor) -> Tensor:
        """Return the factor's view of a buffer with this layout."""
        return buffer[self.start : self.start + self.size].view(self.shape)


class FlatFactors:
    """The adapters' parameters become views of `master`, their gradients views of `gradient`.

    `subjects` maps layer names to adapters for each slot, of equal shapes. `buffer` is the gradients and SPARE numbers
    behind them. Adapters that know how (see `grouped`) are made to write their gradients into `stage` buffers of the
    type that they compute in; `flush` adds those to `gradient`, once a backward pass. `home`: tensors to live in as
    `master` and `buffer`, of the same sizes; their numbers are overwritten.
    """

    def __init__(self, subjects: Sequence[Mapping[str, nn.Module]], home: tuple[Tensor, Tensor] | None = None):
        self.segments: list[Segment] = []
        self.layout: list[tuple[int, list[str], list[Segment]]] = []
        start = 0
        for slot, adapters in enumerate(subjects):
            for layers in members_of(adapters):
                segments = list(_laid(slot, layers, adapters, start))
                start = segments[-1].start + segments[-1].step
                self.segments += segments
                self.layout.append((slot, layers, segments))
        self.subjects = list(subjects)
        self.slots, self.size = len(subjects), start
        assert start % self.slots == 0, "subjects of one run have equal adapters"
        parameters = [adapter_parameter(subjects, segment) for segment in self.segments]
        assert all(parameter.dtype == torch.float32 for parameter in parameters), "trained parameters are fp32 masters"
        device = parameters[0].device
        master, self.buffer = home or (torch.zeros(start, device=device), torch.zeros(start + SPARE, device=device))
        self.master = nn.Parameter(master.zero_())
        self.buffer.zero_()
        self.gradient = self.buffer[:start]
        self.master.grad = self.gradient
        self._shadows: dict[torch.dtype, Tensor] = {self.master.dtype: self.master.detach()}
        self._stages: dict[torch.dtype, Tensor] = {}
        self.round = 0
        self.after_round: list[Callable[[], object]] = []
        """Called where the gradients of a pass were stored, or are forgotten."""
        with torch.no_grad():
            for segment, parameter in zip(self.segments, parameters, strict=True):
                segment.of(self.master).copy_(parameter)
                parameter.data = segment.of(self.master.data)
                parameter.grad = segment.of(self.gradient)

        device = self.master.device
        self._blocks = torch.tensor([segment.step // ALIGN for segment in self.segments], device=device)
        owners = torch.arange(len(self.segments), device=device)
        self._segment_of_block = owners.repeat_interleave(self._blocks, output_size=start // ALIGN)

    def sums(self, buffer: Tensor) -> Tensor:
        """Return the sum of each segment of a buffer with this layout, (segments,); the same in every call."""
        parts = buffer.view(-1, ALIGN).sum(1)
        return torch.segment_reduce(parts, "sum", lengths=self._blocks, unsafe=True)

    def spread(self, table: Tensor) -> Tensor:
        """Return a number for each segment, (segments,), as one for each block of 256 numbers: (blocks, 1)."""
        return table[self._segment_of_block][:, None]

    @torch.no_grad()
    def scale(self, table: Tensor) -> None:
        """Multiply each factor by its number in (segments,); `refresh` afterwards."""
        self.master.view(-1, ALIGN).mul_(self.spread(table))

    def shadow(self, dtype: torch.dtype) -> Tensor:
        """Return all factors in `dtype`, as of the last `refresh`."""
        if dtype not in self._shadows:
            self._shadows[dtype] = self.master.detach().to(dtype)
        return self._shadows[dtype]

    def stage(self, dtype: torch.dtype) -> Tensor:
        """Return the gradients of this backward pass in `dtype`."""
        if dtype not in self._stages:
            self._stages[dtype] = torch.zeros(self.size, dtype=dtype, device=self.master.device)
        return self._stages[dtype]

    def tensors(self) -> list[Tensor]:
        """Return the buffers of factors and gradients, in every type that is there."""
        return [self.buffer, *self._shadows.values(), *self._stages.values()]

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the factors anew, after they have changed."""
        for dtype, shadow in self._shadows.items():
            if dtype != self.master.dtype:
                shadow.copy_(self.master)

    @torch.no_grad()
    def flush(self, loss: Tensor | None = None) -> None:
        """Add what the last backward pass left in the stages to `gradient`, in fp32, and its loss to that of the
        step."""
        if loss is not None:
            self.buffer[LOSS] += loss
        for stage in self._stages.values():
            self.gradient.add_(stage)
            stage.zero_()
        self._next_round()

    @torch.no_grad()
    def clear(self) -> None:
        """Forget all gradients."""
        self.buffer.zero_()
        for stage in self._stages.values():
            stage.zero_()
        self._next_round()

    def _next_round(self) -> None:
        self.round += 1
        for call in self.after_round:
            call()

    def of_slot(self, slot: int, buffer: Tensor) -> Tensor:
        """Return one slot's share of a buffer with this layout."""
        return buffer[: self.size].view(self.slots, -1)[slot]


class Members:
    """Adapters of two products each; `starts` holds the first one's segments by factor."""

    def __init__(self, flat: FlatFactors, adapters: list[Adapter], starts: Mapping[str, Segment]):
        sides = adapters[0].sides
        assert sides is not None
        (self.inner, inner), (self.outer, outer) = sides
        self.flat, self.adapters = flat, adapters
        self.segments = starts
        self._factors = starts[inner], starts[outer]
        self._views: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._each: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self._stages: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._round = -1
        self.anchor = adapters[0].get_parameter(inner)
        self._gradients = self._of(flat.gradient)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return all members' inner and outer factors (s, o, i) in `dtype`."""
        if dtype not in self._views:
            self._views[dtype] = self._of(self.flat.shadow(dtype))
        return self._views[dtype]

    def each(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return each member's inner and outer factor (o, i) in `dtype`."""
        if dtype not in self._each:
            self._each[dtype] = list(zip(*self.factors(dtype), strict=True))
        return self._each[dtype]

    def stages(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return where this pass's gradients of both factors go; those of an earlier use are stored first."""
        if dtype not in self._stages:
            self._stages[dtype] = self._of(self.flat.stage(dtype))
        if self._round == self.flat.round:
            for gradient, stages in zip(self._gradients, zip(*self._stages.values(), strict=True), strict=True):
                for stage in stages:
                    gradient.add_(stage)
                    stage.zero_()
        self._round = self.flat.round
        return self._stages[dtype]

    def scales(self) -> list[float]:
        return [adapter.multiplier for adapter in self.adapters]

    def _of(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(  # type: ignore[return-value]
            buffer.as_strided(
                (len(self.adapters), *first.shape),
                (first.step, first.shape[1], 1),
                buffer.storage_offset() + first.start,
            )
            for first in self._factors
        )


def members_of(adapters: Mapping[str, nn.Module]) -> list[list[str]]:
    """Return layer names whose factors lie side by side, where type and shapes agree: those of `grouped`, and k and v
    of all cross-attentions; all others alone. In the adapters' order."""
    found: dict[object, list[str]] = {}
    for name, adapter in adapters.items():
        found.setdefault(_key(name, adapter), []).append(name)
    return list(found.values())


def grouped(adapters: Mapping[str, Adapter]) -> list[list[str]]:
    """Return names of those with the same input: q, k, v of a self-attention, k and v of a cross-attention."""
    found: dict[str, list[str]] = {}
    for name, adapter in adapters.items():
        found.setdefault(adapter.layer.group or name, []).append(name)
    return list(found.values())


def reads_the_text(adapter: Adapter) -> bool:
    """Return whether its layer makes keys or values of a cross-attention."""
    return adapter.layer.kind == "cross" and adapter.layer.projection in ("k", "v")


def _key(name: str, adapter: nn.Module) -> object:
    if not isinstance(adapter, Adapter) or adapter.sides is None:
        return name
    shapes = tuple((factor, tuple(parameter.shape)) for factor, parameter in adapter.named_parameters())
    return reads_the_text(adapter) or adapter.layer.group or name, type(adapter), shapes


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def adapter_parameter(subjects: Sequence[Mapping[str, nn.Module]], segment: Segment) -> nn.Parameter:
    return subjects[segment.slot][segment.layer].get_parameter(segment.factor)


def _laid(slot: int, layers: list[str], adapters: Mapping[str, nn.Module], start: int) -> Iterator[Segment]:
    """Lay out segments of adapters of equal shapes: each factor of all of them side by side, so that they are one
    tensor."""
    for factor, parameter in adapters[layers[0]].named_parameters():
        for layer in layers:
            yield Segment(slot, layer, factor, start, tuple(parameter.shape))
            start += aligned(parameter.numel())
