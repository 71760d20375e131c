"""Model files as other programs leave them: read exactly, or refused with the tensor, the field or the file named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusekrona_train.models import open_model
from diffusekrona_train.models.original import original_tensors
from diffusekrona_train.models.schedulers import check_ddpm
from tests.tiny import make_pipeline
from tests.tiny.original_layout import clip_names, open_clip_names, unet_names, vae_names, write_checkpoint

KINDS = ("sd15", "sd21", "sdxl")
LAYER = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
CLIP = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind -> (folder, checkpoint file, loaded parts)."""
    root, made = tmp_path_factory.mktemp("files"), {}
    for kind in KINDS:
        folder = make_pipeline(kind, root / kind)
        parts = open_model(str(folder)).load()
        made[kind] = folder, write_checkpoint(kind, parts, root / f"{kind}.safetensors"), parts
    return made


def edited(models, kind: str, path: Path, edit: Callable[[dict], object], metadata=None) -> Path:
    tensors = load_file(models[kind][1])
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def opened(models, kind: str, path: Path, **more):
    return open_model(str(path), model_config_dir=str(models[kind][0]), **more)


def states(parts) -> list[dict]:
    return [module.state_dict() for module in (parts["denoiser"], parts["vae"], *parts["text_encoders"])]


def assert_same_model(source, parts):
    for ours, theirs in zip(states(source.load()), states(parts), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refused(source, match: str):
    """By --check, which loads nothing, and by a load."""
    for attempt in (source.check, source.load):
        with pytest.raises(ValueError, match=match) as caught:
            attempt()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def scale_all(tensors: dict, style: str) -> dict[str, torch.Tensor]:
    """Makes every linear weight fp8 with a scale; returns what each of them means, by name."""
    means = {}
    for key in [
        key for key in tensors if key.endswith(".weight") and tensors[key].ndim == 2 and "embedding" not in key
    ]:
        stem, weight = key.removesuffix(".weight"), tensors[key]
        rows = (weight.shape[0], 1) if style == "rows" else (1,) if style == "newer" else ()
        scale = torch.rand(rows) * 0.01 + 0.001
        if style == "blocks":
            scale = torch.rand(2, 2) * 0.01 + 0.001
        stored = (weight / scale.max()).clamp(-440, 440).to(FP8)
        names = {"older": ("scale_weight", "scale_input")}.get(style, ("weight_scale", "input_scale"))
        tensors |= {key: stored, f"{stem}.{names[0]}": scale, f"{stem}.{names[1]}": torch.tensor(3.0)}
        if style == "newer":
            about = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{stem}.comfy_quant"] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        if style == "blocks":
            h, w = (size // 2 for size in weight.shape)
            scale = torch.cat([torch.cat([one.expand(h, w) for one in row], 1) for row in scale])
        means[key] = stored.float() * scale
    if style == "older":
        tensors["scaled_fp8"] = torch.zeros(2).to(FP8)
        tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(0).to(FP8)
    return means


@pytest.mark.parametrize("style", ["older", "newer", "rows", "blocks"])
def test_scaled_fp8_weights_are_multiplied(models, tmp_path, style):
    means: dict[str, torch.Tensor] = {}
    path = edited(models, "sdxl", tmp_path / "fp8.safetensors", lambda t: means.update(scale_all(t, style)))
    source = opened(models, "sdxl", path)
    source.check()
    parts = source.load()
    expected = load_file(models["sdxl"][1]) | means
    got = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_names(parts["denoiser"]).items()}
    got |= clip_names(parts["text_encoders"][0], "conditioner.embedders.0.transformer.")
    assert LAYER + ".weight" in means and CLIP + ".weight" in means
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_plain_fp8_is_cast(models, tmp_path):
    def cast(tensors):
        tensors.update({name: tensor.to(FP8) for name, tensor in tensors.items() if tensor.is_floating_point()})

    parts = opened(models, "sd15", edited(models, "sd15", tmp_path / "a.safetensors", cast)).load()
    weight = parts["denoiser"].conv_in.weight
    assert torch.equal(weight, models["sd15"][2]["denoiser"].conv_in.weight.to(FP8).float())


UNREADABLE = {
    "nvfp4": lambda t: t.update({f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}')).byte()}),
    "without a scale": lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].to(torch.int8)}),
    "absmax has an unknown quantised format": lambda t: t.update(
        {f"{LAYER}.weight": t[f"{LAYER}.weight"].to(torch.uint8), f"{LAYER}.weight.absmax": torch.ones(4)}
    ),
    "U8 with a scale": lambda t: t.update(
        {f"{LAYER}.weight": t[f"{LAYER}.weight"].to(torch.uint8), f"{LAYER}.weight_scale": torch.ones(())}
    ),
    "does not fit a weight": lambda t: t.update({f"{LAYER}.scale_weight": torch.ones(7)}),
}  # fmt: skip


@pytest.mark.parametrize("words", UNREADABLE)
def test_other_quantised_formats_are_refused(models, tmp_path, words):
    path = edited(models, "sdxl", tmp_path / "q.safetensors", UNREADABLE[words])
    with pytest.raises(ValueError, match=words) as caught:
        opened(models, "sdxl", path).load()
    assert LAYER in str(caught.value) or words == "does not fit a weight"


def test_formats_in_the_header_are_read_too(models, tmp_path):
    note = json.dumps({"format_version": "1.0", "layers": {LAYER: {"format": "mxfp8"}}})
    path = edited(models, "sdxl", tmp_path / "q.safetensors", lambda t: None, {"_quantization_metadata": note})
    with pytest.raises(ValueError, match=f"{LAYER} is quantised as mxfp8"):
        opened(models, "sdxl", path)


# ---- what is missing -------------------------------------------------------------------------------------------------

PARTS = {
    "second text encoder": ("sdxl", "conditioner.embedders.1.model.text_projection"),
    "text encoder": ("sd21", "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias"),
    "VAE": ("sd15", "first_stage_model.encoder.down.1.block.0.conv1.weight"),
    "denoiser": ("sd15", "model.diffusion_model.time_embed.2.bias"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_file_that_lacks_a_tensor_names_it(models, tmp_path, part):
    kind, name = PARTS[part]
    path = edited(models, kind, tmp_path / "a.safetensors", lambda tensors: tensors.pop(name))
    refused(opened(models, kind, path), rf"'a.safetensors' lacks 1 tensor \({name}\) of its {part}")


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("first_stage_model.encoder.", "VAE"), ("model.diffusion_model.output_blocks.4.", "denoiser")],
)
def test_a_file_that_lacks_a_block_names_it(models, tmp_path, prefix, part):
    def without(tensors):
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    path = edited(models, "sdxl", tmp_path / "a.safetensors", without)
    refused(opened(models, "sdxl", path), rf"lacks \d+ tensors \({prefix}.*more\) of its {part}")


def test_a_tensor_of_another_shape_is_named(models, tmp_path):
    path = edited(
        models, "sdxl", tmp_path / "a.safetensors", lambda t: t.update({LAYER + ".weight": torch.zeros(3, 3)})
    )
    refused(opened(models, "sdxl", path), rf"{LAYER}.weight has shape \(3, 3\)")


def test_a_folder_without_a_block_is_refused_before_it_is_loaded(models, tmp_path):
    shutil.copytree(models["sd15"][0], tmp_path / "model")
    file = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("mid_block.")}
    save_file(kept, file, {"format": "pt"})
    refused(open_model(str(tmp_path / "model")), r"part unet lacks \d+ tensors \(mid_block.*more\)")


def test_older_names_in_folders_are_not_taken_for_missing(models, tmp_path):
    """VAEs on the hub name their attention query, key, value; text encoders have the prefix text_model."""
    shutil.copytree(models["sdxl"][0], tmp_path / "model")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    for ours, theirs in old.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    file = next((tmp_path / "model" / "text_encoder").glob("*.safetensors"))
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    source = open_model(str(tmp_path / "model"))
    source.check()
    assert_same_model(source, models["sdxl"][2])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_that_lacks_a_tensor_names_it(models, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(models["sdxl"][0], folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[3]
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"part {part}.* lacks 1 tensor \(.*{name.split('.')[-1]}"):
        open_model(str(folder)).load()


def test_a_vae_file_without_its_encoder_is_refused(models, tmp_path):
    names = vae_names(models["sdxl"][2]["vae"])
    save_file({name: tensor.contiguous() for name, tensor in names.items()}, tmp_path / "whole.safetensors")
    half = {name: tensor.contiguous() for name, tensor in names.items() if not name.startswith("encoder.")}
    save_file(half, tmp_path / "half.sft")
    source = open_model(str(models["sdxl"][0]), vae=str(tmp_path / "half.sft"))
    with pytest.raises(ValueError, match=r"'half.sft' lacks \d+ tensors \(encoder"):
        source.load("vae")
    open_model(str(models["sdxl"][0]), vae=str(tmp_path / "whole.safetensors")).load("vae")


def test_a_file_without_a_vae_is_read_where_another_is_given(models, tmp_path):
    def without(tensors):
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    path = edited(models, "sd15", tmp_path / "a.safetensors", without)
    with pytest.raises(ValueError, match="holds no VAE .give one with vae"):
        opened(models, "sd15", path)
    source = opened(models, "sd15", path, vae=str(models["sd15"][0]))
    source.check()
    assert_same_model(source, models["sd15"][2])


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_base_with_nan_is_named_when_it_is_loaded(models, tmp_path, part, value):
    folder = tmp_path / "model"
    shutil.copytree(models["sd15"][0], folder)
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"part {part}: tensor \S*{name.split('.')[-2]}\S* holds NaN or infinity"):
        open_model(str(folder)).load()


def test_numbers_too_large_for_fp16_are_named(models, tmp_path):
    path = edited(models, "sd15", tmp_path / "a.safetensors", lambda t: t[LAYER + ".weight"].fill_(1e5))
    opened(models, "sd15", path).load("denoiser")
    with pytest.raises(ValueError, match="attn1.to_q.weight holds NaN or infinity in float16"):
        opened(models, "sd15", path).load("denoiser", dtype=torch.float16)


# ---- bases for other tasks and of other processes --------------------------------------------------------------------


def with_config(models, folder: Path, part: str, **change) -> str:
    shutil.copytree(models["sd15"][0], folder)
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 9}, "takes 9 input channels and gives 4 .inpainting"),
        ({"in_channels": 8}, "takes 8 input channels and gives 4 .editing"),
        ({"in_channels": 5}, "takes 5 input channels"),
        ({"out_channels": 8}, "takes 4 input channels and gives 8"),
        ({"class_embed_type": "projection"}, "class_embed_type: 'projection'"),
        ({"num_class_embeds": 1000}, "num_class_embeds: 1000"),
        ({"attention_type": "gated"}, "attention_type: 'gated'"),
    ],
)
def test_bases_for_other_tasks_are_refused_by_folder(models, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        open_model(with_config(models, tmp_path / "other", "unet", **change))


@pytest.mark.parametrize("change", [{"in_channels": 16, "out_channels": 16}, {}])
def test_a_denoiser_and_a_vae_of_different_models_are_refused(models, tmp_path, change):
    part, change = ("unet", change) if change else ("vae", {"latent_channels": 16})
    source = open_model(with_config(models, tmp_path / "other", part, **change))
    with pytest.raises(ValueError, match=r"takes (4|16) input channels and its VAE gives (4|16)"):
        source.check()


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "CMStochasticIterativeScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"prediction_type": "flow_prediction"},
    ],
)
def test_a_scheduler_of_another_process_is_refused(models, tmp_path, config):
    source = open_model(with_config(models, tmp_path / "flow", "scheduler", **config))
    refused(source, "not of the diffusion process|is not one of epsilon")


def test_the_samplers_that_are_accepted_are_those_with_a_table_of_betas():
    """Of diffusers' own list of what pipelines of this kind may exchange: those that hold alphas_cumprod, no other."""
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    need_more = ("DPMSolverSDEScheduler", "LMSDiscreteScheduler")  # torchsde, scipy
    names = [member.name for member in KarrasDiffusionSchedulers if member.name not in need_more]
    for name in [
        *names,
        "LCMScheduler",
        "TCDScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "EDMDPMSolverMultistepScheduler",
    ]:
        if hasattr(getattr(diffusers, name)(), "alphas_cumprod"):
            check_ddpm({"_class_name": name})
        else:
            with pytest.raises(ValueError, match=name):
                check_ddpm({"_class_name": name})


def test_the_check_of_the_command_line_refuses_them(models, tmp_path, capsys):
    from PIL import Image

    from diffusekrona_train.config import make_config
    from diffusekrona_train.training.check import check_config

    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    model = with_config(models, tmp_path / "flow", "scheduler", _class_name="FlowMatchEulerDiscreteScheduler")
    subject = {"images": str(tmp_path), "class": "dog"}
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        check_config(make_config({"model": model, "subject": subject, "output": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_old_text_encoder_names_are_read(models, tmp_path, kind):
    def old(tensors):
        for name in [name for name in tensors if ".transformer.text_model." in name]:
            tensors[name.replace("text_model.", "", 1)] = tensors.pop(name)

    source = opened(models, kind, edited(models, kind, tmp_path / "a.safetensors", old))
    source.check()
    assert_same_model(source, models[kind][2])


def test_a_projection_kept_as_a_linear_layer_is_read(models, tmp_path):
    def linear(tensors):
        name = "conditioner.embedders.1.model.text_projection"
        tensors[f"{name}.weight"] = tensors.pop(name).T

    source = opened(models, "sdxl", edited(models, "sdxl", tmp_path / "a.safetensors", linear))
    assert_same_model(source, models["sdxl"][2])


@pytest.mark.parametrize("name", ["a.sft", "a.SAFETENSORS", "A.SafeTensors", "a.bak", "a"])
def test_a_file_is_known_by_its_header(models, tmp_path, name):
    shutil.copy(models["sd15"][1], tmp_path / name)
    assert_same_model(opened(models, "sd15", tmp_path / name), models["sd15"][2])


@pytest.mark.parametrize("name", ["nowhere.sft", "nowhere.SAFETENSORS", "nowhere.CKPT"])
def test_a_missing_file_is_told_from_a_hub_name(name):
    with pytest.raises(ValueError, match="no such file or folder"):
        open_model(name)


def test_the_prediction_type_can_be_said(models):
    for path in models["sd15"][:2]:
        source = opened(models, "sd15", path, prediction_type="v_prediction")
        assert source.prediction_type == "v_prediction"
        assert source.load("scheduler")["scheduler"].config.prediction_type == "v_prediction"
        assert opened(models, "sd15", path).prediction_type == "epsilon"
    with pytest.raises(ValueError, match="'velocity' is not one of epsilon"):
        opened(models, "sd15", models["sd15"][0], prediction_type="velocity").check()


# ---- and back: the names of the original releases --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_names_are_those_that_the_releases_have(models, kind):
    folder, file, parts = models[kind]
    source, family = open_model(str(folder)), "sdxl" if kind == "sdxl" else "sd"
    named = {}
    modules = {"unet": parts["denoiser"], "vae": parts["vae"], "text_encoder": parts["text_encoders"][0]}
    if kind == "sdxl":
        modules["text_encoder_2"] = parts["text_encoders"][1]
    for part, module in modules.items():
        named |= original_tensors(part, family, module.state_dict(), source.place.config(part), kind == "sd21")
    with safe_open(file, "pt") as stored:
        names = {name for name in stored.keys() if not name.endswith("position_ids")}  # noqa: SIM118
        assert named.keys() == names
        assert all(torch.equal(named[name], stored.get_tensor(name)) for name in names)


def test_open_clip_names_are_those_of_the_layout(models):
    encoder = models["sdxl"][2]["text_encoders"][1]
    assert (
        original_tensors("text_encoder_2", "sdxl", encoder.state_dict(), {}).keys()
        == open_clip_names(encoder, "conditioner.embedders.1.model.").keys()
    )
