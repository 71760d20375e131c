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
    unload,
)
from diffusekrona_train.adapters.formats.exports import delta
from diffusekrona_train.cli.convert import app
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import find_layers
from tests.test_weights import INPUTS, assert_close, predict, saved
from tests.tiny import make_pipeline, make_unet

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
    assert f"error of the cut: {(lost / whole) ** 0.5:.2%} of ‖ΔW‖" in output


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
    convert(path, out, "--to", "lokr", fails="no Kronecker product")
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
