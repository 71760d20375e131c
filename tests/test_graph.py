"""graph.py: a replayed step is the eager step, bit for bit; what cannot be captured is found and told.

There is no GPU here. `Tape` stands in for the CUDA graph: it keeps the operations that reach PyTorch's kernels, with
the tensors they were given, and replays those without any of the code that asked for them. Whatever a step takes from
Python, from a tensor that is made anew or from a random generator would stay as it was when it was recorded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffusekrona_train.common.progress import Stopped
from diffusekrona_train.config.training import TrainConfig
from diffusekrona_train.training import graph, memory, train
from diffusekrona_train.training.graph import StepGraphs, Uncapturable, add_gradients, why_not
from diffusekrona_train.training.optimizer import Descent
from scripts.bench.contender import Bench, OneProcess
from tests.runs import Told, factors, make_run, make_world, same_factors
from tests.tiny import make_unet

Work = Callable[[], None]


class Tape:
    """Records operations and replays them, as a CUDA graph does kernels."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def warm(self, work: Work) -> None:
        work()

    def capture(self, work: Work) -> Work:
        recording = Recording()
        with recording:
            work()
        recording.undo()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            recording.replay()

        return replay


class Recording(TorchDispatchMode):
    """Every operation with its tensors; and how the memory that they wrote to was before."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self.keep(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self.keep(argument, kwargs[argument.name])
        result = func(*args, **kwargs)
        if not func.is_view:
            self.done.append((func, args, kwargs, result))
            if not any(returned.alias_info for returned in func._schema.returns):
                self.own |= {tensor.untyped_storage()._cdata for tensor in tensors_in(result)}
        return result

    def keep(self, argument: Any, value: Any) -> None:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()

    def undo(self) -> None:
        for storage, value in self.before.values():
            storage.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.done:
            again = func(*args, **kwargs)
            if not any(returned.alias_info for returned in func._schema.returns):
                for into, value in zip(tensors_in(result), tensors_in(again), strict=True):
                    into.copy_(value)


def tensors_in(tree: Any) -> list[Tensor]:
    return [value for value in tree_iter(tree) if isinstance(value, Tensor)]


@pytest.fixture
def taped(monkeypatch):
    """Runs are captured on a Tape; the fixture is the list of the runs' StepGraphs."""
    made: list[StepGraphs] = []

    def step_graphs(config, objective, descent, level, room, tell):
        made.append(StepGraphs(objective, descent, Tape(), tell=tell))
        return made[-1]

    monkeypatch.setattr(graph, "step_graphs", step_graphs)
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "loss", "lr", "grad_norm", "validation_loss") if key in line}
        for line in lines
    ]


WAYS = {
    "three shapes, accumulated": {
        "data": {"buckets": True},
        "train": {"steps": 9, "gradient_accumulation": 2, "schedule": "cosine", "warmup_steps": 3},
    },
    "bf16, a teacher, checkpointed": {
        "train": {"steps": 4, "mixed_precision": "bf16", "memory": "checkpointing", "schedule": "linear"},
        "prior": {"kind": "teacher", "weight": 0.5},
    },
    "captions and noise": {
        "train": {
            "steps": 4,
            "caption_dropout": 0.5,
            "noise_offset": 0.1,
            "weighting": "min_snr",
            "loss": "huber",
            "rate_unit": "dw",
        },
        "validation": {"every": 3, "loss": True, "steps": 1},
    },
    "an average, a cap, against the base": {
        "adapter": {"norm_cap": 0.05},
        "train": {"steps": 5, "average": 0.8, "loss": "dco", "rate_ratio": 4.0, "learning_rate": 0.1},
        "validation": {"every": 3, "loss": True, "steps": 1},
    },
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full] if name.startswith(("captions", "an average")) else [])
        for name in WAYS
    ],
)
def test_a_replayed_run_is_the_eager_one_bit_for_bit(name, world, tmp_path, taped, monkeypatch):
    replayed = train(make_run(world, tmp_path / "a" / "run", **WAYS[name])).file.parent
    monkeypatch.undo()
    eager = train(make_run(world, tmp_path / "b" / "run", **WAYS[name])).file.parent
    (graphs,) = taped
    shapes = 3 if "three" in name else 1
    assert graphs.refused is None and graphs.recorder.captured == shapes + 1
    assert graphs.recorder.replayed >= 2 * 3
    assert same_factors(factors(replayed), factors(eager))
    assert metrics(replayed) == metrics(eager)


def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path, taped):
    class AfterFour(Told):
        def should_stop(self):
            return any(fields.get("step") == 4 for event, fields in self.events if event == "step")

    straight = train(make_run(world, tmp_path / "a" / "run", train={"steps": 6})).file.parent
    config = make_run(world, tmp_path / "b" / "run", train={"steps": 6})
    told = AfterFour()
    with pytest.raises(Stopped):
        train(config, progress=told)
    assert same_factors(factors(train(config, resume=True).file.parent), factors(straight))
    assert len(taped) == 3 and all(graphs.recorder.replayed for graphs in taped)


def test_memory_that_ends_drops_the_graphs_and_the_run_ends_as_without(world, tmp_path, taped, monkeypatch):
    """The fourth micro-batch fails as on a full card: checkpointing then, and graphs anew."""
    monkeypatch.setattr(memory, "below", lambda level, *_: memory.Level("checkpointing", "none", True))
    whole, count = StepGraphs.passes, iter(range(99))

    def passes(self, batches):
        if next(count) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        whole(self, batches)

    monkeypatch.setattr(StepGraphs, "passes", passes)
    told = Told()
    found = train(make_run(world, tmp_path / "a" / "run", train={"steps": 4}), progress=told).file.parent
    assert "out of memory with memory: plain; continuing with checkpointing" in told.text
    assert [graphs.recorder.captured for graphs in taped] == [2, 2]
    monkeypatch.undo()
    eager = train(make_run(world, tmp_path / "b" / "run", train={"steps": 4})).file.parent
    assert same_factors(factors(found), factors(eager))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def contender(device: str = "cpu", dtype: torch.dtype = torch.float32, **bench: Any):
    torch.manual_seed(0)
    unet = make_unet("sdxl").to(dtype).requires_grad_(False).to(device)
    return Bench(unet, 64, 2).contender({"a1": 4, "a2": 4})


def steps(run: Any, graphs: StepGraphs, count: int) -> Tensor:
    for number in range(count):
        graphs.passes(run.objective.batches(number, 0))
        run.descent.prepare(1e-2, False)
        graphs.apply()
    return run.descent.factors.master.detach().clone()


class Failing(Tape):
    def capture(self, work: Work) -> Work:
        raise RuntimeError(
            "CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA"
        )


class Full(Tape):
    def capture(self, work: Work) -> Work:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Wrong(Tape):
    """Replays something else than it was given."""

    def capture(self, work: Work) -> Work:
        return lambda: None


class Stale(Tape):
    """Replays the first numbers again, as if a graph had read memory that somebody else has now."""

    def capture(self, work: Work) -> Work:
        replay = super().capture(work)
        return lambda: (replay(), replay())[0]


@pytest.mark.parametrize(
    ("recorder", "said"),
    [
        (
            Failing,
            "no CUDA graph: CUDA error: operation not permitted when stream is capturing; the run continues without",
        ),
        (Full, "no CUDA graph: out of memory; the run continues without"),
        (Wrong, "no CUDA graph: a replay gave other numbers; the run continues without"),
        (Stale, "no CUDA graph: a replay gave other numbers; the run continues without"),
    ],
)
def test_a_capture_that_fails_is_one_line_and_the_step_goes_on_without(recorder, said):
    wanted = steps(run := contender(), StepGraphs(run.objective, run.descent), 4)
    told: list[str] = []
    run = contender()
    graphs = StepGraphs(run.objective, run.descent, recorder(), tell=told.append)
    assert torch.equal(steps(run, graphs, 4), wanted)
    assert told == [said] and graphs.refused is not None


def test_the_benchmark_replays_the_same_step():
    run, other = contender(), contender()
    replayed = run.captured(Tape())
    for number in range(2):
        other.step(number)
    for number in range(2, 5):
        replayed(number)
        other.step(number)
    masters = [one.descent.factors.master.detach() for one in (run, other)]
    assert torch.equal(*masters)
    bare = Bench(make_unet("sd15").requires_grad_(False), 64, 2).contender(None)
    tape = Tape()
    bare.captured(tape)(1)
    assert tape.replayed == 1
    with pytest.raises(RuntimeError, match="no CUDA graph: a replay gave other numbers"):
        contender().captured(Wrong())


def test_beyond_the_most_shapes_a_step_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(graph, "MOST_SHAPES", 0)
    run = contender()
    graphs = StepGraphs(run.objective, run.descent, tape := Tape())
    steps(run, graphs, 3)
    assert tape.captured == 1 and graphs.refused is None  # the optimiser's


def test_what_waits_for_the_device_is_found_before_it_is_captured(monkeypatch):
    run = contender()
    told: list[str] = []
    loss_of = run.objective.loss_of

    def waiting(batches):
        loss = loss_of(batches)
        return loss * (2.0 if loss.item() > 0 else 1.0)

    monkeypatch.setattr(run.objective, "loss_of", waiting)
    graphs = StepGraphs(run.objective, run.descent, tape := Tape(), tell=told.append)
    steps(run, graphs, 3)
    assert told == ["no CUDA graph: aten::_local_scalar_dense cannot be captured; the run continues without"]
    assert tape.captured == 0


BAD: dict[str, Callable[[Tensor], Any]] = {
    "aten::nonzero": lambda x: x.nonzero(),
    "aten::index.Tensor": lambda x: x[x > 0],
    "aten::masked_select": lambda x: x.masked_select(x > 0),
    "aten::_local_scalar_dense": lambda x: float(x.sum()),
    "aten::equal": lambda x: torch.equal(x, x.clone()),
    "aten::normal_": lambda x: torch.empty_like(x).normal_(),
    "aten::rand": lambda x: torch.rand(3),
    "aten::_to_copy": lambda x: x.to("meta"),
    "aten::copy_": lambda x: torch.empty(4, device="meta").copy_(x),
    "torch.tensor": lambda x: torch.tensor([1, 2], device="meta"),
    "torch.new_tensor": lambda x: torch.empty(4, device="meta").new_tensor([1.0]),
    "aten::index.Tensor ": lambda x: torch.empty(4, device="meta")[torch.tensor([1, 2])],
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_graph_cannot_hold(name):
    x = torch.arange(4.0)
    with Uncapturable() as mode:
        BAD[name](x)
    assert name.strip() in mode.found
    with Uncapturable() as mode:
        torch.where(torch.empty(4, device="meta") > 0, torch.empty(4, device="meta") * torch.ones(()), 0.0)
        (x[torch.tensor([1, 2])] + 1).to(torch.float64).copy_(x[:2]).clamp_(max=1.0).softmax(0)
    assert not mode.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_work_of_a_step_neither_waits_nor_copies_nor_draws(dtype, checkpointed, monkeypatch):
    """With the model and all that stays on a device without content, where to wait is an error in itself."""
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta", "cuda"])
    run = contender("meta", dtype)
    if checkpointed:
        from diffusekrona_train.training.base import enable_checkpointing

        enable_checkpointing(run.objective.denoiser)
    batches = run.objective.batches(0, 0)
    run.descent.prepare(1e-3, False)
    for _ in range(2):
        with Uncapturable() as mode:
            add_gradients(run.descent, run.objective.loss_of(batches))
            run.descent.apply()
        assert not mode.found


# ---- the optimiser's numbers as tensors ------------------------------------------------------------------------------


def test_a_rate_on_the_device_is_the_same_rate():
    torch.manual_seed(0)
    start, gradients = torch.randn(300), torch.randn(5, 300)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    train_config = TrainConfig(max_grad_norm=None)
    descent = Descent([mine], train_config, OneProcess)
    own = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, fused=True)
    for number, gradient in enumerate(gradients):
        rate = 1e-3 / (number + 3)
        add_gradients(descent, (mine * gradient).sum())
        descent.step(rate)
        theirs.grad = gradient.clone()
        own.param_groups[0]["lr"] = rate
        own.step()
    assert torch.equal(mine.detach(), theirs.detach())


def test_what_a_step_counts_stays_where_it_is():
    weight = torch.nn.Parameter(torch.ones(4))
    descent = Descent([weight], TrainConfig(), OneProcess)
    places = [tensor.data_ptr() for tensor in (descent.meters, descent.wish, descent.rate, descent.flat)]
    for value in (1.0, float("nan"), 2.0):
        add_gradients(descent, (weight * value).sum())
        wish = descent.step(0.1, stop=value == 2.0)
    assert [tensor.data_ptr() for tensor in (descent.meters, descent.wish, descent.rate, descent.flat)] == places
    assert wish.item() == 1.0 and descent.read()["skipped"] == 1


# ---- whether ---------------------------------------------------------------------------------------------------------

PLAIN, NF4 = memory.Level("plain", "none", False), memory.Level("nf4", "nf4", True)


@pytest.mark.parametrize(
    ("asked", "level", "device", "processes", "room", "reason"),
    [
        ("auto", PLAIN, "cuda", 1, 20.0, None),
        (True, NF4, "cuda", 1, None, None),
        (False, PLAIN, "cuda", 1, 20.0, "train.cuda_graph: false"),
        ("auto", PLAIN, "cpu", 1, None, "it needs an NVIDIA or AMD GPU, not CPU"),
        (True, PLAIN, "mps", 1, 9.0, "it needs an NVIDIA or AMD GPU, not Apple GPU (mps)"),
        (True, PLAIN, "cuda", 2, 20.0, "it is for one process"),
        ("auto", NF4, "cuda", 1, 20.0, "not tried with nf4; train.cuda_graph: true tries it"),
        ("auto", PLAIN, "cuda", 1, 3.0, "it needs 4.0 GiB beside the step, and 3.0 GiB of memory is left"),
        ("auto", PLAIN, "cuda", 1, None, "it needs 4.0 GiB beside the step, and an unknown amount of memory is left"),
    ],
)
def test_when_a_step_is_captured(asked, level, device, processes, room, reason, tmp_path):
    extra = {"data": {"resolution": 1024}, "validation": {"every": 100}, "train": {"cuda_graph": asked}}
    config = make_run(tmp_path, tmp_path / "x", **extra)
    assert why_not(config, level, device, processes, room) == reason


def test_less_room_is_needed_where_no_image_is_decoded(tmp_path):
    sides = {
        side: make_run(tmp_path, tmp_path / "x", data={"resolution": side}, validation={"every": 1})
        for side in (512, 1024)
    }
    none = make_run(tmp_path, tmp_path / "x", data={"resolution": 1024}, validation={"every": 0})
    assert graph.room_beside(sides[1024]) == 4.0 and graph.room_beside(sides[512]) == 0.5 + 3.5 / 4
    assert graph.room_beside(none) == 0.5


@pytest.mark.parametrize("asked", ["auto", True])
def test_a_cpu_trains_without_and_says_so_only_where_it_was_asked(asked, world, tmp_path):
    told = Told()
    train(make_run(world, tmp_path / "run", train={"steps": 1, "cuda_graph": asked}), progress=told)
    assert ("no CUDA graph: it needs an NVIDIA or AMD GPU, not CPU" in told.text) == (asked is True)


def test_a_run_may_be_resumed_with_and_without(world, tmp_path, taped):
    config = make_run(world, tmp_path / "run", train={"steps": 2})
    train(config)
    longer = make_run(world, tmp_path / "run", train={"steps": 4, "cuda_graph": False})
    assert train(longer, resume=True).steps == 4


def test_a_scaler_s_numbers_are_among_what_is_compared():
    weight = torch.nn.Parameter(torch.ones(4))
    scaler = torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(num_processes=1, scaler=scaler, backward=lambda loss: scaler.scale(loss).backward())
    descent = Descent([weight], TrainConfig(), accelerator)
    add_gradients(descent, weight.sum())
    descent.step(0.1)
    changed = descent.state()
    assert any(tensor is scaler._scale for tensor in changed) and any(t is descent.meters for t in changed)
