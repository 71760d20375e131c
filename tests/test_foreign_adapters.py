"""Adapters that other tools wrote: as strong as their own loaders make them, or refused with the true reason."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffusekrona_train.adapters.formats import (
    identify,
    inject_file,
    load_adapter,
    merge,
    read_adapter,
    set_scale,
    unload,
    write_adapter,
)
from diffusekrona_train.cli.convert import app
from diffusekrona_train.models import layers as tables
from diffusekrona_train.models.layers import find_layers, find_projections, projections_of
from tests.test_weights import INPUTS, assert_close, predict
from tests.tiny import make_pipeline, make_unet

KINDS = ("sd15", "sd21", "sdxl")
FAMILIES = {"sd15": "sd", "sd21": "sd", "sdxl": "sdxl"}


@pytest.fixture(scope="module")
def originals():
    torch.manual_seed(0)
    return {kind: make_unet(kind).requires_grad_(False) for kind in INPUTS}


@pytest.fixture
def unets(originals):
    return copy.deepcopy(originals)


def randomise(unet, marks=("lora_", "lokr_", "hada_")):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if any(mark in name for mark in marks):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def ours(original, kind: str, path: Path):
    unet = copy.deepcopy(original)
    load_adapter(unet, path)
    return predict(unet, kind)


# ---- PEFT and diffusers say the scale in a JSON ----------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "alpha twice the rank": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"attn1.to_q": 2, "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": 3},
        "alpha_pattern": {"attn1.to_q": 8, r".*to_out\.0": 1},
    },
    "rank-stabilised patterns": {"r": 2, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {"to_k": 5}},
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in"]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_that_diffusers_saved_has_its_own_strength(originals, unets, tmp_path, kind, name):
    from peft import LoraConfig

    unet = unets[kind]
    unet.add_adapter(LoraConfig(target_modules=TARGETS, **SETTINGS[name]))
    randomise(unet)
    expected = predict(unet, kind)
    unet.save_lora_adapter(tmp_path)
    assert_close(ours(originals[kind], kind, tmp_path / "pytorch_lora_weights.safetensors"), expected)


def test_a_lora_of_a_whole_pipeline_has_its_own_strength(tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = make_pipeline("sdxl", tmp_path / "base")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    base, unet = copy.deepcopy(pipe.unet), pipe.unet
    unet.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], use_rslora=True))
    randomise(unet)
    about = unet.peft_config["default"].to_dict()
    about["target_modules"] = list(about["target_modules"])
    state: dict[str, Any] = get_peft_model_state_dict(unet)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata={key: about[key] for key in about if about[key]}
    )
    path, out = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors"
    assert_close(ours(base, "sdxl", path), predict(unet, "sdxl"))
    result = CliRunner().invoke(app, [str(path), str(out), "--to", "lora", "--model", str(folder)])
    assert result.exit_code == 0 and "exact: rank 4" in result.output, result.output
    fresh = StableDiffusionXLPipeline.from_pretrained(folder)
    fresh.load_lora_weights(str(out))
    assert_close(predict(fresh.unet, "sdxl"), predict(unet, "sdxl"))


@pytest.mark.parametrize("kind", ["lora", "lokr", "lokr full", "loha"])
def test_what_peft_saved_has_its_own_strength(originals, unets, tmp_path, kind):
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    config = {
        "lora": lambda: LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 3}),
        "lokr": lambda: LoKrConfig(r=2, alpha=6, target_modules=["to_q"]),
        "lokr full": lambda: LoKrConfig(r=64, alpha=16, target_modules=["to_q"]),
        "loha": lambda: LoHaConfig(r=2, alpha=6, target_modules=["to_q"]),
    }[kind]()
    model = get_peft_model(unets["sd15"], config)
    randomise(model)
    expected = predict(model.base_model.model, "sd15")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    assert_close(ours(originals["sd15"], "sd15", path), expected)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: is a PEFT file; .*adapter_config.json"):
        read_adapter(path)


def peft_file(path: Path, about: Any, more: dict[str, torch.Tensor] | None = None) -> Path:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(4, 64), f"{name}.lora_B.weight": torch.randn(64, 4), **(more or {})}
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": text})
    return path


def test_an_alpha_in_the_file_wins_over_the_settings(unets, tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    about = {"unet.r": 4, "unet.lora_alpha": 8}
    said, own = peft_file(tmp_path / "a.safetensors", about), tmp_path / "b.safetensors"
    peft_file(own, about, {f"{name}.alpha": torch.tensor(2.0)})
    layers = find_layers(unets["sd15"], None)
    assert [
        next(iter(identify(read_adapter(path), layers, "sd").options.values()))["alpha"] for path in (said, own)
    ] == [8, 2]


REFUSED = {
    "is a DoRA": {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_dora": True},
    "as pissa_niter_4, which changes the base": {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"},
    "was initialised as olora": {"r": 4, "lora_alpha": 4, "init_lora_weights": "olora"},
    "has lora_bias: True": {"unet.r": 4, "unet.lora_alpha": 4, "unet.lora_bias": True},
    "have no lora_alpha|have no alpha": {"unet.r": 4},
    "are not JSON": "{",
    "are not a JSON object": "[1]",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_a_lora_cannot_say_are_refused(tmp_path, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_adapter(peft_file(tmp_path / "a.safetensors", REFUSED[words]))
    assert "\n" not in str(caught.value) and str(tmp_path / "a.safetensors") in str(caught.value)


# ---- kohya's LoRA: proj_in and proj_out ------------------------------------------------------------------------------


def kohya(unet, kind: str, path: Path, *, diffusers_names: bool = False, more: dict | None = None) -> Path:
    """What kohya's networks.lora saves for this UNet: all layers of Transformer2DModel, alpha half the rank."""
    generator, state = torch.Generator().manual_seed(5), dict(more or {})
    for layer in [*find_layers(unet, None), *find_projections(unet)]:
        family = "sd" if diffusers_names else FAMILIES[kind]
        name, tail = tables.file_name(family, layer.name), unet.get_submodule(layer.name).weight.shape[2:]
        state |= {
            f"{name}.lora_down.weight": torch.randn(4, layer.in_features, *tail, generator=generator) * 0.2,
            f"{name}.lora_up.weight": torch.randn(layer.out_features, 4, *tail, generator=generator) * 0.2,
            f"{name}.alpha": torch.tensor(2.0),
        }
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: make_pipeline(kind, folder / kind) for kind in KINDS}


def load(folder) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.unet.requires_grad_(False)
    return pipe


def test_the_projections_of_a_list_of_layers_are_those_of_the_model(originals):
    for kind, unet in originals.items():
        found = find_projections(unet)
        assert found and {layer.name: layer for layer in found} == {
            layer.name: layer for layer in projections_of(find_layers(unet, None))
        }, kind


@pytest.mark.parametrize(("kind", "by_path"), [("sd15", False), ("sd21", False), ("sdxl", False), ("sdxl", True)])
def test_kohyas_projections_are_read_whole(pipelines, tmp_path, kind, by_path):
    """diffusers' own loader on the same file is the measure; off, on, off again, fused and merged."""
    path = kohya(load(pipelines[kind]).unet, kind, tmp_path / "a.safetensors", diffusers_names=by_path)
    theirs, pipe = load(pipelines[kind]), load(pipelines[kind])
    theirs.load_lora_weights(str(path))
    expected, base = predict(theirs.unet, kind), predict(pipe.unet, kind)
    injection = load_adapter(pipe, path)
    assert any(name.endswith("proj_out") for name in injection.adapters)
    assert_close(predict(pipe.unet, kind), expected)
    set_scale(pipe, 0.0)
    assert torch.equal(predict(pipe.unet, kind), base)
    set_scale(pipe, 1.0)
    injection.fuse()
    assert_close(predict(pipe.unet, kind), expected)
    injection.unfuse()
    unload(pipe)
    assert torch.equal(predict(pipe.unet, kind), base)
    merge(pipe.unet, identify(read_adapter(path), find_layers(pipe.unet, None), FAMILIES[kind]))
    assert_close(predict(pipe.unet, kind), expected)


@pytest.mark.parametrize("to", ["native", "lora", "diffusers", "merged"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_projections_go_through_every_format(pipelines, tmp_path, kind, to):
    pipe = load(pipelines[kind])
    path = kohya(pipe.unet, kind, tmp_path / "a.safetensors")
    pipe.load_lora_weights(str(path))
    expected, out = predict(pipe.unet, kind), tmp_path / ("out" if to == "merged" else "out.safetensors")
    result = CliRunner().invoke(app, [str(path), str(out), "--to", to, "--model", str(pipelines[kind])])
    assert result.exit_code == 0, result.output + result.stderr
    fresh = load(out if to == "merged" else pipelines[kind])
    if to == "native":
        load_adapter(fresh, out)
    elif to != "merged":
        fresh.load_lora_weights(str(out))
    assert_close(predict(fresh.unet, kind), expected)
    if to == "native":  # a file of ours that holds them is checked against the model as others are
        shutil.copy(out, tmp_path / "again.safetensors")
        result = CliRunner().invoke(app, [str(out), str(tmp_path / "kohya.safetensors"), "--to", "lora"])
        assert result.exit_code == 0, result.output + result.stderr
        kept, given = load_file(tmp_path / "kohya.safetensors"), load_file(path)
        assert {name: tensor.shape for name, tensor in kept.items()} == {n: t.shape for n, t in given.items()}


def test_lycoris_on_the_projections_of_sd_1_is_read(originals, unets, tmp_path):
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel"], "enable_conv": True})
    unet = unets["sd15"]
    network = create_lycoris(unet, 1.0, linear_dim=2, linear_alpha=1, algo="lokr", factor=4, conv_dim=2, conv_alpha=1)
    network.apply_to()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    expected = predict(unet, "sd15")
    network.save_weights(tmp_path / "a.safetensors", torch.float32, {})
    assert any("proj_in" in key for key in load_file(tmp_path / "a.safetensors"))
    assert_close(ours(originals["sd15"], "sd15", tmp_path / "a.safetensors"), expected)


def test_a_report_shows_the_projections(pipelines, tmp_path):
    from diffusekrona_train.cli.inspect import app as inspect

    path = kohya(load(pipelines["sdxl"]).unet, "sdxl", tmp_path / "a.safetensors")
    arguments = ["factors", str(path), "--model", str(pipelines["sdxl"]), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(inspect, arguments)
    assert result.exit_code == 0, result.output + result.stderr


# ---- what cannot be read says why ------------------------------------------------------------------------------------

CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
ATTENTION = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
MORE: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "a convolution": (
        {f"{CONV}.lora_down.weight": torch.randn(4, 32, 3, 3), f"{CONV}.lora_up.weight": torch.randn(32, 4, 1, 1)},
        f"layer {CONV} is a convolution or another layer outside attention .1 of",
    ),
    "time embeddings": (
        {f"lora_unet_time_embedding_linear_1.lora_{side}.weight": torch.randn(4, 4) for side in ("up", "down")},
        "lora_unet_time_embedding_linear_1 is a convolution or another layer outside attention",
    ),
    "a text encoder": (
        {
            f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.lora_{side}.weight": torch.randn(4, 4)
            for i in range(3)
            for side in ("up", "down")
        },
        r"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_\w+.weight and 5 more adapts a text encoder",
    ),
    "DoRA": ({f"{ATTENTION}.dora_scale": torch.ones(64, 1)}, "attn1_to_q.dora_scale makes this a DoRA, which rescales"),
    "a Tucker core": ({f"{CONV}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "lora_mid.weight adapts a 3x3 convolution"),
    "an embedding": ({"bundle_emb.x.string_to_param.*": torch.ones(1, 768)}, "is a textual inversion embedding"),
    "another model's layer": (
        {f"lora_transformer_single_blocks_0_linear1.lora_{side}.weight": torch.randn(4, 4) for side in ("up", "down")},
        "is not in this model of family 'sd' .1 of .* are not.: is the file for another model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MORE)
def test_the_reason_is_the_true_one(unets, tmp_path, what):
    tensors, words = MORE[what]
    path = kohya(unets["sd15"], "sd15", tmp_path / "a.safetensors", more=tensors)
    before = {name: value.clone() for name, value in unets["sd15"].state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        inject_file(unets["sd15"], read_adapter(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    after = unets["sd15"].state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_original_names_of_convolutions_are_known_too(unets, tmp_path):
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    tensors = {f"{name}.lora_down.weight": torch.randn(4, 32, 3, 3), f"{name}.lora_up.weight": torch.randn(32, 4, 1, 1)}
    path = kohya(unets["sdxl"], "sdxl", tmp_path / "a.safetensors", more=tensors)
    with pytest.raises(ValueError, match=f"layer {name} is a convolution"):
        inject_file(unets["sdxl"], read_adapter(path))


def test_peft_dora_of_diffusers_is_refused(unets, tmp_path):
    from peft import LoraConfig

    unets["sd15"].add_adapter(LoraConfig(r=4, target_modules=["to_q"], use_dora=True))
    unets["sd15"].save_lora_adapter(tmp_path)
    with pytest.raises(ValueError, match="DoRA, which rescales"):
        read_adapter(tmp_path / "pytorch_lora_weights.safetensors")


def test_a_projection_with_a_larger_kernel_is_refused(unets, tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.randn(4, 64, 3, 3), f"{name}.lora_up.weight": torch.randn(64, 4, 1, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"proj_in: lora_down.weight has shape \(4, 64, 3, 3\)"):
        inject_file(unets["sd15"], read_adapter(tmp_path / "a.safetensors"))


def test_our_own_file_with_projections_is_written_and_read(unets, tmp_path):
    path = kohya(unets["sd15"], "sd15", tmp_path / "a.safetensors")
    file = identify(read_adapter(path), find_layers(unets["sd15"], None), "sd")
    write_adapter(tmp_path / "b.safetensors", file)
    again = read_adapter(tmp_path / "b.safetensors")
    assert again.layers == file.layers and again.options == file.options
