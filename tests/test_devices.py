"""A step where the device is not the host: the run on `meta`, the host's tensors real, and no operation mixes them.

What a GPU would refuse ("expected all tensors to be on the same device") or would wait for (`.item()`, `bool()`) fails
here without one.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from diffusekrona_train.common import device as devices
from diffusekrona_train.common.device import moved
from diffusekrona_train.config.training import TrainConfig
from diffusekrona_train.data import training_set
from diffusekrona_train.models import family_named, open_model
from diffusekrona_train.training import checkpoint, memory, preview, setup
from diffusekrona_train.training.check import needs
from diffusekrona_train.training.graph import add_gradients
from diffusekrona_train.training.optimizer import Descent
from diffusekrona_train.training.preview import Gallery
from scripts.bench.contender import Bench, OneProcess
from tests.runs import Told, make_run
from tests.tiny import _vae as make_vae
from tests.tiny import make_unet

COPIES = ("aten::_to_copy", "aten::copy_")


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, but for copies and for scalars of the host; counts the copies."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _read(func, args, kwargs or {})
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if func.name() in COPIES:
            self.sent += any(value.device != result.device for value in given)
            return result
        devices = {value.device.type for value in given if value.dim() or value.device.type != "cpu"}
        assert len(devices) <= 1, f"{func.name()} mixes {devices}"
        return result


def _read(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation's result; zeros where the host reads a device that has no content."""
    if (
        func.name() == "aten::_to_copy"
        and args[0].is_meta
        and torch.device(kwargs.get("device") or "meta").type == "cpu"
    ):
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if func.name() == "aten::copy_" and args[1].is_meta and not args[0].is_meta:
        return args[0].zero_()
    return func(*args, **kwargs)


def contender(kind: str, dtype: torch.dtype, adapter: dict):
    unet = make_unet(kind).to(dtype).requires_grad_(False).to("meta")
    return Bench(unet, 64, 2).contender(adapter)


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [
        ({"a1": 4, "a2": 4}, torch.float32),
        ({"a1": 4, "a2": 4}, torch.bfloat16),
        ({"type": "lora"}, torch.bfloat16),
        ({"type": "loha", "rank": 2}, torch.float32),
    ],
    ids=str,
)
def test_a_step_mixes_no_devices_and_waits_for_none(adapter, dtype, monkeypatch):
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta", "cuda"])
    run = contender("sdxl", dtype, adapter)
    for checkpointed in (False, True):
        if checkpointed:
            run.objective.denoiser.enable_gradient_checkpointing()
        with OneDevice() as mode:
            for number in range(2):
                add_gradients(run.descent, run.objective.loss_of(run.objective.batches(number, 0)))
                run.descent.step(1e-3)
        assert mode.sent <= 2 * 8  # noise, timesteps, indices, … of each micro-batch
    assert all(parameter.grad.device.type == "meta" for parameter in run.objective.injection.parameters())


def test_the_held_out_loss_mixes_no_devices():
    run = contender("sd15", torch.float32, {"a1": 4, "a2": 4})
    with OneDevice(), torch.no_grad():
        for batch in run.objective._held_out():
            assert run.objective.per_sample(batch, weighted=False).device.type == "meta"


def test_guided_sampling_mixes_no_devices():
    """The denoiser's forward under guidance, as validation calls it: text and no text in one batch."""
    run = contender("sdxl", torch.bfloat16, {"a1": 4, "a2": 4})
    objective = run.objective
    (batch,) = objective.batches(0, 0)
    with OneDevice(), torch.no_grad():
        rows = [moved(objective.captions[0], objective.device, objective.dtype)] * (2 * len(batch))
        extras = {name: torch.cat([value, value]) for name, value in batch.extras.items()}
        both, t = torch.cat([batch.x_0, batch.x_0]).to(objective.dtype), torch.cat([batch.t, batch.t])
        answer = objective.family.predict(objective.denoiser, both, t, {**objective.family.collate(rows), **extras})
        without, wanted = answer.chunk(2)
        guided = without + 7.5 * (wanted - without)
    assert guided.device.type == "meta" and guided.shape == batch.x_0.shape


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_validation_with_its_decoding_mixes_no_devices(kind, tmp_path, monkeypatch):
    """The whole of `Gallery.render`; only the scheduler's times are of the host, which has to read them in any case."""
    run = contender(kind, torch.bfloat16, {"a1": 4, "a2": 4})
    objective = run.objective
    config = make_run(tmp_path, tmp_path / "run", validation={"every": 1, "steps": 2, "prompts": ["[V]", "A [V]"]})
    monkeypatch.setattr(objective.data, "conditioning_of", lambda text: objective.data.conditioning[0])
    times = DDIMScheduler.set_timesteps
    monkeypatch.setattr(DDIMScheduler, "set_timesteps", lambda self, steps, device=None: times(self, steps))
    parts = {"vae": make_vae(), "scheduler": DDIMScheduler(clip_sample=False)}
    source = SimpleNamespace(load=lambda *names, dtype=None: {name: parts[name] for name in names})
    gallery = Gallery(config, source, objective, memory.Level("plain", "none", False), tmp_path, Told())
    monkeypatch.setattr(preview, "images_at_once", lambda *_: 2)
    with OneDevice():
        gallery.render(1, lambda: False)
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_a_checkpoint_is_read_from_one_device_and_put_back_on_it(tmp_path):
    run = contender("sd15", torch.float32, {"a1": 4, "a2": 4})
    injection, optimizer = run.objective.injection, run.descent.optimizer
    moments = {name: torch.zeros(run.descent.factors.size, device="meta") for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[run.descent.factors.master] = {"step": torch.zeros((), device="meta"), **moments}
    info = {"family": "sd", "model": "random", "prediction_type": "epsilon"}
    with OneDevice() as mode:
        about = {"config": {}, "processes": 1}
        extra = {"meters": run.descent.meters}
        checkpoint.save(tmp_path, 1, injection, optimizer, info=info, about=about, extra=extra, keep=1)
        written, mode.sent = mode.sent, 0
        state = checkpoint.newest(tmp_path)
        assert state is not None
        checkpoint.restore(state, injection, optimizer)
        run.descent.meters.copy_(state.tensors["extra/meters"])
    factors = len(injection.parameters())
    assert written <= 2 * factors + 8  # each factor for either file, each kind of moment once
    assert factors <= mode.sent <= factors + 8
    assert all(value.is_meta for value in optimizer.state[run.descent.factors.master].values())


def test_a_mixed_operation_is_refused():
    with OneDevice(), pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="meta") + torch.ones(3)
    with OneDevice(), pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="meta").sum().item()


# ---- cards that are not here: what is asked of torch about them is answered by the test ------------------------------


@pytest.fixture
def card(monkeypatch):
    """card(kind, free, total): torch shows an accelerator of that type with so many GiB."""

    def shown(kind: str, free: float = 16, macos: bool = True) -> torch.device:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
        module = {"cuda": torch.cuda, "xpu": torch.xpu}.get(kind)
        if module is not None:
            monkeypatch.setattr(module, "mem_get_info", lambda device=None: (int(free * 2**30), 64 * 2**30))
            monkeypatch.setattr(module, "get_device_name", lambda index=0: "A card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 3))
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: int((free + 1) * 2**30))
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**30)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos)
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        return torch.device(kind)

    return shown


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_card_in_reach_is_chosen_and_asked_for_its_memory(kind, card, monkeypatch):
    device = card(kind, free=9.5)
    assert devices.pick_device().type == devices.training_device_type() == kind
    assert devices.free_bytes(device) == 9.5 * 2**30
    assert devices.precision("auto", kind) == ("bf16", torch.bfloat16)
    assert devices.pick_dtype("auto", device) == torch.float16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.training_device_type() == "cpu" and devices.precision("auto", "cpu")[1] == torch.float32


def test_an_older_apple_system_trains_in_fp32_and_fp16_is_refused(card):
    card("mps", macos=False)
    assert devices.precision("auto", "mps")[1] == torch.float32
    with pytest.raises(ValueError, match="on an Apple GPU use no or bf16"):
        devices.precision("fp16", "mps")
    assert devices.precision("fp16", "xpu")[1] == torch.float16


def test_an_amd_card_is_cuda_and_takes_bf16(card, monkeypatch):
    card("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    assert devices.precision("auto", "cuda")[0] == "fp16"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.precision("auto", "cuda")[0] == "bf16" and "A card (ROCm 6.4), torch" in needs.device_lines()[0]


def test_check_says_what_does_not_work_on_the_card(card):
    card("mps")
    first, second = needs.device_lines()
    assert first.startswith("Apple GPU (mps)") and "NF4" in second and "fused optimiser" in second
    card("xpu")
    assert len(needs.device_lines()) == 1


def test_check_says_whether_the_step_would_be_captured(card, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = make_run(tmp_path, tmp_path / "x", data={"resolution": 1024}, validation={"every": 100})
    told = {}
    for free in (80, 11, 7, 6):
        card("cuda", free=free)
        told[free] = [line for line in needs.memory_lines(config, open_model("sdxl")) if "CUDA graph" in line]
    assert told[80] == ["the step is captured as a CUDA graph"]
    assert len(told[11]) == 1 and told[11][0].startswith("no CUDA graph: it needs 4.0 GiB beside the step, and ")
    assert told[6] == ["no CUDA graph: blocks of the base come from host memory"]
    assert told[7] == ["no CUDA graph: not tried with nf4; train.cuda_graph: true tries it"]
    card("xpu")
    assert not any("is captured" in line for line in needs.memory_lines(config, open_model("sdxl")))


def test_a_level_that_the_card_cannot_run_is_neither_chosen_nor_taken_later(card, tmp_path):
    figures = family_named("sdxl").memory
    config = make_run(tmp_path, tmp_path / "x", data={"resolution": 1024})
    for kind, chosen, lowest in (("mps", "checkpointing", "checkpointing"), ("xpu", "nf4", "offload")):
        device = card(kind, free=5)
        assert memory.choose(config, 2_567_463_684, 1, torch.bfloat16, device, figures)[0].name == chosen
        level, found = memory.levels(config)[0], []
        while level is not None:
            found.append(level.name)
            level = memory.below(level, config, device)
        assert found[-1] == lowest


@pytest.mark.parametrize("train", [{"quantize": "nf4"}, {"quantize": "int8"}, {"optimizer": "adamw8bit"}], ids=str)
def test_what_bitsandbytes_cannot_do_there_is_refused_in_one_line(train, card, tmp_path):
    card("mps")
    config = make_run(tmp_path, tmp_path / "x", train=train)
    with pytest.raises(ValueError, match="does not work on Apple GPU") as error:
        setup.refuse_unsupported(config, "mps")
    assert "\n" not in str(error.value)
    setup.refuse_unsupported(config, "cuda")


def test_without_a_fused_optimiser_a_bad_step_changes_nothing_and_nothing_is_fp64(monkeypatch):
    """As on an Apple GPU: its abilities given to the CPU."""
    monkeypatch.setitem(devices.ABILITIES, "cpu", devices.ABILITIES["mps"])
    weight = torch.nn.Parameter(torch.ones(4))
    descent = Descent([weight], TrainConfig(), OneProcess)
    add_gradients(descent, (weight * float("nan")).sum())
    descent.step(0.1)
    assert torch.equal(weight.detach(), torch.ones(4)) and descent.read()["skipped"] == 1
    add_gradients(descent, weight.square().sum())
    descent.step(0.1)
    assert (weight < 1).all() and descent.meters.dtype == torch.float32
    assert not descent.optimizer.defaults["fused"]


@pytest.mark.parametrize("text", ["MPS backend out of memory (MPS allocated: 9 GB)", "HIP error: out of memory"])
def test_memory_that_ends_is_known_on_every_card(text):
    assert devices.ran_out(RuntimeError(text)) and not devices.ran_out(RuntimeError("HIP error: invalid argument"))


def test_the_cache_tells_tf32_apart_and_keeps_the_keys_of_a_cpu(tmp_path):
    source = open_model("toybox")

    def key(kind: str, tf32: bool) -> object:
        config = make_run(tmp_path, tmp_path / "x", train={"tf32": tf32})
        made = training_set._made_with_tf32(config, torch.device(kind))
        (entry,) = training_set._text_entries(config, source, ["a dog"], made)
        return entry.path(tmp_path)

    assert key("cpu", True) == key("cpu", False) == key("cuda", False) != key("cuda", True)


def test_cudnn_chooses_by_no_clock_and_the_caller_finds_its_own_choice_again():
    from diffusekrona_train.common.process import as_found

    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, True
        with as_found():
            setup.set_cuda(tf32=False)
            assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
