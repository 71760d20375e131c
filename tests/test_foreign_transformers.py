"""LoRAs of other tools that adapt any linear of a flow transformer: each ΔW by hand, and what cannot be one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffusekrona_train.adapters import spectra
from diffusekrona_train.adapters.formats import identify, inject_file, merged, read_adapter
from diffusekrona_train.cli.convert import app as convert
from diffusekrona_train.cli.inspect import app as inspect
from diffusekrona_train.models import layers as tables
from diffusekrona_train.models import open_model
from diffusekrona_train.report import factors as plots
from diffusekrona_train.training.setup import check_start
from tests.runs import make_run
from tests.tiny.families import TINY
from tests.tiny.original_flow import ORIGINAL

RANK = 3
FORMS = {
    "by the original paths": ("diffusion_model.", True),
    "by kohya's": ("lora_unet_", True),
    "by diffusers'": ("transformer.", False),
    "by LyCORIS'": ("lycoris_", False),
    "by OneTrainer's": ("lora_transformer_", False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> source, denoiser and layers of a tiny one, built when first asked for."""
    made = {}

    def model(family):
        if family not in made:
            source = open_model(str(TINY[family].make(tmp_path_factory.mktemp(family))))
            denoiser = source.load("denoiser", dtype=torch.float32)["denoiser"]
            layers = [*source.layers(), *source.others()]
            made[family] = SimpleNamespace(source=source, denoiser=denoiser, layers=layers, family=source.family)
        return made[family]

    return model


def lora(name: str, rows: int, columns: int, sides=("lora_up", "lora_down")) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    up, down = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((rows, RANK), (RANK, columns)))
    return {f"{name}.{sides[0]}.weight": up, f"{name}.{sides[1]}.weight": down}


def of_everything(model, path, form):
    """A LoRA of every linear of the denoiser, written as a tool names it -> each layer's ΔW by its dotted path.

    One `down` for all linears of a width, so that fused ones share it.
    """
    (prefix, by_original), linears = FORMS[form], tables.linears_of(model.denoiser)
    generator = torch.Generator().manual_seed(1)
    downs = {width: torch.randn(RANK, width, generator=generator) for width, _ in linears.values()}
    ups = {name: torch.randn(rows, RANK, generator=generator) for name, (_, rows) in linears.items()}
    high = {f"{name}.weight": up for name, up in ups.items()}
    width = {f"{name}.weight": torch.zeros(2, columns) for name, (columns, _) in linears.items()}
    if by_original:
        high, width = (ORIGINAL[model.family.name](tensors) for tensors in (high, width))
    tensors = {}
    for key, up in high.items():
        name = key.removesuffix(".weight")
        name = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        tensors |= {f"{name}.lora_up.weight": up.clone(), f"{name}.alpha": torch.tensor(6.0)}
        tensors[f"{name}.lora_down.weight"] = downs[width[key].shape[1]].clone()
    save_file(tensors, path)
    return {name: up @ downs[linears[name][0]] * (6 / RANK) for name, up in ups.items()}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ORIGINAL)
def test_every_linear_gets_its_own_rows(models, tmp_path, family, form):
    """Fused ones cut, halves that the original has as (shift, scale) turned, layers without effect left out."""
    model = models(family)
    wanted = of_everything(model, tmp_path / "theirs.safetensors", form)
    file = identify(read_adapter(tmp_path / "theirs.safetensors"), model.layers, family)
    assert {layer.name for layer in file.layers} == wanted.keys() - set(model.family.without_effect(model.layers))
    for layer in file.layers:
        torch.testing.assert_close(merged.delta(file, layer), wanted[layer.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ORIGINAL)
def test_the_others_without_weights_are_those_of_the_built_denoiser(models, family):
    """With all that can be adapted, every linear; and a file of ours may name each of them."""
    model = models(family)
    others, linears = model.source.others(), tables.linears_of(model.denoiser)
    assert others == tables.find_others(model.denoiser) and others
    dead = model.family.without_effect(model.source.layers())
    assert sorted([*dead, *(layer.name for layer in model.layers)]) == sorted(linears)
    describe = tables.describer(family)
    for layer in model.layers:
        assert (layer.in_features, layer.out_features) == linears[layer.name]
        assert describe(layer.name, layer.in_features, layer.out_features) == layer
    blocks = {layer.block for layer in model.source.layers()}
    assert all(layer.kind == "other" and layer.block in {*blocks, ""} for layer in others)
    assert all(layer.name.startswith(f"{layer.block}.") for layer in others if layer.block)


@torch.no_grad()
def test_strengths_stacks_and_eject(models, tmp_path):
    """Each weight is held against its own sum, the model's bits against before."""
    model = models("flux1")
    denoiser, path = model.denoiser, tmp_path / "theirs.safetensors"
    wanted = of_everything(model, path, "by kohya's")
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    linears = {name: copy.deepcopy(denoiser.get_submodule(name)) for name in wanted}
    names = [
        "transformer_blocks.1.norm1.linear",
        "norm_out.linear",
        "context_embedder",
        "transformer_blocks.0.attn.to_k",
    ]
    first, second = (inject_file(denoiser, read_adapter(path)) for _ in range(2))
    for strengths in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5)):
        first.set_strength(strengths[0])
        second.set_strength(strengths[1])
        for name in names:
            x = torch.randn(2, linears[name].in_features, generator=torch.Generator().manual_seed(0))
            found, plain = denoiser.get_submodule(name)(x), linears[name](x)
            torch.testing.assert_close(found, plain + sum(strengths) * x @ wanted[name].T, rtol=1e-4, atol=1e-4)
            assert any(strengths) or torch.equal(found, plain)
    second.eject()
    first.eject()
    after = denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
@pytest.mark.parametrize("to", ["native", "lora", "diffusers", "merged"])
@pytest.mark.parametrize("family", ["sd3", "krea2"])
def test_every_format_holds_every_linear(models, tmp_path, family, to):
    """Read by suffix and shape, and the merged weights by their difference from the base's."""
    model, path = models(family), tmp_path / "theirs.safetensors"
    form = "by kohya's" if family == "sd3" else "by the original paths"
    wanted = of_everything(model, path, form)
    out = tmp_path / ("out" if to == "merged" else "out.safetensors")
    result = CliRunner().invoke(convert, [str(path), str(out), "--to", to, "--model", model.source.model])
    assert result.exit_code == 0, result.output + result.stderr
    names = wanted.keys() - set(model.family.without_effect(model.layers))
    if to == "merged":
        written = open_model(str(out)).load("denoiser", dtype=torch.float32)["denoiser"].state_dict()
        found = {name: written[f"{name}.weight"] - model.denoiser.state_dict()[f"{name}.weight"] for name in names}
    elif to == "diffusers":
        given = load_file(out)
        found = {
            name: given[f"transformer.{name}.lora_B.weight"] @ given[f"transformer.{name}.lora_A.weight"]
            for name in names
        }
        assert len(given) == 2 * len(names)
    else:
        given, found = load_file(out), {}
        for name in names:
            key = model.family.file_name(name)
            up, down, alpha = (given.pop(f"{key}.{end}") for end in ("lora_up.weight", "lora_down.weight", "alpha"))
            found[name] = up @ down * (alpha / len(down))
        assert not given
    for name in names:
        torch.testing.assert_close(found[name], wanted[name].float(), rtol=2e-2 if to != "merged" else 1e-3, atol=2e-2)


# ---- what cannot be read says why ------------------------------------------------------------------------------------

MOD, KOHYA_MOD = "transformer.transformer_blocks.0.norm1.linear", "diffusion_model.double_blocks.0.img_mod.lin"
TO_Q, QKV = "transformer.transformer_blocks.0.attn.to_q", "diffusion_model.double_blocks.0.img_attn.qkv"
LAST = "lora_unet_final_layer_adaLN_modulation_1"
REFUSED = {
    "rows": (lora(MOD, 380, 64), r"norm1.linear: lora_up.weight has shape \(380, 3\), not \(384, 3\)"),
    "columns": (lora(MOD, 384, 32), r"norm1.linear: lora_down.weight has shape \(3, 32\), not \(3, 64\)"),
    "ranks": (
        {**lora(MOD, 384, 64), f"{MOD}.lora_down.weight": torch.ones(4, 64)},
        r"norm1.linear: lora_up.weight has shape \(384, 3\), not \(384, 4\)",
    ),
    "no matrix": ({**lora(MOD, 384, 64), f"{MOD}.lora_up.weight": torch.ones(384)}, "not a matrix's"),
    "a number": ({**lora(MOD, 384, 64), f"{MOD}.lora_down.weight": torch.tensor(1.0)}, "not a matrix's"),
    "alphas": ({**lora(MOD, 384, 64), f"{MOD}.alpha": torch.ones(3)}, "norm1.linear: alpha has shape .3,., not one"),
    "rank 0": (
        {f"{MOD}.lora_up.weight": torch.ones(384, 0), f"{MOD}.lora_down.weight": torch.ones(0, 64)},
        "its rank is 0",
    ),
    "a bias alone": ({f"{MOD}.diff_b": torch.ones(384)}, "norm1.linear: tensor diff is missing"),
    "a bias too": ({f"{MOD}.diff": torch.ones(384, 64), f"{MOD}.diff_b": torch.ones(384)}, "diff_b is extra"),
    "LoKr": ({f"{MOD}.lokr_w1": torch.ones(6, 4), f"{MOD}.lokr_w2": torch.ones(60, 16)}, "do not make its 384 x 64"),
    "twice": ({**lora(MOD, 384, 64), **lora(KOHYA_MOD, 384, 64)}, f"layers {KOHYA_MOD} and {MOD} both adapt"),
    "fused and not": ({**lora(TO_Q, 64, 64), **lora(QKV, 192, 64)}, f"layers {QKV} and {TO_Q} both adapt"),
    "LoKr in another order": (
        {f"{LAST}.lokr_w1": torch.ones(2, 4), f"{LAST}.lokr_w2": torch.ones(64, 16)},
        f"layer {LAST} has its rows in another order .* only a LoRA",
    ),
    "rows in another order": (lora(LAST, 126, 64), f"layer {LAST} has 126 rows; shift and scale .* have 128"),
    "fused rows": (lora(QKV, 190, 64), f"layer {QKV} has 190 rows; q, k and v of this model have 192"),
    "a fused number": ({**lora(QKV, 192, 64), f"{QKV}.lora_up.weight": torch.tensor(1.0)}, f"layer {QKV} has 0 rows"),
    "a text conditioner": (
        lora("diffusion_model.llm_adapter.blocks.0.self_attn.q_proj", 64, 64),
        "adapts the text conditioner",
    ),
    "a text encoder": (lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 64, 64), "adapts a text encoder"),
    "another model": (
        {**lora(TO_Q, 64, 64), **lora("transformer.transformer_blocks.9.norm1.linear", 64, 64)},
        "transformer_blocks.9.norm1.linear is not in this model of family 'flux1' .1 of 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(models, tmp_path, what):
    model, path = models("flux1"), tmp_path / "theirs.safetensors"
    tensors, words = REFUSED[what]
    save_file(tensors, path)
    before = [type(module) for module in model.denoiser.modules()]
    with pytest.raises(ValueError, match=words) as caught:
        inject_file(model.denoiser, read_adapter(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert before == [type(module) for module in model.denoiser.modules()]
    result = CliRunner().invoke(
        convert, [str(path), str(tmp_path / "o.safetensors"), "--to", "native", "--model", model.source.model]
    )
    assert result.exit_code == 2 and not (tmp_path / "o.safetensors").exists()


def test_a_file_for_another_family_is_not_called_one_of_convolutions(models, tmp_path):
    save_file({**lora(KOHYA_MOD, 384, 64), **lora(QKV, 192, 64)}, tmp_path / "flux.safetensors")
    model = models("zimage")
    with pytest.raises(ValueError, match="of family 'zimage' .2 of 2 are not.: is the file for another"):
        inject_file(model.denoiser, read_adapter(tmp_path / "flux.safetensors"))


def test_diffsynths_names_are_pefts(models, tmp_path):
    name, sides = "transformer_blocks.0.img_mod.1", ("lora_B.default", "lora_A.default")
    save_file(lora(name, 384, 64, sides), tmp_path / "theirs.safetensors")
    file = identify(read_adapter(tmp_path / "theirs.safetensors"), models("qwenimage").layers, "qwenimage")
    up, down = lora(name, 384, 64).values()
    torch.testing.assert_close(merged.delta(file, file.layers[0]), up @ down)


# ---- where such files go ---------------------------------------------------------------------------------------------


def test_a_run_does_not_begin_with_what_it_would_not_train(models, tmp_path):
    model, theirs, native = models("flux1"), tmp_path / "theirs.safetensors", tmp_path / "native.safetensors"
    factors = {name: torch.ones(4, 4) for name in (f"{TO_Q}.lokr_w1", f"{MOD}.lokr_w1")}
    save_file({**factors, f"{TO_Q}.lokr_w2": torch.ones(16, 16), f"{MOD}.lokr_w2": torch.ones(96, 16)}, theirs)
    result = CliRunner().invoke(convert, [str(theirs), str(native), "--to", "native", "--model", model.source.model])
    assert result.exit_code == 0, result.output + result.stderr
    adapter = read_adapter(native).spec
    assert adapter is not None
    for path, words in ((theirs, "was not made by this project"), (native, "adapts .*norm1.linear .1 such., which is")):
        config = make_run(tmp_path, tmp_path / "run", train={"init_from": str(path)})
        config = config.model_copy(update={"adapter": adapter})
        with pytest.raises(ValueError, match=f"^train.init_from: .*{words}") as caught:
            check_start(config, model.source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["flux2", "qwenimage"])
def test_a_report_shows_every_linear(models, tmp_path, family):
    """Fused and modulating ones too, each kind under a name of its own."""
    model, path = models(family), tmp_path / "theirs.safetensors"
    of_everything(model, path, "by diffusers'")
    arguments = ["factors", str(path), "--model", model.source.model, "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(inspect, arguments)
    assert result.exit_code == 0, result.output + result.stderr
    assert f"{len(model.layers)} layers" in result.output
    file = identify(read_adapter(path), model.layers, family)
    found = plots._roles(spectra.measure(file.groups, file.layers))
    assert {"flux2": "single_stream_modulation.linear", "qwenimage": "img_mod.1"}[family] in found
    assert len(found) == len(set(found)) and ("self qkv" in found) == (family == "flux2")
