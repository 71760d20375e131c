"""Record the work of a step once for each shape and replay it: one launch where Python makes thousands.

A step is `Objective.batches` (random numbers, copies from the host), then work that only computes on the device: the
passes of each micro-batch and the optimiser's `Descent.apply`. That work reads copies of the batch that stay where they
are and writes to buffers that stay too, so a CUDA graph of it can be replayed. Passes and optimiser are two graphs: so
accumulation costs no second capture, several shapes share one optimiser, and 8-bit AdamW, which waits for the device,
still has its passes replayed.

A graph's memory is given back only with the graph: what else a run needs at times, as decoding an image, comes on top.
No graph has run on a GPU yet, so the first replay of each is compared with the same work done without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffusekrona_train.common.device import device_name, free, ran_out
from diffusekrona_train.config import RunConfig
from diffusekrona_train.models.contracts import Conditioning
from diffusekrona_train.training.loss import Batch, Objective
from diffusekrona_train.training.memory import GIB, Level, decoding
from diffusekrona_train.training.optimizer import Descent

Work = Callable[[], None]
Given = tuple[object, ...]
Named = dict[str, object]
"""The arguments of an operation: those by place, and those by name."""
MOST_SHAPES = 8
"""Shapes of micro-batches that are captured; further ones run as they are."""
LARGEST_COMPARED = GIB
"""Bytes of state up to which a first replay is compared: the comparison holds them twice more."""
DIFFERENCE = 1e-2
"""Largest part of what the work changes that a replay may do otherwise: the order of a sum may differ, no more."""


# ---- whether ---------------------------------------------------------------------------------------------------------


def why_not(config: RunConfig, level: Level, device_type: str, processes: int, room: float | None) -> str | None:
    """Return in a few words why the step of this run is not captured; None where it is.

    `room` (GiB) is what `level` leaves free on the device, None where that is not known.
    """
    train = config.train
    if train.cuda_graph is False:
        return "train.cuda_graph: false"
    if device_type != "cuda":
        return f"it needs an NVIDIA or AMD GPU, not {device_name(device_type)}"
    if processes > 1:
        return "it is for one process"
    if level.offload:
        return "blocks of the base come from host memory"
    if train.cuda_graph is True:
        return None
    if level.quantize != "none":
        return f"not tried with {level.quantize}; train.cuda_graph: true tries it"
    beside = room_beside(config)
    if room is None or room < beside:
        left = "an unknown amount" if room is None else f"{max(room, 0):.1f} GiB"
        return f"it needs {beside:.1f} GiB beside the step, and {left} of memory is left"
    return None


def room_beside(config: RunConfig) -> float:
    """Return how many GiB should be free beside a captured step: its memory is not shared with decoding an image."""
    decodes = config.validation.every and config.validation.prompts
    return 0.5 + (decoding(config) if decodes else 0.0)


# ---- how -------------------------------------------------------------------------------------------------------------


class Recorder(Protocol):
    """What captures work: `CudaRecorder`, or a test's stand-in."""

    def warm(self, work: Work) -> None:
        """Do the work once as it will be captured: what is made at the first use is made now."""
        ...

    def capture(self, work: Work) -> Work:
        """Record the work without its effects on the device; return what replays it."""
        ...


class CudaRecorder:
    """Capture into CUDA graphs that share their memory, as only one of them runs at a time."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Work) -> None:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay


class Uncapturable(TorchDispatchMode):
    """Note what a graph cannot hold: waiting for the device, copies from or to the host, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._made = _Made(self.found)

    def __enter__(self) -> Self:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Given = (), kwargs: Named | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if _waits(func, args) or _is_random(func) or _crosses(func, args, result):
            self.found[func.name()] = None
        return result


class _Made(TorchFunctionMode):
    """Note tensors that are made on the device of Python's numbers: that copy is not dispatched."""

    def __init__(self, found: dict[str, None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Given = (), kwargs: Named | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        makes = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        copies = isinstance(result, Tensor) and result.device.type != "cpu"
        if makes and copies and not (args and isinstance(args[-1], Tensor)):
            self.found[f"torch.{func.__name__}"] = None
        return result


def _waits(func: OpOverload, args: object) -> bool:
    if func.name().startswith("aten::index"):  # only an index by a mask has a size that the device must tell
        return any(isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) for value in tree_iter(args))
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _is_random(func: OpOverload) -> bool:
    # attention could drop out; no denoiser does in eval mode
    return torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.name()


def _crosses(func: OpOverload, args: object, result: object) -> bool:
    """Return whether numbers are copied between host and device; a single one of the host is a kernel's argument."""
    given = [value for value in tree_iter(args) if isinstance(value, Tensor)]
    if isinstance(result, Tensor) and func.name() in ("aten::_to_copy", "aten::copy_"):
        return any(value.device.type != result.device.type for value in given)
    hosts = [value for value in given if value.device.type == "cpu"]
    return len(hosts) < len(given) and any(value.dim() for value in hosts)


class StepGraphs:
    """The work of a run's steps: the first two times in a shape it is done as it is, after that replayed.

    `refused` says why nothing is captured, None while it is; `tell` hears it once where that is found out on the way.
    """

    def __init__(
        self,
        objective: Objective,
        descent: Descent,
        recorder: Recorder | None = None,
        refused: str | None = None,
        tell: Callable[[str], object] = lambda _: None,
    ):
        self.objective, self.descent, self.recorder, self.tell = objective, descent, recorder, tell
        self.refused = refused if recorder is not None else refused or "there is nothing that captures"
        self.forget()

    def forget(self) -> None:
        """Drop all graphs, and with them their memory."""
        self._staying: dict[Hashable, list[Batch]] = {}
        self._replays: dict[Hashable, Work] = {}
        self._warm: set[Hashable] = set()

    def gradients(self, step: int) -> None:
        """Add up the gradients of this process's share of the global batch."""
        for micro in range(self.objective.config.train.gradient_accumulation):
            self.passes(self.objective.batches(step, micro))

    def passes(self, batches: Sequence[Batch]) -> None:
        """Forward and backward pass of one micro-batch."""
        key = signature(batches)
        if key not in self._staying:
            if self.refused is not None or len(self._staying) >= MOST_SHAPES:
                self._pass(batches)
                return
            self._staying[key] = [staying(batch) for batch in batches]
        stay = self._staying[key]
        put(list(leaves(stay)), list(leaves(batches)))
        self._do(key, lambda: self._pass(stay), lambda: [self.descent.flat])

    def apply(self) -> None:
        """The optimiser's part."""
        if self.descent.waits:
            self.descent.apply()
        else:
            self._do("apply", self.descent.apply, self.descent.state)

    def _pass(self, batches: Sequence[Batch]) -> None:
        add_gradients(self.descent, self.objective.loss_of(batches))

    def _do(self, key: Hashable, work: Work, state: Callable[[], list[Tensor]]) -> None:
        if (replay := self._replays.get(key)) is not None:
            replay()
        elif self.recorder is None or self.refused is not None:
            work()
        elif key not in self._warm:
            self.recorder.warm(work)
            self._warm.add(key)
        else:
            self._second(key, work, state(), self.recorder)

    def _second(self, key: Hashable, work: Work, state: list[Tensor], recorder: Recorder) -> None:
        compared = state if sum(tensor.nbytes for tensor in state) <= LARGEST_COMPARED else []
        before = [tensor.clone() for tensor in compared]
        # under a mode, compiled blocks would be left for eager ones, and not be warm when they are captured
        mode = None if self.objective.config.train.compile else Uncapturable()
        with mode or contextlib.nullcontext():
            work()
        if mode is not None and mode.found:
            self._refuse(f"{', '.join(mode.found)} cannot be captured")
            return
        wanted = [tensor.clone() for tensor in compared]
        try:
            replay = recorder.capture(work)
        except RuntimeError as error:
            short = ran_out(error)
            self._refuse("out of memory" if short else (str(error).strip().splitlines() or [type(error).__name__])[0])
            return
        if compared:
            put(compared, before)
            replay()
        if all(map(alike, compared, wanted, before)):
            self._replays[key] = replay
        else:
            self._refuse("a replay gave other numbers")
        put(compared, wanted)

    def _refuse(self, why: str) -> None:
        if self.refused is None:
            self.tell(f"no CUDA graph: {why}; the run continues without")
        self.refused = why
        self.forget()
        free()


def add_gradients(descent: Descent, loss: Tensor) -> None:
    """Add those of one micro-batch's loss to the gradients of the step."""
    loss = loss / descent.train.gradient_accumulation
    descent.accelerator.backward(loss)
    descent.factors.flush(loss.detach())


def step_graphs(
    config: RunConfig,
    objective: Objective,
    descent: Descent,
    level: Level,
    room: float | None,
    tell: Callable[[str], object],
) -> StepGraphs:
    """Return what does the work of a run's steps: captured where `why_not` has nothing against it.

    The reason is told where somebody could expect a graph: on a GPU, or asked for by name.
    """
    device, asked = objective.device, config.train.cuda_graph
    refused = why_not(config, level, device.type, objective.processes, room)
    if refused is None:
        tell("the step is captured as a CUDA graph, each shape at its second step")
        return StepGraphs(objective, descent, CudaRecorder(device), tell=tell)
    if asked is True or (asked == "auto" and device.type == "cuda"):
        tell(f"no CUDA graph: {refused}")
    return StepGraphs(objective, descent, refused=refused)


@torch.no_grad()
def put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors that stay where they are."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def alike(found: Tensor, wanted: Tensor, before: Tensor) -> bool:
    """Return whether `before` was changed to `found` much as it was to `wanted`. Waits for the device."""
    if torch.equal(found, wanted):
        return True
    error, change = (found.double() - wanted.double()).norm(), (wanted.double() - before.double()).norm()
    return not wanted.isfinite().all() or bool(error <= DIFFERENCE * change)


# ---- a batch as tensors that stay ------------------------------------------------------------------------------------


def leaves(batches: Sequence[Batch]) -> Iterator[Tensor]:
    """Yield every tensor that the work reads."""
    for batch in batches:
        yield from (batch.x_0, batch.eps, batch.t, batch.share)
        for told in (batch.conditioning, batch.taught):
            for value in told.values():
                yield from value if isinstance(value, list) else [value]


def signature(batches: Sequence[Batch]) -> Hashable:
    """Return what must be equal for work to be replayed: names, shapes and types."""
    names = tuple((batch.teacher, *batch.conditioning, *batch.taught) for batch in batches)
    return names, tuple((tuple(tensor.shape), tensor.dtype) for tensor in leaves(batches))


def staying(batch: Batch) -> Batch:
    """Return the batch in memory of its own."""
    own = {name: getattr(batch, name).clone() for name in ("x_0", "eps", "t", "share")}
    return replace(batch, **own, conditioning=_own(batch.conditioning), taught=_own(batch.taught))


def _own(told: Conditioning) -> Conditioning:
    return {
        name: [one.clone() for one in value] if isinstance(value, list) else value.clone()
        for name, value in told.items()
    }
