"""Adapter files: what is saved comes back, what is damaged is named, and the peers' own libraries read it the same."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusekrona_train.adapters.formats import (
    identify,
    inject_file,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
    set_scale,
    unload,
    write_adapter,
)
from diffusekrona_train.adapters.formats.names import without_paths
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import find_layers
from tests.tiny import make_pipeline, make_unet

SPECS = {
    "krona": AdapterConfig(a1=4, a2=8, scale=0.5),
    "krona with ffn": AdapterConfig(a1=8, a2=2, ffn=True),
    "krona subset": AdapterConfig(a1=4, a2=8, targets=["q", "v"], attention="cross", blocks=["mid_block"]),
    "lora": AdapterConfig(type="lora", rank=3, alpha=6.0, scale=0.5),
    "lokr": AdapterConfig(type="lokr", rank=2, alpha=1.0),
    "lokr both": AdapterConfig(type="lokr", factor=8, rank=1, decompose_both=True),
    "lokr full": AdapterConfig(type="lokr", factor=4, full_matrix=True),
    "loha": AdapterConfig(type="loha", rank=2, alpha=1.0),
    "full": AdapterConfig(type="full", targets=["v"]),
    "whole": AdapterConfig(type="full", targets="all"),
}
INPUTS = {"sd15": 32, "sd21": 32, "sdxl": 64}


@pytest.fixture(scope="module")
def originals():
    torch.manual_seed(0)
    return {kind: make_unet(kind).requires_grad_(False) for kind in INPUTS}


@pytest.fixture
def unets(originals):
    return copy.deepcopy(originals)


def shaken(unet, spec, seed=0):
    """An injection whose every parameter is a random number."""
    injection = inject(unet, spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return injection


def predict(unet, kind):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, INPUTS[kind], generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return unet(x, torch.tensor([5, 700]), text, added_cond_kwargs=added if kind == "sdxl" else None)[0]


def assert_close(one, other):
    assert (one - other).norm() <= 1e-5 * other.norm(), float((one - other).norm() / other.norm())


def saved(unet, spec, path, **info):
    """Writes a random adapter of `unet` and returns the model's prediction with it; the model is bare again."""
    kind = "sdxl" if unet.config.addition_embed_type else "sd15"
    injection = shaken(unet, spec)
    save_adapter(path, injection, {"model": "owner/name", **info})
    expected = predict(unet, kind)
    injection.eject()
    change = (expected - predict(unet, kind)).norm() / expected.norm()
    assert 5e-4 < change < 10, change
    return expected


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_what_is_saved_comes_back_bit_for_bit(unets, tmp_path, kind, name):
    path, unet = tmp_path / "dog.safetensors", unets[kind]
    injection = shaken(unet, SPECS[name])
    state = {key: value.clone() for key, value in injection.state_dict().items()}
    save_adapter(path, injection, {"model": "owner/name"})
    injection.eject()
    file = read_adapter(path)
    again = inject_file(unet, file)
    try:
        back = again.state_dict()
        assert again.spec == SPECS[name] and file.info["model"] == "owner/name"
        assert list(back) == list(state)
        # a scale inside a tensor costs one rounding
        assert all(torch.allclose(back[key], state[key], rtol=1e-6, atol=0) for key in state)
        again_path = tmp_path / "again.safetensors"
        save_adapter(again_path, again, {"model": "owner/name"})
        first, second = load_file(path), load_file(again_path)
        assert all(torch.allclose(first[key], second[key], rtol=1e-6, atol=0) for key in first)
    finally:
        again.eject()


def test_the_file_says_everything_and_no_path(unets, tmp_path):
    path = tmp_path / "dog.safetensors"
    training = {"model": "sdxl", "output": str(tmp_path / "runs" / "dog"), "subject": {"images": "./photos/dog"}}
    saved(unets["sdxl"], SPECS["krona"], path, token="sks", resolution=1024, step=500, training=training)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensor = file.get_tensor("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha")
    assert tensor.shape == () and tensor == 1
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.resolution"] == "1024x1024" and metadata["modelspec.trigger_phrase"] == "sks"
    assert json.loads(metadata["ss_network_args"])["algo"] == "lokr"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"]
    info = read_adapter(path).info
    assert info["training"] == {"model": "sdxl", "output": "dog", "subject": {"images": "dog"}}
    assert str(tmp_path) not in json.dumps(metadata)
    assert without_paths({"a": ["owner/name", "/x/y/z", "~/q"]}) == {"a": ["owner/name", "z", "q"]}


def test_sd2_says_so(tmp_path):
    from diffusers import UNet2DConditionModel

    config = dict(make_unet("sd21").config) | {"cross_attention_dim": 1024}
    unet: Any = UNet2DConditionModel.from_config(config)
    injection = inject(unet, AdapterConfig(a1=4, a2=8))
    for predicts, version in (("epsilon", "sd_v2"), ("v_prediction", "sd_v2_v")):
        save_adapter(tmp_path / "a.safetensors", injection, {"prediction_type": predicts})
        metadata = read_adapter(tmp_path / "a.safetensors").metadata
        assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (version, "True")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_size_files_load_as_fp32_masters(unets, tmp_path, dtype):
    path = tmp_path / "dog.safetensors"
    injection = shaken(unets["sd15"], SPECS["krona"])
    save_adapter(path, injection, {}, dtype)
    injection.eject()
    assert {str(t.dtype) for t in load_file(path).values()} == {
        {"fp16": "torch.float16", "bf16": "torch.bfloat16"}[dtype]
    }
    again = inject_file(unets["sd15"], read_adapter(path))
    again.assert_fp32()
    again.eject()


def test_a_file_with_nan_or_too_large_for_fp16_is_not_written(unets, tmp_path):
    injection = shaken(unets["sd15"], SPECS["krona"])
    adapter: Any = next(iter(injection.adapters.values()))
    adapter.A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(tmp_path / "a.safetensors", injection, {})
    adapter.A.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="too large for fp16"):
        save_adapter(tmp_path / "a.safetensors", injection, {}, "fp16")
    injection.eject()
    assert list(tmp_path.iterdir()) == []


# ---- damage --------------------------------------------------------------------------------------------------------


def rewritten(change):
    """A way to damage a file: load it, let `change` alter tensors or metadata, save it."""

    def damage(path):
        with safe_open(path, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return damage


def info_changed(change):
    def alter(tensors, metadata):
        info = json.loads(metadata["diffusekrona"])
        change(info)
        metadata["diffusekrona"] = json.dumps(info)

    return rewritten(alter)


def first(tensors, suffix):
    return next(key for key in tensors if key.endswith(suffix))


def resized(path, size):
    path.write_bytes(path.read_bytes()[:size])


BROKEN = "truncated, damaged or not a safetensors file"
DAMAGE = {
    "cut in the header": (lambda p: resized(p, 1000), "truncated"),
    "cut in the tensors": (lambda p: resized(p, p.stat().st_size - 100), "truncated"),
    "cut to nothing": (lambda p: resized(p, 0), "truncated"),
    "huge header": (
        lambda p: p.write_bytes(struct.pack("<Q", 2**60) + p.read_bytes()[8:]),
        BROKEN,
    ),
    "broken JSON": (
        lambda p: p.write_bytes(p.read_bytes()[:8] + b"}" + p.read_bytes()[9:]),
        BROKEN,
    ),
    "header is a list": (
        lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"),
        BROKEN,
    ),
    "no offsets": (
        lambda p: p.write_bytes(struct.pack("<Q", 8) + b'{"a":{}}'),
        BROKEN,
    ),
    "bytes after the end": (lambda p: p.write_bytes(p.read_bytes() + b"x"), BROKEN),
    "empty": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"{}"), "no tensors"),
    "a zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(50)), "pickle"),
    "a pickle": (lambda p: torch.save({"a": torch.zeros(1)}, p), "pickle"),
    "an old pickle": (lambda p: torch.save({}, p, _use_new_zipfile_serialization=False), "pickle"),
    "half a pair": (rewritten(lambda t, m: t.pop(first(t, "lokr_w2"))), "lokr_w2 is missing"),
    "a layer lost": (
        rewritten(lambda t, m: [t.pop(first(t, "to_q." + s)) for s in ("lokr_w1", "lokr_w2", "alpha")]),
        "is missing (1 of 128 that it lists)",
    ),
    "alpha lost": (rewritten(lambda t, m: t.pop(first(t, "alpha"))), "alpha is missing"),
    "alpha alone": (rewritten(lambda t, m: [t.pop(first(t, s)) for s in ("lokr_w1", "lokr_w2")]), "missing"),
    "a strange tensor": (rewritten(lambda t, m: t.update(strange=torch.zeros(2))), "strange is extra"),
    "a strange layer": (
        rewritten(
            lambda t, m: t.update({"lora_unet_x.lokr_w1": torch.zeros(2, 2), "lora_unet_x.lokr_w2": torch.zeros(2, 2)})
        ),
        "lora_unet_x is extra",
    ),
    "two kinds": (
        rewritten(
            lambda t, m: t.update({"x.lora_up.weight": torch.zeros(2, 1), "x.lora_down.weight": torch.zeros(1, 2)})
        ),
        "mixes",
    ),
    "NaN": (rewritten(lambda t, m: t[first(t, "lokr_w1")].fill_(float("nan"))), "NaN"),
    "infinity": (rewritten(lambda t, m: t[first(t, "lokr_w2")].fill_(float("inf"))), "infinity"),
    "integers": (
        rewritten(lambda t, m: t.update({first(t, "lokr_w1"): torch.zeros(8, 4, dtype=torch.int32)})),
        "int32",
    ),
    "mis-shaped": (
        rewritten(lambda t, m: t.update({first(t, "lokr_w1"): torch.zeros(8, 5)})),
        "has shape (8, 5), not (8, 4)",
    ),
    "own JSON broken": (rewritten(lambda t, m: m.update(diffusekrona="{")), "damaged"),
    "own JSON empty": (rewritten(lambda t, m: m.update(diffusekrona="{}")), "damaged"),
    "own JSON a list": (rewritten(lambda t, m: m.update(diffusekrona="[]")), "damaged"),
    "unknown adapter": (info_changed(lambda i: i["adapter"].update(type="oft")), "damaged or of another version"),
    "unknown field": (info_changed(lambda i: i["adapter"].update(newer=1)), "damaged or of another version"),
    "options lost": (info_changed(lambda i: i.update(options={})), "no options"),
    "option lost": (info_changed(lambda i: i["options"][i["layers"][0]].pop("a1")), "damaged"),
    "widths lost": (info_changed(lambda i: i["widths"].pop()), "damaged"),
    "text encoder": (
        rewritten(
            lambda t, m: t.update({"lora_te_x.lokr_w1": torch.zeros(2, 2), "lora_te_x.lokr_w2": torch.zeros(2, 2)})
        ),
        "text encoder",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_that_names_file_and_fault(unets, tmp_path, name):
    path = tmp_path / "dog.safetensors"
    saved(unets["sd15"], SPECS["krona"], path)
    damage, words = DAMAGE[name]
    damage(path)
    with pytest.raises(ValueError) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message and "\n" not in message, message


def test_a_folder_a_missing_file_and_pickles_by_name(tmp_path):
    for path, words in ((tmp_path, "folder"), (tmp_path / "none.safetensors", "no such file")):
        with pytest.raises(ValueError, match=words):
            read_adapter(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="pickle"):
        read_adapter(tmp_path / "pytorch_lora_weights.bin")


def test_a_file_of_another_model_names_both(unets, tmp_path):
    path = tmp_path / "dog.safetensors"
    saved(unets["sdxl"], SPECS["krona"], path)
    with pytest.raises(ValueError, match="family 'sdxl' .*family 'sd'"):
        load_adapter(unets["sd15"], path)
    saved(unets["sd15"], SPECS["krona"], path)
    wider = make_unet("sd15", width=64)
    with pytest.raises(ValueError, match="32 -> 32 there and 64 -> 64 in this model"):
        load_adapter(wider, path)
    write_adapter(path, read_adapter(path), own_json=False)
    with pytest.raises(ValueError, match="of 128 are not"):
        load_adapter(unets["sdxl"], path)
    with pytest.raises(ValueError, match="neither a pipeline"):
        load_adapter(object(), path)


# ---- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_three_lines_on_every_pipeline(tmp_path, kind):
    import diffusers
    import numpy as np
    from PIL import Image

    folder = make_pipeline(kind, tmp_path / kind)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.unet.requires_grad_(False)  # some CPUs round a linear layer otherwise where its weight wants a gradient
    path = tmp_path / "dog.safetensors"
    strong = AdapterConfig(a1=4, a2=8, scale=20.0)
    saved(pipe.unet, strong, path)
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    tasks = {
        diffusers.AutoPipelineForText2Image: {"height": 64, "width": 64},
        diffusers.AutoPipelineForImage2Image: {"image": picture, "strength": 0.9},
        diffusers.AutoPipelineForInpainting: {"image": picture, "mask_image": mask, "height": 64, "width": 64},
    }
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    for auto, arguments in tasks.items():
        this = auto.from_pipe(pipe)
        this.set_progress_bar_config(disable=True)

        def render(this=this, arguments=arguments):
            image = this(
                "a dog", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np", **arguments
            ).images
            return torch.from_numpy(np.asarray(image))

        base = render()
        load_adapter(this, path)
        adapted = render()
        set_scale(this, 0.0)
        assert torch.equal(render(), base) and not torch.equal(adapted, base)
        set_scale(this, 1.0)
        assert torch.equal(render(), adapted)
        unload(this)
        assert torch.equal(render(), base)
    after = pipe.unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_two_adapters_stack_and_have_their_own_strength(unets, tmp_path):
    unet, one, two = unets["sd15"], tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    base = predict(unet, "sd15")
    with_one = saved(unet, SPECS["krona"], one)
    with_two = saved(unet, SPECS["lora"], two)
    load_adapter(unet, one)
    load_adapter(unet, two)
    set_scale(unet, 0.0, index=1)
    assert_close(predict(unet, "sd15"), with_one)
    set_scale(unet, 0.0, index=0)
    set_scale(unet, 1.0, index=1)
    assert_close(predict(unet, "sd15"), with_two)
    unload(unet)
    assert torch.equal(predict(unet, "sd15"), base)
    with pytest.raises(ValueError, match="no adapter is loaded"):
        set_scale(unet, 1.0)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "whole"])
def test_other_tools_files_need_only_the_model(unets, tmp_path, name):
    """A plain file, without our JSON, gives the same model."""
    unet, path = unets["sd15"], tmp_path / "plain.safetensors"
    expected = saved(unet, SPECS[name], path)
    write_adapter(path, read_adapter(path), own_json=False)
    file = read_adapter(path)
    assert file.layers == [] and file.spec is None
    load_adapter(unet, path)
    assert_close(predict(unet, "sd15"), expected)
    unload(unet)
    file = identify(file, find_layers(unet, None), "sd")
    save_again = tmp_path / "native.safetensors"
    write_adapter(save_again, file)
    load_adapter(unet, save_again)
    assert_close(predict(unet, "sd15"), expected)
    unload(unet)


@pytest.mark.parametrize("name", SPECS)
def test_merged_is_the_sum(unets, tmp_path, name):
    unet, path = unets["sd15"], tmp_path / "dog.safetensors"
    expected = saved(unet, SPECS[name], path)
    merge(unet, read_adapter(path))
    assert_close(predict(unet, "sd15"), expected)


# ---- the peers -----------------------------------------------------------------------------------------------------


SQUARE = AdapterConfig(a1=4, a2=4, scale=0.5)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_lycoris_reads_a_square_file(unets, tmp_path, kind):
    from lycoris import create_lycoris_from_weights

    unet, path = unets[kind], tmp_path / "dog.safetensors"
    expected = saved(unet, SQUARE, path)
    groups = read_adapter(path).groups
    # LyCORIS knows a module by its own prefix and path
    state = {
        f"lycoris_{name.replace('.', '_')}.{suffix}": tensor
        for name, group in groups.items()
        for suffix, tensor in group.items()
    }
    network, _ = create_lycoris_from_weights(1.0, "", unet, weights_sd=state)
    assert len(network.loras) == len(groups)
    network.apply_to()
    assert_close(predict(unet, kind), expected)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_reads_a_square_file(unets, tmp_path, kind):
    unet, path = unets[kind], tmp_path / "dog.safetensors"
    expected = saved(unet, SQUARE, path)
    groups = read_adapter(path).groups
    state = {f"{name}.{suffix}": tensor for name, group in groups.items() for suffix, tensor in group.items()}
    unet.load_lora_adapter(state, prefix=None)
    assert_close(predict(unet, kind), expected)
