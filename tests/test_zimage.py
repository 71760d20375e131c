"""Runs and files of Z-Image on a tiny pipeline: resumed, killed, spread, small in memory, generated with the Turbo."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusekrona_train.adapters.formats import AdapterFile, identify, inject_file, read_adapter, save_adapter
from diffusekrona_train.adapters.formats.exports import EXPORTERS
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig, make_config
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling import SampleRequest, open_call
from diffusekrona_train.sampling.render import render, settings_of
from diffusekrona_train.training import train
from diffusekrona_train.training.check.needs import layers_of
from tests.runs import command, draw_photos, factors, finish, make_run, newest_state, same_factors, start, world_env
from tests.tiny.zimage import make_zimage

EVERY_STATE = {"keep_resume_states": 9, "batch_size": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_zimage(folder / "model")
    make_zimage(folder / "turbo", seed=1)
    shutil.copytree(folder / "model" / "text_encoder", folder / "turbo" / "text_encoder", dirs_exist_ok=True)
    draw_photos(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    return train(make_run(world, tmp_path_factory.mktemp("runs") / "straight", train=EVERY_STATE)).file


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(world, straight, tmp_path):
    state = straight.parent / "resume" / "step-000002"
    again = train(make_run(world, tmp_path / "run", train=EVERY_STATE), resume_from=state)
    assert same_factors(factors(again.file.parent), factors(straight.parent))


@pytest.mark.full
def test_a_killed_run_resumes_bit_for_bit(world, straight, tmp_path):
    config = make_run(world, tmp_path / "run", train=EVERY_STATE)
    child = start(lambda: command(config), tmp_path / "log", KRONA_FAULT="step:3:SIGKILL")
    assert finish(child) == -signal.SIGKILL
    assert newest_state(tmp_path / "run").step == 2
    assert same_factors(factors(train(config, resume=True).file.parent), factors(straight.parent))


@pytest.mark.full
def test_two_processes_are_one_with_twice_the_batch(world, tmp_path):
    settings = {"steps": 4, "learning_rate": 1e-3, "max_grad_norm": 0.1}
    one = factors(train(make_run(world, tmp_path / "one", train={**settings, "batch_size": 2})).file.parent)
    two = make_run(world, tmp_path / "two", train={**settings, "batch_size": 1})
    children = [start(lambda: command(two), tmp_path / f"log{i}", **own) for i, own in enumerate(world_env(2))]
    assert [finish(child) for child in children] == [0, 0]
    other = factors(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=2e-3 * float(value.abs().max()))


@pytest.mark.parametrize(("alias", "shift"), [("z-image", 6.0), ("z-image-turbo", 3.0)])
def test_training_shifts_noise_levels_by_3_whatever_generates(alias, shift):
    source = open_model(alias)
    assert source.scheduler_config["shift"] == shift
    assert float(source.process().quantile(0.5)) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


# ---- memory levels --------------------------------------------------------------------------------------------------


def test_blocks_in_host_memory_train_the_same_factors(world, tmp_path):
    settings = {"steps": 3, "quantize": "fp8", "batch_size": 1}
    levels = ("checkpointing", "offload")
    runs = [train(make_run(world, tmp_path / level, train={**settings, "memory": level})) for level in levels]
    assert same_factors(*(factors(run.file.parent, run.file.stem) for run in runs))


def test_offload_after_nf4_keeps_the_numbers_of_the_base(world, tmp_path):
    settings = {"steps": 2, "batch_size": 1, "learning_rate": 1e-3}
    levels = ("nf4", "offload")
    runs = [train(make_run(world, tmp_path / level, train={**settings, "memory": level})) for level in levels]
    made, other = (factors(run.file.parent, run.file.stem) for run in runs)
    for name, value in made.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=2e-2 * float(value.abs().max()) + 1e-6)


def test_fp16_is_refused_in_one_line(world, tmp_path):
    from diffusekrona_train.training.check import check_config

    config = make_run(world, tmp_path / "run", train={"mixed_precision": "fp16"})
    with pytest.raises(ValueError, match=r"^train.mixed_precision: fp16: .* overflows in it; use bf16"):
        check_config(config)
    with pytest.raises(ValueError, match="--dtype fp16.*use bf16"):
        from diffusekrona_train.sampling.session import Memory, sampling_dtype

        sampling_dtype(open_model(str(world / "model")), Memory(dtype="fp16"), torch.device("cpu"))


# ---- trained on one model, generated with another -------------------------------------------------------------------


def generated(world: Path, config: Any, adapter: Path, prompt: str, seed: int) -> Image.Image:
    """What the Turbo makes with the adapter, assembled by hand."""
    source = open_model(str(world / "turbo"))
    parts = source.load()
    inject_file(parts["denoiser"], read_adapter(adapter))
    pipe = source.family.pipeline(parts)
    return render(pipe, source.family, [(prompt, seed)], settings_of(config))[0]


def test_images_come_from_the_model_that_generates(world, tmp_path):
    more = {"sample": {"model": str(world / "turbo")}, "validation": {"every": 2, "prompts": ["a [V] {class}"]}}
    config = make_run(world, tmp_path / "run", train={"steps": 2, "batch_size": 1}, **more)
    file = train(config).file
    (seen,) = (tmp_path / "run" / "samples" / "step-000002").glob("*.png")
    wanted = generated(world, config, file, "a sks dog", 0)
    apart = torch.tensor(list(Image.open(seen).tobytes())).float() - torch.tensor(list(wanted.tobytes())).float()
    assert apart.abs().max() <= 2
    own = open_model(str(world / "model"))
    parts = own.load()
    inject_file(parts["denoiser"], read_adapter(file))
    base = render(own.family.pipeline(parts), own.family, [("a sks dog", 0)], settings_of(config))[0]
    assert base.tobytes() != wanted.tobytes()

    info = read_adapter(file).info
    assert info["sample_model"].startswith("turbo sha256:") and info["model"].startswith("model sha256:")
    call = open_call(SampleRequest(tmp_path / "run", ["a [V] dog"]), call_progress())
    assert call.model.identity == info["sample_model"]
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="trained on the local model 'turbo"):
        open_call(SampleRequest(alone, ["a [V] dog"]), call_progress())


def call_progress():
    from diffusekrona_train.common.progress import Progress

    return Progress()


def test_steps_and_guidance_are_those_of_the_model_that_generates():
    tree = {"model": "z-image", "subject": {"images": "x", "class": "dog"}, "output": "runs/x"}
    base, turbo = make_config(tree), make_config({**tree, "sample": {"model": "z-image-turbo"}})
    assert (base.validation.steps, base.validation.guidance) == (30, 5.0)
    assert (turbo.validation.steps, turbo.validation.guidance) == (9, 1.0)
    assert turbo.adapter == base.adapter
    chosen = make_config({**tree, "sample": {"model": "z-image-turbo"}, "validation": {"steps": 4}})
    assert chosen.validation.steps == 4


def test_a_model_of_another_family_or_shape_cannot_generate(world, tmp_path):
    from diffusekrona_train.training.setup import check_start
    from tests.tiny import make_pipeline

    other = make_pipeline("sd15", tmp_path / "other")
    config = make_run(world, tmp_path / "run", sample={"model": str(other)})
    with pytest.raises(ValueError, match=r"^sample.model: .* is of family sd, and model of zimage"):
        check_start(config, open_model(config.model))
    config = make_run(world, tmp_path / "run", sample={"model": "toybox-flow"})
    with pytest.raises(ValueError, match=r"^sample.model: 'toybox-flow' has other layers than model"):
        check_start(config, open_model(config.model))


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thin(world, tmp_path_factory):
    """An adapter with a thin pair: (4, 48) on 96 wide layers has rank 4 x 2."""
    adapter = {"a1": 4, "a2": 48, "init_b": "same"}
    return train(make_run(world, tmp_path_factory.mktemp("runs") / "thin", adapter=adapter, train={"steps": 1})).file


def test_a_thin_pair_leaves_as_an_exact_lora_that_diffusers_loads(world, thin, tmp_path):
    from diffusers import ZImagePipeline

    file = read_adapter(thin)
    out = tmp_path / "diffusers.safetensors"
    remarks = EXPORTERS["diffusers"](file, out, dtype="fp32")
    assert remarks[0] == f"exact: rank 8 in {len(file.layers)} layers"
    pipe: Any = ZImagePipeline.from_pretrained(world / "model")
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(out))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    changed = changes(file)
    assert before.keys() == after.keys() and len(changed) == len(layers_of_attention(world))
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        wanted = value + changed[layer] if layer in changed else value
        torch.testing.assert_close(after[name], wanted, rtol=1e-4, atol=1e-6)


def test_a_full_pair_that_is_not_square_is_refused_for_diffusers_with_its_reason(world, tmp_path):
    injection = inject(
        open_model(str(world / "model")).load("denoiser")["denoiser"], AdapterConfig(a1=3, a2=4, init_b="same")
    )
    save_adapter(tmp_path / "own.safetensors", injection, {"model": "x", "token": "sks", "class": "dog"})
    file, out = read_adapter(tmp_path / "own.safetensors"), tmp_path / "diffusers.safetensors"
    with pytest.raises(ValueError, match="exact LoRA rank 72, .* only where A is square, of one size in all layers"):
        EXPORTERS["diffusers"](file, out, dtype="fp32")
    assert not out.exists()
    remarks = EXPORTERS["diffusers"](file, out, dtype="fp32", rank=8)
    assert remarks[0].startswith("cut: rank 8")


def test_a_low_rank_factor_with_an_alpha_keeps_its_strength_in_diffusers(world, tmp_path):
    from diffusers import ZImagePipeline

    pipe: Any = ZImagePipeline.from_pretrained(world / "model")
    spec = AdapterConfig(type="lokr", factor=8, rank=9, ffn=True)
    injection = inject(pipe.transformer, spec)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(std=0.1)
    save_adapter(tmp_path / "own.safetensors", injection, {"model": "x", "token": "sks", "class": "dog"})
    injection.eject()
    theirs = load_file(tmp_path / "own.safetensors")  # as LyCORIS writes it, without our header
    theirs |= {name: torch.tensor(3.0) for name in theirs if name.endswith(".alpha")}
    save_file(theirs, tmp_path / "theirs.safetensors")
    layers = open_model(str(world / "model")).layers()
    file, layer = identify(read_adapter(tmp_path / "theirs.safetensors"), layers, "zimage"), "layers.0.feed_forward.w1"
    w1, w2_a, w2_b = (theirs[f"lycoris_{layer.replace('.', '_')}.lokr_{end}"] for end in ("w1", "w2_a", "w2_b"))
    before = pipe.transformer.get_submodule(layer).weight.detach().clone()
    EXPORTERS["diffusers"](file, tmp_path / "diffusers.safetensors", dtype="fp32")
    pipe.load_lora_weights(str(tmp_path / "diffusers.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    change = torch.kron(w1, w2_a @ w2_b) * (3 / 9)
    torch.testing.assert_close(pipe.transformer.get_submodule(layer).weight - before, change, rtol=1e-4, atol=1e-6)


def changes(file: AdapterFile) -> dict[str, torch.Tensor]:
    """Layer -> its change, by torch.kron of the file's factors."""
    return {name: torch.kron(group["lokr_w1"], group["lokr_w2"]) for name, group in file.groups.items()}


def layers_of_attention(world):
    return [layer for layer in layers_of(open_model(str(world / "model"))) if layer.kind != "ffn"]


def test_the_kohya_lora_reads_back_as_the_same_change(world, thin, tmp_path):
    file, out = read_adapter(thin), tmp_path / "lora.safetensors"
    EXPORTERS["lora"](file, out, dtype="fp32")
    again = read_adapter(out)
    parts = open_model(str(world / "model")).load("denoiser")
    injection = inject_file(parts["denoiser"], again)
    for name, wanted in changes(file).items():
        torch.testing.assert_close(injection.adapters[name].delta(), wanted, rtol=1e-4, atol=1e-6)


FORMS = {
    "lycoris": lambda path: "lycoris_" + path.replace(".", "_"),
    "ai-toolkit": lambda path: f"diffusion_model.{path}",
    "diffusers": lambda path: f"transformer.{path}",
    "bare": lambda path: path,
}
"""Who writes -> how a layer is named there."""


@pytest.mark.parametrize("who", FORMS)
@pytest.mark.parametrize("kind", ["lokr", "lora"])
def test_files_of_other_tools_load(world, tmp_path, who, kind):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors, wanted = {}, {}
    for layer in layers_of_attention(world):
        name = FORMS[who](layer.name)
        if kind == "lokr":
            w1, w2 = torch.randn(4, 4, generator=generator), torch.randn(24, 24, generator=generator)
            tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(1.0)}
            wanted[layer.name] = torch.kron(w1, w2)
        else:
            down, up = torch.randn(2, 96, generator=generator), torch.randn(96, 2, generator=generator)
            a, b = ("lora_A", "lora_B") if who != "lycoris" else ("lora_down", "lora_up")
            tensors |= {f"{name}.{a}.weight": down, f"{name}.{b}.weight": up}
            wanted[layer.name] = up @ down
    save_file(tensors, tmp_path / "other.safetensors")
    parts = open_model(str(world / "model")).load("denoiser")
    injection = inject_file(parts["denoiser"], read_adapter(tmp_path / "other.safetensors"))
    assert injection.adapters.keys() == wanted.keys()
    for name, adapter in injection.adapters.items():
        torch.testing.assert_close(adapter.delta(), wanted[name], rtol=1e-5, atol=1e-6)


def test_what_is_saved_is_named_as_lycoris_names_it(straight):
    names = {key.partition(".")[0] for key in load_file(straight)}
    assert "lycoris_layers_0_attention_to_out_0" in names and all(name.startswith("lycoris_") for name in names)
