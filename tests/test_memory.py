"""What a run does where a GPU's memory ends or fp16 overflows, with the GPU's answers played on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusekrona_train.common.device import pick_dtype, ran_out
from diffusekrona_train.models import open_model
from diffusekrona_train.models.layers import base_parameters, layer_table
from diffusekrona_train.models.quantize import quantize_linears
from diffusekrona_train.models.sdxl import SDXL
from diffusekrona_train.sampling import render
from diffusekrona_train.sampling.session import while_drawing
from diffusekrona_train.training import base, memory, preview, train
from diffusekrona_train.training.graph import add_gradients
from diffusekrona_train.training.loss import Objective
from diffusekrona_train.training.optimizer import OVERFLOWS_IN_A_ROW, Descent
from diffusekrona_train.training.step import FIRST_STEPS
from scripts.bench.contender import Bench
from tests.runs import factors, make_run, make_world, newest_state
from tests.tiny import make_unet

OUT = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("error", OUT.values(), ids=OUT)
def test_memory_that_ends_is_known_whoever_says_it(error):
    assert ran_out(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), ValueError("CUDA out of memory"), KeyError("x")]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not ran_out(error)


@pytest.mark.parametrize("error", OUT.values(), ids=OUT)
def test_drawing_without_memory_says_what_to_take(error):
    told = "^out of device memory while generating. Use --quantize nf4"
    with pytest.raises(RuntimeError, match=told), while_drawing():
        raise error
    with pytest.raises(RuntimeError, match="^mat1 and mat2"), while_drawing():
        raise RuntimeError("mat1 and mat2 shapes")


@pytest.mark.parametrize("who", ["cublas", "driver"])
def test_a_run_goes_a_level_down_for_libraries_too(world, tmp_path, monkeypatch, who):
    straight = factors(train(make_run(world, tmp_path / "a", train={"memory": "checkpointing"})).file.parent)
    batches, failed = Objective.batches, []

    def short(self, step, micro):
        if step == 1 and not failed:
            failed.append(step)
            raise OUT[who]
        return batches(self, step, micro)

    monkeypatch.setattr(Objective, "batches", short)
    stepped = factors(train(make_run(world, tmp_path / "b")).file.parent)
    assert failed and newest_state(tmp_path / "b").about["level"] == "checkpointing"
    for name, tensor in straight.items():  # no step was lost or taken twice
        torch.testing.assert_close(stepped[name], tensor, rtol=1e-4, atol=1e-6)


def test_another_error_in_a_step_is_not_hidden(world, tmp_path, monkeypatch):
    def broken(self, step, micro):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Objective, "batches", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(make_run(world, tmp_path / "run"))


def test_memory_that_ends_in_the_set_up_names_what_to_change(world, tmp_path, monkeypatch):
    def short(*args, **kwargs):
        raise OUT["cublas"]

    monkeypatch.setattr("diffusekrona_train.training.setup.build_training_set", short)
    with pytest.raises(RuntimeError, match="while the run was set up.*vae_precision"):
        train(make_run(world, tmp_path / "run"))


# ---- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (9, 31)])
def test_a_picture_that_does_not_fit_is_decoded_in_tiles(world, shape):
    source = open_model(str(world / "model"))
    vae = source.load("vae")["vae"]
    latents = torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = source.family.decode(vae, latents)
    inner, largest = vae.decoder.forward, []

    def small(z, *args, **kwargs):
        if min(z.shape[-2:]) >= min(shape) and max(z.shape[-2:]) == max(shape):
            raise OUT["torch"]
        largest.append(max(z.shape[-2:]))
        return inner(z, *args, **kwargs)

    vae.decoder.forward = small
    settings = (vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size)
    with torch.no_grad():
        tiled = source.family.decode(vae, latents)
    assert largest and max(largest) <= max(shape) // 2
    assert (vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size) == settings
    assert tiled.shape == whole.shape == (1, 3, 8 * shape[0], 8 * shape[1])
    # group norms see a tile and not the whole, so the pictures are alike and not equal
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.8


def test_tiling_that_is_asked_for_divides_every_picture(world):
    """diffusers' own tiles are as large as the model's pictures, so that asking for them would change nothing."""
    source = open_model(str(world / "model"))
    vae, latents = (source.load("vae")["vae"], torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        whole = source.family.decode(vae, latents)
        vae.enable_tiling()
        tiled = source.family.decode(vae, latents)
    assert vae.use_tiling and not torch.equal(tiled, whole)
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.8


def test_a_picture_that_does_not_fit_in_tiles_either_says_so(world):
    source = open_model(str(world / "model"))
    vae = source.load("vae")["vae"]

    def never(*args, **kwargs):
        raise OUT["torch"]

    vae.decoder.forward = never
    with pytest.raises(torch.OutOfMemoryError):
        source.family.decode(vae, torch.zeros(1, 4, 16, 16))
    assert not vae.use_tiling


# ---- fp16 with gradient scaling ------------------------------------------------------------------------------------


class Scaled:
    """accelerate's part of a step in fp16, with torch's own scaler."""

    num_processes = 1

    def __init__(self, scale: float):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)  # type: ignore[attr-defined]

    def backward(self, loss):
        self.scaler.scale(loss).backward()


def half_factors() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) / 4) for shape in ((4, 5), (5, 3))]


def half_loss(factors):
    """A product in fp16 of fp32 factors, as in an adapter on an fp16 base."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).half()
    return ((x @ factors[0].half()) @ factors[1].half()).float().square().mean()


def test_scaled_steps_are_the_unscaled_ones(world, tmp_path):
    settings = make_run(world, tmp_path / "x", train={"max_grad_norm": 0.1}).train
    mine, theirs = half_factors(), half_factors()
    descent = Descent(mine, settings, Scaled(256.0))
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=settings.weight_decay)
    for _ in range(6):
        add_gradients(descent, half_loss(mine))
        descent.step(1e-2)
        reference.zero_grad()
        half_loss(theirs).backward()
        torch.nn.utils.clip_grad_norm_(theirs, 0.1)
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
    assert descent.accelerator.scaler.get_scale() == 512.0  # grew once in its interval of four


def test_an_overflow_halves_the_scale_and_moves_nothing(world, tmp_path):
    settings = make_run(world, tmp_path / "x").train
    masters = half_factors()
    descent = Descent(masters, settings, Scaled(2.0**40))
    before = [parameter.detach().clone() for parameter in masters]
    scales = []
    for _ in range(3):
        add_gradients(descent, half_loss(masters))
        descent.step(1e-2)
        scales.append(descent.accelerator.scaler.get_scale())
        assert all(torch.equal(a, b) for a, b in zip(masters, before, strict=True))
        assert not descent.flat.any()
    assert scales == [2.0**39, 2.0**38, 2.0**37]
    read = descent.read()
    assert read["skipped"] == 3 and read["worst"] == pytest.approx(3 * 3 / OVERFLOWS_IN_A_ROW)
    for _ in range(40):
        add_gradients(descent, half_loss(masters))
        descent.step(1e-2)
    assert not torch.equal(masters[0], before[0]) and all(p.isfinite().all() for p in masters)


# ---- validation in batches ------------------------------------------------------------------------------------------


def test_validation_takes_as_many_images_as_fit(tmp_path, monkeypatch):
    config = make_run(tmp_path, tmp_path / "x", data={"resolution": 1024})
    for free, wanted in ((80, 8), (16, 4), (9, 1), (2, 1)):  # (free - 1 - 3.5) GiB / (2 rows of 1.2 GiB)
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free * memory.GIB)
        for device, count in (("cuda", wanted), ("cpu", 1)):
            found = memory.images_at_once(config, torch.bfloat16, torch.device(device), SDXL().memory)
            assert found == count, (free, device)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert memory.images_at_once(config, torch.bfloat16, torch.device("xpu"), SDXL().memory) == 1


def images_of(folder):
    files = sorted(folder.rglob("samples/**/*.png"))
    return {file.name: torch.from_numpy(numpy.array(Image.open(file)).astype(int)) for file in files}


@pytest.mark.parametrize("runs_out", [False, True])
def test_images_in_a_batch_are_the_same_images(world, tmp_path, monkeypatch, runs_out):
    watch = {"every": 1, "prompts": ["A [V] {class}", "[V]"], "seeds": [0, 5]}
    config = make_run(world, tmp_path / "a" / "run", train={"steps": 1}, validation=watch)
    single = images_of(train(config).file.parent)
    sizes, draw = [], render.draw_latents

    def noted(pipe, family, jobs, *rest):
        sizes.append(len(jobs))
        if runs_out and len(jobs) > 1:
            raise OUT["torch"]
        return draw(pipe, family, jobs, *rest)

    monkeypatch.setattr(render, "draw_latents", noted)
    monkeypatch.setattr(preview, "images_at_once", lambda *_: 3)
    config = make_run(world, tmp_path / "b" / "run", train={"steps": 1}, validation=watch)
    batched = images_of(train(config).file.parent)
    assert sizes == ([3, 1, 1, 1, 1] if runs_out else [3, 1]) * 2  # before the first step, and after it
    assert len(single) == 4 and single.keys() == batched.keys()
    assert all((single[name] - batched[name]).abs().max() <= 2 for name in single)


def test_the_held_out_loss_is_the_same_in_larger_batches():
    torch.manual_seed(0)
    objective = Bench(make_unet("sdxl").requires_grad_(False), 64, 2).contender({"a1": 4, "a2": 4}).objective
    calls: list[int] = []
    objective.denoiser.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    apart, together = objective.held_out_loss(), objective.held_out_loss(16)
    assert calls == [2] * 10 + [16, 4]
    assert together == pytest.approx(apart, rel=1e-5)


def test_files_of_a_run_that_stepped_down_are_whole(world, tmp_path, monkeypatch):
    batches, failed = Objective.batches, []

    def short(self, step, micro):
        if len(failed) < 2:
            failed.append(step)
            raise OUT["torch"]
        return batches(self, step, micro)

    monkeypatch.setattr(Objective, "batches", short)
    path = train(make_run(world, tmp_path / "run", train={"channels_last": True})).file
    assert newest_state(tmp_path / "run").about["level"] == "nf4"
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())


# ---- nothing large stays behind, and what is estimated is counted --------------------------------------------------


def noted_denoisers(monkeypatch, module, name):
    """Weak references to the UNets that are made, and whether an older one lived when another was asked for."""
    made, alive = [], []
    load = getattr(module, name)

    def noting(*args, **kwargs):
        alive.append([reference() is not None for reference in made])
        result = load(*args, **kwargs)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(module, name, noting)
    return made, alive


def test_stepping_down_lets_the_16_bit_model_go_before_the_other_comes(world, tmp_path, monkeypatch):
    _, alive = noted_denoisers(monkeypatch, base, "load_denoiser")
    batches, failed = Objective.batches, []

    def short(self, step, micro):
        if len(failed) < 2:
            failed.append(step)
            raise OUT["torch"]
        return batches(self, step, micro)

    monkeypatch.setattr(Objective, "batches", short)
    train(make_run(world, tmp_path / "run"))
    assert newest_state(tmp_path / "run").about["level"] == "nf4"
    assert alive == [[], [False]]


def test_keep_best_lets_the_trained_model_go_first(world, tmp_path, monkeypatch):
    made, _ = noted_denoisers(monkeypatch, base, "load_denoiser")
    seen = []
    monkeypatch.setattr("diffusekrona_train.evaluation.best_checkpoint", lambda *_, **__: seen.append(made[0]()))
    train(make_run(world, tmp_path / "run", train={"keep_best": True}))
    assert seen == [None]


def test_text_encoders_are_gone_when_their_texts_are_there(world, monkeypatch):
    from diffusekrona_train.sampling import session

    source, kept = open_model(str(world / "model")), []
    load = source._load_text_encoders

    def noted(*given):
        encoders = load(*given)
        kept.extend(weakref.ref(encoder) for encoder in encoders)
        return encoders

    alive: list[bool] = []
    monkeypatch.setattr(source, "_load_text_encoders", noted)
    monkeypatch.setattr(session, "free", lambda: alive.append(any(reference() for reference in kept)))
    session.encode_texts(source, ["a dog"], torch.device("cpu"))
    assert len(kept) == 2 and alive == [False]  # dead already when the cached blocks are given back


def test_one_process_goes_down_at_any_step(world, tmp_path, monkeypatch):
    batches, failed = Objective.batches, []

    def short(self, step, micro):
        if step == FIRST_STEPS + 1 and not failed:
            failed.append(step)
            raise OUT["torch"]
        return batches(self, step, micro)

    monkeypatch.setattr(Objective, "batches", short)
    train(make_run(world, tmp_path / "run", train={"steps": FIRST_STEPS + 2}))
    assert newest_state(tmp_path / "run").about["level"] == "checkpointing"


def test_checkpointing_leaves_the_generator_alone(monkeypatch):
    from torch.utils import checkpoint

    unet = make_unet("sd15").requires_grad_(False)
    base.enable_checkpointing(unet)
    asked = []
    get = checkpoint.torch.get_rng_state
    monkeypatch.setattr(checkpoint.torch, "get_rng_state", lambda: asked.append(1) or get())
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    unet(x, 1, torch.randn(1, 7, unet.config.cross_attention_dim)).sample.sum().backward()
    assert x.grad is not None and not asked


def sized(world, tmp_path, adapter, **section):
    return make_run(world, tmp_path / "x", adapter=adapter, train=section)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_estimate_is_weights_activations_and_a_gibibyte_of_reserve(checkpointing):
    """By hand, SDXL in bf16: 2.567 billion numbers of 2 bytes are 4.78 GiB; a step at 1024 x 1024 takes its figure."""
    figures = SDXL().memory
    step = figures.checkpointing if checkpointing else figures.plain
    found = memory.estimate(memory.Level("", "none", checkpointing), 2_567_463_684, 1.0, torch.bfloat16, figures)
    assert found == pytest.approx(4.782 + step + 1.0, abs=0.001)


def test_estimates_count_what_is_trained_and_what_int8_keeps(world, tmp_path):
    layers, base = layer_table("sdxl"), base_parameters("sdxl")
    full = {"type": "full", "targets": ["q", "k", "v", "o"]}
    linears = [layer for layer in layers if layer.kind != "ffn"]
    wanted = sum(layer.in_features * layer.out_features for layer in linears)
    config = sized(world, tmp_path, full)
    assert memory.trained_parameters(config, layers, base) == wanted == pytest.approx(955e6, rel=0.01)
    assert memory.trained_parameters(sized(world, tmp_path, {"type": "full", "targets": "all"}), layers, base) == base
    assert memory.trained_parameters(sized(world, tmp_path, {"a1": 4, "a2": 64}), layers, base) < 1e7
    assert (
        memory.trained_bytes(config),
        memory.trained_bytes(sized(world, tmp_path, full, optimizer="adamw8bit")),
    ) == (16, 10)
    figures = SDXL().memory
    assert figures.plain > 5.3 and figures.checkpointing > 0.56  # what was counted
    levels = [memory.Level("", kind, True) for kind in ("int8", "nf4")]
    int8, nf4 = (memory.estimate(level, base, 1.0, torch.bfloat16, figures) for level in levels)
    assert int8 - nf4 > figures.plain - figures.checkpointing


def test_the_level_of_full_fine_tuning_counts_its_moments(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * memory.GIB, 24 * memory.GIB))
    config = sized(world, tmp_path, {"type": "full", "targets": ["q"]})
    given = (config, base_parameters("sdxl"), 1, torch.bfloat16, torch.device("cuda"), SDXL().memory)
    assert memory.choose(*given)[0].name == "plain"
    assert memory.choose(*given, trained=400_000_000)[0].name == "checkpointing"


def test_eight_bit_linears_look_for_no_outliers():
    linear = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantize_linears(linear, "int8", torch.bfloat16, lambda name: True)
    assert linear[0].state.threshold == 0.0  # type: ignore[union-attr]


def test_pictures_are_made_in_fp16_on_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert pick_dtype("bf16", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("dtype, most", [(torch.float16, 0.1), (torch.bfloat16, 1.0)])
def test_a_small_adapter_survives_fusing_in_fp16_alone(dtype, most):
    """Why: with |ΔW| = 0.4 % of |W|, bf16 loses a third of what fusing adds."""
    generator = torch.Generator().manual_seed(0)
    weight, delta = (torch.randn(256, 256, generator=generator) * size for size in (0.05, 0.05 * 0.004))
    weight = weight.to(dtype)
    lost = ((weight.float() + delta).to(dtype).float() - weight.float() - delta).norm() / delta.norm()
    assert (lost < 0.1) == (dtype == torch.float16) and lost < most


def test_commands_ask_for_segments_that_grow():
    code = "import diffusekrona_train.cli, os, sys; print(os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules)"
    clean = {key: value for key, value in os.environ.items() if key != "PYTORCH_ALLOC_CONF"}
    said = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["expandable_segments:True", "False"]
