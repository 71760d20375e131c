"""krona-convert: every format against the adapter itself, in the hands of the peers that will read it."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffusekrona_train.adapters.formats import (
    EXPORTERS,
    import_diffusekrona,
    load_adapter,
    read_adapter,
    save_adapter,
    unload,
    write_sidecar,
)
from diffusekrona_train.adapters.formats.exports import delta
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.cli.convert import app
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import open_model
from diffusekrona_train.models.layers import find_layers
from tests.faults.adapter_files import native
from tests.test_weights import INPUTS, assert_close, predict, saved
from tests.tiny import make_pipeline, make_unet
from tests.tiny.original_layout import write_checkpoint

SPECS = {
    "krona": AdapterConfig(a1=1, a2=16, scale=0.5),
    "krona by projection": AdapterConfig(a1=1, a2=16, factors={"q": [16, 1], "k": [2, 32]}, ffn=True),
    "lora": AdapterConfig(type="lora", rank=3, alpha=6.0, scale=0.5),
    "lokr": AdapterConfig(type="lokr", rank=2, alpha=1.0),
    "loha": AdapterConfig(type="loha", rank=2, alpha=1.0),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: make_pipeline(kind, folder / kind) for kind in INPUTS}


def load(folder) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.unet.requires_grad_(False)
    return pipe


def convert(*arguments, fails=None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is None:
        assert result.exit_code == 0, result.output + result.stderr
        return result.output
    assert result.exit_code == 2 and result.stderr.startswith("error: "), result.output + result.stderr
    assert result.stderr.count("\n") == 1 and fails in result.stderr, result.stderr
    return result.stderr


# ---- LoRA in the peers' hands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["lora", "diffusers"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_reads_the_lora_export_of_any_shape(pipelines, tmp_path, kind, name, to):
    pipe, path, out = load(pipelines[kind]), tmp_path / "dog.safetensors", tmp_path / "lora.safetensors"
    expected = saved(pipe.unet, SPECS[name], path)
    output = convert(path, out, "--to", to)
    assert "exact: rank" in output and "read back and equal" in output
    pipe.load_lora_weights(str(out))
    assert_close(predict(pipe.unet, kind), expected)


@pytest.mark.parametrize("name", ["krona", "krona by projection"])
def test_peft_reads_the_diffusers_export(pipelines, tmp_path, name):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    unet, path, out = load(pipelines["sd15"]).unet, tmp_path / "dog.safetensors", tmp_path / "lora.safetensors"
    expected = saved(unet, SPECS[name], path)
    convert(path, out, "--to", "diffusers")
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in about.items()})
    inject_adapter_in_model(config, unet)
    state = {key.removeprefix("unet."): tensor for key, tensor in load_file(out).items()}
    assert set_peft_model_state_dict(unet, state).unexpected_keys == []
    assert_close(predict(unet, "sd15"), expected)


def test_lycoris_reads_the_lora_export(pipelines, tmp_path):
    from lycoris import create_lycoris_from_weights

    unet, path, out = load(pipelines["sd15"]).unet, tmp_path / "dog.safetensors", tmp_path / "lora.safetensors"
    expected = saved(unet, SPECS["krona by projection"], path)
    convert(path, out, "--to", "lora")
    state = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in load_file(out).items()}
    network, _ = create_lycoris_from_weights(1.0, "", unet, weights_sd=state)
    network.apply_to()
    assert_close(predict(unet, "sd15"), expected)


def test_a_lora_file_has_one_alpha(pipelines, tmp_path):
    path, out = tmp_path / "dog.safetensors", tmp_path / "lora.safetensors"
    saved(load(pipelines["sdxl"]).unet, SPECS["krona by projection"], path)
    convert(path, out, "--to", "lora")
    tensors = load_file(out)
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")}
    assert len(ranks) > 1
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")}) == 1


def test_a_rank_too_large_is_refused_or_cut_with_its_error(pipelines, tmp_path):
    path, out = tmp_path / "dog.safetensors", tmp_path / "lora.safetensors"
    unet = load(pipelines["sd15"]).unet
    saved(unet, AdapterConfig(a1=4, a2=4), path)
    convert(path, out, "--to", "lora", fails="larger than the dense difference")
    assert not out.exists()
    output = convert(path, out, "--to", "lora", "--rank", 5)
    file = read_adapter(path)
    lost = whole = 0.0
    cut = load_file(out)
    for layer in file.layers:
        dense = delta(file, layer).double()
        sigma = torch.linalg.svdvals(dense)
        lost, whole = lost + float((sigma[5:] ** 2).sum()), whole + float((sigma**2).sum())
        up, down = (cut[f"{file.file_name(layer.name)}.lora_{side}.weight"].double() for side in ("up", "down"))
        assert up.shape[1] == 5
        error = float((dense - up @ down).norm())
        assert error == pytest.approx(float((sigma[5:] ** 2).sum().sqrt()), rel=1e-5)
    assert f"error of the truncation: {(lost / whole) ** 0.5:.2%} of ‖ΔW‖" in output


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "full"])
def test_other_types_are_cut_at_their_optimum(pipelines, tmp_path, name):
    path = tmp_path / "dog.safetensors"
    spec = SPECS.get(name, AdapterConfig(type="full", targets=["v"]))
    saved(load(pipelines["sd15"]).unet, spec, path)
    convert(path, tmp_path / "lora.safetensors", "--to", "diffusers", "--rank", 1)
    file, cut = read_adapter(path), load_file(tmp_path / "lora.safetensors")
    for layer in file.layers[:8]:
        dense = delta(file, layer).double()
        up, down = (cut[f"unet.{layer.name}.lora_{side}.weight"].double() for side in ("B", "A"))
        best = torch.linalg.svdvals(dense)[1:].norm()
        assert float((dense - up @ down).norm()) == pytest.approx(float(best), rel=1e-4, abs=1e-6)


# ---- the other formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_plain_lokr_and_back_to_native_with_the_folder_as_model(pipelines, tmp_path, kind):
    pipe, path = load(pipelines[kind]), tmp_path / "dog.safetensors"
    expected = saved(pipe.unet, AdapterConfig(a1=4, a2=8, scale=0.5), path)
    plain, native = tmp_path / "plain.safetensors", tmp_path / "native.safetensors"
    assert "not square" in convert(path, plain, "--to", "lokr")
    with safe_open(plain, "pt") as file:
        assert "diffusekrona" not in file.metadata()
    convert(plain, native, "--to", "native", fails="give --model")
    convert(plain, native, "--to", "native", "--model", pipelines[kind])
    assert read_adapter(native).family == {"sd15": "sd", "sdxl": "sdxl"}[kind]
    load_adapter(pipe, native)
    assert_close(predict(pipe.unet, kind), expected)
    unload(pipe)
    convert(path, native, "--to", "native", "--dtype", "fp16")
    assert {tensor.dtype for tensor in load_file(native).values()} == {torch.float16}


@pytest.mark.parametrize(
    "spec", [AdapterConfig(a1=4, a2=4), AdapterConfig(type="full", targets="all")], ids=["krona", "all"]
)
def test_merged_is_a_pipeline_of_its_own(pipelines, tmp_path, spec):
    path, out = tmp_path / "dog.safetensors", tmp_path / "merged"
    base = load(pipelines["sdxl"])
    expected = saved(base.unet, spec, path)
    convert(path, out, "--to", "merged", fails="owner/name")  # the base that its own JSON names is not here
    convert(path, out, "--to", "merged", "--model", pipelines["sdxl"])
    merged = load(out)
    assert_close(predict(merged.unet, "sdxl"), expected)
    image = merged("a dog", num_inference_steps=1, height=64, width=64, output_type="np").images
    assert np.isfinite(image).all()
    convert(path, out, "--to", "merged", "--model", pipelines["sdxl"], fails="not an empty folder")
    half = tmp_path / "half"
    convert(path, half, "--to", "merged", "--model", pipelines["sdxl"], "--dtype", "bf16")
    with safe_open(next((half / "unet").glob("*.safetensors")), "pt") as file:
        key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        rounded = load(out).unet.state_dict()[key].to(torch.bfloat16)
        assert torch.equal(file.get_tensor(key), rounded)  # summed in fp32, rounded once


def test_mistakes_are_one_line(pipelines, tmp_path):
    path, out = tmp_path / "dog.safetensors", tmp_path / "out.safetensors"
    saved(load(pipelines["sd15"]).unet, SPECS["lora"], path)
    convert(path, out, "--to", "lokr", fails="not a Kronecker product")
    convert(path, path, "--to", "lora", fails="is the input itself")
    convert(path, tmp_path / "out.bin", "--to", "lora", fails="ends in .safetensors")
    convert(path, out, "--to", "merged", "--model", pipelines["sd15"], fails="pipeline folder")
    convert(path, out, "--to", "native", "--rank", 2, fails="--rank 2")
    convert(path, out, "--to", "lora", "--rank", 0, fails="--rank 0")
    convert(path, out, "--to", "lora", "--model", "sdxl", fails="family 'sd'")
    convert(path, out, "--to", "lora", "--model", "sdx", fails="did you mean 'sdxl'")
    convert(tmp_path, out, "--to", "lora", fails="is a folder")
    path.write_bytes(path.read_bytes()[:5000])
    convert(path, out, "--to", "lora", fails="truncated")
    assert not out.exists()


def test_the_table_is_what_the_door_offers():
    from diffusekrona_train.cli.convert import Target

    assert [target.value for target in Target] == list(EXPORTERS)


# ---- the authors' checkpoints --------------------------------------------------------------------------------------


def authors_layer(x, down, up):
    """Their layer from the printed formula, in numpy: ΔW[β*a_out+α, p*b_in+q] = U[β,q] D[p,α]."""
    (a_in, a_out), (b_out, b_in) = down.shape, up.shape
    weight = np.zeros((a_out * b_out, a_in * b_in))
    for beta in range(b_out):
        for alpha in range(a_out):
            weight[beta * a_out + alpha] = np.outer(down[:, alpha], up[beta]).reshape(-1)
    return x @ weight.T


def authors_checkpoint(unet, path, mode="krona", letters=("to_q", "to_k", "to_v", "to_out.0")):
    """A checkpoint in their keys; returns layer -> (down, up) for the layers that it covers."""
    generator, state, pairs = np.random.default_rng(0), {}, {}
    for layer in find_layers(unet, AdapterConfig()):
        attention, _, projection = layer.name.partition(".to_")
        if f"to_{projection}" not in letters:
            continue
        a_in, a_out = (4, 8) if mode == "krona" else (3, layer.in_features)
        b_out, b_in = (layer.out_features // 8, layer.in_features // 4) if mode == "krona" else (layer.out_features, 3)
        down, up = generator.normal(size=(a_in, a_out)) * 0.2, generator.normal(size=(b_out, b_in)) * 0.2
        pairs[layer.name] = down, up
        key = f"unet.{attention}.processor.to_{projection.removesuffix('.0')}_lora"
        state |= {f"{key}.down.weight": torch.tensor(down).float(), f"{key}.up.weight": torch.tensor(up).float()}
    save_file(state, path, {"format": "pt"})
    return pairs


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_an_authors_layer_is_their_formula(pipelines, tmp_path, kind):
    unet, path = load(pipelines[kind]).unet, tmp_path / "pytorch_lora_weights.safetensors"
    pairs = authors_checkpoint(unet, path)
    base = copy.deepcopy(unet)
    native, merged = tmp_path / "native.safetensors", tmp_path / "merged"
    convert(path, native, "--to", "native", fails="--from diffusekrona")
    convert(path, native, "--to", "native", "--from", "diffusekrona", "--model", pipelines[kind])
    load_adapter(unet, native)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    rng = np.random.default_rng(1)
    for name, (down, up) in pairs.items():
        x = rng.normal(size=(2, 3, down.shape[0] * up.shape[1]))
        old, new = (model.get_submodule(name)(torch.tensor(x).float()) for model in (base, unet))
        expected = authors_layer(x, down, up)
        assert np.abs((new - old).numpy() - expected).max() < 1e-5 * np.abs(expected).max() + 1e-5
    adapted = predict(unet, kind)
    unload(unet)
    convert(path, merged, "--to", "merged", "--from", "diffusekrona", "--model", pipelines[kind])
    assert_close(predict(load(merged).unet, kind), adapted)
    for source, arguments in ((native, ()), (path, ("--from", "diffusekrona", "--model", pipelines[kind]))):
        convert(source, tmp_path / "x.safetensors", "--to", "lokr", *arguments, fails="permute the rows")
        # tiny widths make the exact pair larger than the layer; at full rank a cut loses nothing
        out = tmp_path / "lora.safetensors"
        output = convert(source, out, "--to", "lora", "--rank", 128, *arguments)
        assert "exact: rank" in output
        pipe = load(pipelines[kind])
        pipe.load_lora_weights(str(out))
        assert_close(predict(pipe.unet, kind), adapted)
    assert all(".rows_" in key for key in load_file(native))  # no other tool takes it for a plain LoKr


def test_their_lora_mode_is_told_by_shape(pipelines, tmp_path):
    unet, path = load(pipelines["sd15"]).unet, tmp_path / "lora.safetensors"
    pairs = authors_checkpoint(unet, path, mode="lora", letters=("to_q", "to_v"))
    file = import_diffusekrona(path, find_layers(unet, None), "sd")
    assert file.spec is not None and file.spec.type == "lora" and file.spec.rank == 3 and not file.row_permutation
    assert {layer.name for layer in file.layers} == set(pairs)
    for layer in file.layers:
        down, up = pairs[layer.name]
        assert np.allclose(delta(file, layer).numpy(), up @ down, atol=1e-6)


AUTHORS_DAMAGE = {
    "is missing": lambda state: state.pop(next(key for key in state if key.endswith("up.weight"))),
    "fit neither": lambda state: state.update({next(iter(state)): torch.zeros(5, 7)}),
    "is extra": lambda state: state.update(other=torch.zeros(1)),
    "not in this model": lambda state: state.update({"unet.x.attn1.processor.to_q_lora.up.weight": torch.zeros(1, 1)}),
    "NaN": lambda state: state.update({next(iter(state)): torch.full((4, 8), float("nan"))}),
}


@pytest.mark.parametrize("words", AUTHORS_DAMAGE)
def test_their_damaged_files_are_one_line(tmp_path, words):
    unet, path = make_unet("sd15"), tmp_path / "a.safetensors"
    authors_checkpoint(unet, path)
    state = load_file(path)
    AUTHORS_DAMAGE[words](state)
    save_file(state, path)
    with pytest.raises(ValueError, match=words) as caught:
        import_diffusekrona(path, find_layers(unet, None), "sd")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_their_checkpoint_for_sdxl_needs_no_weights(tmp_path):
    """SDXL's own widths, (8, 64) as in the authors' script, the model known by its alias alone."""
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    state = {
        f"unet.{name}.processor.to_k_lora.down.weight": torch.randn(8, 64),
        f"unet.{name}.processor.to_k_lora.up.weight": torch.randn(10, 256),
    }
    path, out = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "dog.safetensors"
    save_file(state, path)
    convert(path, out, "--to", "native", "--from", "diffusekrona", "--model", "sdxl")
    file = read_adapter(out)
    assert file.options == {f"{name}.to_k": {"a1": 8, "a2": 64, "row_permutation": True}}
    convert(path, out, "--to", "lora", "--from", "diffusekrona", "--model", "sd15", fails="fit neither")
    convert(tmp_path / "a.bin", out, "--to", "lora", "--from", "diffusekrona", "--model", "sdxl", fails="no such file")
    torch.save(state, tmp_path / "a.bin")
    convert(tmp_path / "a.bin", out, "--to", "lora", "--from", "diffusekrona", "--model", "sdxl", fails="is a pickle")


# ---- one merged file for other programs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "predicts"), [("sd15", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "v_prediction")]
)
def test_a_checkpoint_is_what_diffusers_and_the_original_layout_make_of_the_merged_pipeline(tmp_path, kind, predicts):
    """Its keys, shapes and values are those of the layout of the releases; diffusers' own loader reads it back."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = make_pipeline(kind, tmp_path / "base", prediction_type=predicts)
    pipe, path, out = load(folder), tmp_path / "dog.safetensors", tmp_path / "model.safetensors"
    saved(pipe.unet, SPECS["krona"], path)
    output = convert(path, out, "--to", "checkpoint", "--model", folder)
    assert "checkpoint, fp32" in output and not (tmp_path / "model.json").exists()
    convert(path, tmp_path / "merged", "--to", "merged", "--model", folder)
    parts = open_model(str(tmp_path / "merged")).load()
    expected = load_file(write_checkpoint(kind, parts, tmp_path / "expected.safetensors"))
    got = load_file(out)
    marks = {"v_pred"} if predicts == "v_prediction" else set()
    assert got.keys() == {name for name in expected if not name.endswith("position_ids")} | marks
    assert all(torch.equal(got[name], expected[name]) for name in got.keys() - marks)
    for cls, part, name in ((UNet2DConditionModel, "unet", "denoiser"), (AutoencoderKL, "vae", "vae")):
        theirs = cls.from_single_file(str(out), config=str(folder), subfolder=part).state_dict()
        ours = parts[name].state_dict()
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)
    again = open_model(str(out), model_config_dir=str(folder))
    again.check()
    for one, other in zip(again.load("text_encoders")["text_encoders"], parts["text_encoders"], strict=True):
        state = other.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["modelspec.architecture"] == {
        "sd15": "stable-diffusion-v1", "sd21": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"
    }[kind]  # fmt: skip
    assert about["modelspec.prediction_type"] == {"epsilon": "epsilon", "v_prediction": "v"}[predicts]


def test_a_checkpoint_is_refused_before_anything_is_written(pipelines, tmp_path):
    path, out = tmp_path / "dog.safetensors", tmp_path / "model.safetensors"
    saved(load(pipelines["sd15"]).unet, SPECS["krona"], path)
    convert(path, tmp_path / "model", "--to", "checkpoint", "--model", pipelines["sd15"], fails="ends in .safetensors")
    convert(path, out, "--to", "checkpoint", "--model", pipelines["sd15"], "--rank", 4, fails="--rank 4")
    convert(path, out, "--to", "checkpoint", "--model", pipelines["sdxl"], fails="family 'sd'")
    convert(path, out, "--to", "merged", "--model", pipelines["sd15"], fails="--to checkpoint for one file")
    assert not out.exists()
    convert(path, tmp_path / "MODEL.SAFETENSORS", "--to", "checkpoint", "--model", pipelines["sd15"], "--dtype", "fp16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "MODEL.SAFETENSORS").values()} == {torch.float16}


def test_the_original_layout_has_no_name_for_other_blocks(tmp_path):
    from diffusekrona_train.models.original import original_tensors

    with pytest.raises(ValueError, match="no name for mid_block.motion_modules.0.norm.weight"):
        original_tensors(
            "unet", "sd", {"mid_block.motion_modules.0.norm.weight": torch.zeros(1)}, {"layers_per_block": 2}
        )


# ---- what other programs look for ------------------------------------------------------------------------------------


def test_the_diffusers_export_says_who_does_not_read_it(pipelines, tmp_path):
    path = tmp_path / "dog.safetensors"
    saved(load(pipelines["sd15"]).unet, SPECS["lora"], path)
    output = convert(path, tmp_path / "peft.safetensors", "--to", "diffusers")
    assert "ComfyUI, A1111, Forge and InvokeAI do not read this file: --to lora" in output
    assert "do not read" not in convert(path, tmp_path / "kohya.safetensors", "--to", "lora")
    help_text = " ".join(CliRunner().invoke(app, ["--help"]).output.replace("│", " ").split())
    assert "PEFT keys, which ComfyUI, A1111, Forge and InvokeAI do not read" in help_text


@pytest.mark.parametrize(("to", "noted"), [("native", True), ("lora", True), ("lokr", True), ("diffusers", False)])
def test_trigger_words_lie_where_programs_look(pipelines, tmp_path, to, noted):
    pipe, path, out = load(pipelines["sdxl"]), tmp_path / "dog.safetensors", tmp_path / "out" / "dog.safetensors"
    injection = inject(pipe.unet, SPECS["krona"])
    save_adapter(path, injection, {"token": "sks", "class": "dög", "model": "owner/name"})
    convert(path, out, "--to", to)
    note = tmp_path / "out" / "dog.json"
    assert note.exists() == noted
    if noted:
        assert json.loads(note.read_text(encoding="utf-8")) == {"activation text": "sks dög", "sd version": "SDXL"}
        with safe_open(out, "pt") as file:
            about = file.metadata()
        assert about["modelspec.trigger_phrase"] == "sks dög"
        assert json.loads(about["ss_tag_frequency"]) == {"sks dög": {"sks dög": 1}}


@pytest.mark.parametrize(
    ("alias", "predicts", "base", "version"),
    [
        ("sd15", "epsilon", "sd_v1", "SD1"),
        ("sd15", "v_prediction", "sd_v1", "SD1"),
        ("sd21", "v_prediction", "sd_v2_v", "SD2"),
        ("sd21", "epsilon", "sd_v2", "SD2"),
        ("sdxl", "v_prediction", "sdxl_base_v1-0", "SDXL"),
    ],
)
def test_the_base_is_told_by_its_widths(tmp_path, alias, predicts, base, version):
    info = {"token": "sks", "class": "dog", "prediction_type": predicts}
    path = native(tmp_path / "dog.safetensors", alias, info, type="lora", rank=1)
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == base
    write_sidecar(path)
    assert json.loads((tmp_path / "dog.json").read_text())["sd version"] == version


def test_a_users_notes_and_other_files_stay(pipelines, tmp_path):
    path, out, note = tmp_path / "dog.safetensors", tmp_path / "new.safetensors", tmp_path / "new.json"
    injection = inject(load(pipelines["sd15"]).unet, SPECS["krona"])
    save_adapter(path, injection, {"token": "sks", "class": "dog"})
    note.write_text(json.dumps({"notes": "mine", "preferred weight": 0.7, "activation text": "old"}))
    convert(path, out, "--to", "native")
    assert json.loads(note.read_text()) == {
        "notes": "mine", "preferred weight": 0.7, "activation text": "sks dog", "sd version": "SD1"
    }  # fmt: skip
    for other in ('{"some": "config"}', "[1]", "{", "\xff"):
        note.write_text(other, encoding="latin-1")
        assert "stays; the trigger words are 'sks dog'" in convert(path, out, "--to", "native")
        assert note.read_text(encoding="latin-1") == other
    note.unlink()
    save_adapter(path, injection, {})
    convert(path, out, "--to", "native")
    assert not note.exists()
