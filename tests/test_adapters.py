"""adapters/ against dense products, the paper's counts and LyCORIS. Tests run over the rows of ADAPTERS."""

from __future__ import annotations

import math

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

from diffusekrona_train.adapters import ADAPTERS, build_adapter, count_parameters, macs, plan, plan_notes
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer, layer_table

SPECS = {
    "krona": {"a1": 4, "a2": 8},
    "krona, other order": {"a1": 12, "a2": 4},
    "lora": {"type": "lora", "rank": 3, "alpha": 1.5},
    "lokr": {"type": "lokr", "rank": 1, "alpha": 2.0},
    "lokr, both split": {"type": "lokr", "rank": 1, "alpha": 2.0, "decompose_both": True},
    "lokr, whole": {"type": "lokr", "factor": 4, "full_matrix": True},
    "loha": {"type": "loha", "rank": 2, "alpha": 1.0},
    "loha, dense": {"type": "loha", "rank": 6},
    "full": {"type": "full"},
    "terms": {"type": "terms", "rank": 3, "rho": 2},
    "terms, rho 4": {"type": "terms", "rank": 2, "rho": 4},
    "terms, rho 1": {"type": "terms", "rank": 3, "rho": 1},
}
LAYER = Layer("block.attn1.to_q", 24, 32, "q", "self")


def build(name: str, *, layer: Layer = LAYER, random: bool = True, seed: int = 0, **more):
    spec = AdapterConfig(**{**SPECS.get(name, {}), **more})
    generator = torch.Generator().manual_seed(seed)
    adapter = build_adapter(spec, layer, plan(spec, [layer])[layer.name], generator)
    for parameter in adapter.parameters() if random else ():
        parameter.data.normal_(0, 0.5, generator=generator)
    return adapter


def x_of(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def test_every_type_is_tried_here():
    assert {AdapterConfig(**spec).type for spec in SPECS.values()} | {"dora", "oft"} == set(ADAPTERS)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("scale", [1.0, 0.7, -2.0])
def test_forward_is_the_dense_product(name, scale):
    adapter = build(name, scale=scale)
    adapter.strength = 0.5
    x = x_of(2, 5, 24)
    assert adapter.delta().shape == (32, 24) and adapter.delta().dtype == torch.float32
    torch.testing.assert_close(adapter(x), x @ adapter.delta().T, rtol=1e-5, atol=1e-5)
    unit = build(name)
    torch.testing.assert_close(adapter.delta(), unit.delta() * (scale * 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_products_take_the_type_of_x_and_gradients_stay_fp32(name, dtype):
    adapter = build(name, scale=0.7)
    y = adapter(x_of(5, 24, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert all(
        p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters()
    )


@pytest.mark.parametrize("name", SPECS)
def test_under_autocast(name):
    adapter = build(name, scale=0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(x_of(5, 24))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x_of(5, 24) @ adapter.delta().T, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("name", SPECS)
def test_starts_as_nothing_but_can_learn(name):
    adapter = build(name, random=False)
    assert torch.count_nonzero(adapter.delta()) == 0
    adapter(x_of(5, 24)).square().sum().backward()
    adapter(x_of(5, 24)).sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_masters_stay_fp32_bit_for_bit_when_the_model_moves(name, move):
    adapter = build(name)
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    move(torch.nn.ModuleList([adapter]))
    assert all(
        torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before, adapter.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", SPECS)
def test_file_tensors_rebuild_the_adapter(name):
    adapter, other = build(name, scale=0.7), build(name, scale=0.7, seed=5)
    tensors = adapter.file_tensors()
    shapes = type(adapter).shapes(LAYER, adapter.options, AdapterConfig(**SPECS[name]))
    assert {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()} == shapes
    adapter.strength = 0.1  # a runtime matter: not in files
    assert all(torch.equal(a, b) for a, b in zip(adapter.file_tensors().values(), tensors.values(), strict=True))
    other.load_file_tensors({suffix: tensor.double() for suffix, tensor in tensors.items()})
    adapter.strength = 1.0
    torch.testing.assert_close(other.delta(), adapter.delta(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SPECS)
def test_files_with_another_alpha_mean_what_their_writers_meant(name):
    """Readers of such files multiply by alpha / rank; types without a rank ignore alpha."""
    adapter, other = build(name), build(name, scale=0.7, seed=5)
    tensors = adapter.file_tensors()
    if "alpha" not in tensors:
        return
    tensors["alpha"] = tensors["alpha"] * 3
    ranked = "alpha" in adapter.options and name != "lokr, whole"
    other.load_file_tensors(tensors)
    torch.testing.assert_close(other.delta(), adapter.delta() * (3 if ranked else 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_bad_file_tensors_are_named(name):
    adapter = build(name)
    good = adapter.file_tensors()
    for suffix in good:
        with pytest.raises(ValueError, match=f"block.attn1.to_q: tensor {suffix} is missing"):
            adapter.load_file_tensors({key: value for key, value in good.items() if key != suffix})
        with pytest.raises(ValueError, match=f"block.attn1.to_q: tensor {suffix} has shape"):
            adapter.load_file_tensors({**good, suffix: torch.ones(2, 2, 2)})
        with pytest.raises(ValueError, match=f"block.attn1.to_q: tensor {suffix} holds NaN"):
            adapter.load_file_tensors({**good, suffix: torch.full_like(good[suffix], math.nan)})
    with pytest.raises(ValueError, match="unknown tensor dora_scale"):
        adapter.load_file_tensors({**good, "dora_scale": torch.ones(1)})
    assert all(torch.equal(a, b) for a, b in zip(adapter.file_tensors().values(), good.values(), strict=True))


@pytest.mark.parametrize(
    "init, std",
    [
        ("normal", 1 / 64),
        ("normal_dim", math.sqrt(1280)),
        ("normal_dim_reciprocal", 1 / math.sqrt(1280)),
        ("kaiming_uniform", 1 / math.sqrt(3 * 32)),
        ("xavier_uniform", math.sqrt(2 / (32 + 64))),
    ],
)
def test_spread_of_a_at_the_start(init, std):
    layer = Layer("a", 1280, 2560, "q", "self")
    adapter = build("", layer=layer, random=False, a1=32, a2=64, init_a=init)
    assert float(adapter.A.detach().std()) == pytest.approx(std, rel=0.1)
    assert abs(float(adapter.A.detach().mean())) < std / 5
    assert torch.count_nonzero(adapter.B) == 0
    again = build("", layer=layer, random=False, a1=32, a2=64, init_a=init)
    assert torch.equal(adapter.A, again.A)
    both = build("", layer=layer, random=False, a1=32, a2=64, init_a=init, init_b="same")
    assert torch.equal(adapter.A, both.A) and torch.count_nonzero(both.B) == both.B.numel()


def test_row_permutation_is_the_authors_layer():
    """ΔW[β*a_out+α, p*b_in+q] = U[β, q] * D[p, α], written out; U is B and D is A transposed."""
    spec = AdapterConfig(a1=4, a2=8)
    adapter = build_adapter(spec, LAYER, {"a1": 4, "a2": 8, "row_permutation": True})
    for parameter in adapter.parameters():
        parameter.data.normal_()
    D, U = adapter.A.detach().T, adapter.B.detach()
    expected = torch.einsum("bq,pa->bapq", U, D).reshape(32, 24)
    torch.testing.assert_close(adapter.delta(), expected)
    torch.testing.assert_close(adapter(x_of(5, 24)), x_of(5, 24) @ expected.T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, torch.kron(adapter.A.detach(), U))


def test_lokr_with_full_matrices_is_krona_with_equal_factors():
    lokr, krona = build("", type="lokr", factor=4, full_matrix=True), build("", a1=4, a2=4, seed=1)
    assert [p.shape for p in lokr.parameters()] == [p.shape for p in krona.parameters()]
    krona.load_file_tensors(lokr.file_tensors())
    assert torch.equal(krona.delta(), lokr.delta())
    assert torch.equal(krona(x_of(5, 24)), lokr(x_of(5, 24)))


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith(("lokr", "loha"))])
@pytest.mark.parametrize("widths", [(24, 32), (40, 40), (7, 12)])
def test_lycoris_has_the_same_shapes_and_reads_the_same_difference(name, widths):
    layer = Layer("a", *widths, "q", "self")
    spec = {**SPECS[name], **({"factor": 1} if widths[0] == 7 and name == "lokr, whole" else {})}
    adapter = build("", layer=layer, **spec)
    base = torch.nn.Linear(*widths)
    tensors = adapter.file_tensors()
    kind = LohaModule if name.startswith("loha") else LokrModule
    options = {key: adapter.options[key] for key in adapter.options.keys() - {"rank", "alpha"}}
    theirs = kind("a", base, lora_dim=adapter.options["rank"], alpha=float(tensors["alpha"]), **options)
    state = theirs.state_dict()
    assert {key: state[key].shape for key in tensors} == {key: value.shape for key, value in tensors.items()}
    theirs.load_state_dict({**state, **tensors})
    difference = theirs.get_diff_weight(shape=(widths[1], widths[0]))[0].detach()
    torch.testing.assert_close(difference, adapter.delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec, ffn, count",
    [
        ({}, False, 3_874_560),
        ({"a1": 2}, False, 7_534_080),
        ({"a1": 8}, False, 2_152_320),
        ({"a1": 16}, False, 1_506_240),
        ({"a1": 64, "a2": 4}, False, 3_874_560),
        ({}, True, 8_710_400),
        ({"type": "lora"}, False, 5_806_080),
        ({"type": "lokr", "factor": 2, "full_matrix": True}, False, 238_799_040),
        ({"type": "lokr", "factor": 8, "full_matrix": True}, False, 14_960_640),
        ({"type": "lokr", "rank": 8}, False, 904_640),
        ({"type": "lokr", "rank": 8}, True, 1_356_800),
        ({"type": "loha"}, False, 11_612_160),
        ({"type": "loha"}, True, 20_930_560),
        ({"type": "full"}, False, 955_187_200),
    ],
)
def test_counts_of_the_paper_on_sdxl(spec, ffn, count):
    layers = [layer for layer in layer_table("sdxl") if ffn or layer.kind != "ffn"]
    assert count_parameters(AdapterConfig(**spec), layers) == count


@pytest.mark.parametrize("name", SPECS)
def test_count_and_shapes_are_those_of_the_built_adapter(name):
    spec = AdapterConfig(**SPECS[name])
    adapter = build(name)
    assert count_parameters(spec, [LAYER]) == sum(parameter.numel() for parameter in adapter.parameters())
    assert 0 < macs(spec, LAYER, adapter.options) <= 2 * LAYER.in_features * LAYER.out_features


def test_multiplications_a_token_of_the_design():
    layer = Layer("a", 1280, 1280, "q", "self")
    for spec, expected in (({}, 30_720), ({"a1": 64, "a2": 4}, 30_720), ({"type": "lora"}, 10_240)):
        config = AdapterConfig(**spec)
        assert macs(config, layer, plan(config, [layer])["a"]) == expected


def test_factors_by_projection_and_width():
    spec = AdapterConfig(a1=4, a2=8, factors={"q": [2, 16]}, factors_by_width={32: [8, 4], 16: [3, 2]})
    layers = [Layer("q", 24, 32, "q", "self"), Layer("k", 24, 32, "k", "self"), Layer("v", 24, 16, "v", "self")]
    layers.append(Layer("o", 24, 64, "o", "self"))
    chosen = {name: (value["a1"], value["a2"]) for name, value in plan(spec, layers).items()}
    assert chosen == {"q": (2, 16), "k": (8, 4), "v": (3, 2), "o": (4, 8)}


def test_indivisible_widths_are_named_or_moved():
    with pytest.raises(
        ValueError, match="a1=7 does not divide the input width 24 of block.attn1.to_q.*divisors: 6 and 8"
    ):
        plan(AdapterConfig(a1=7, a2=8), [LAYER])
    with pytest.raises(ValueError, match="a2=100 does not divide the output width 32"):
        plan(AdapterConfig(a1=6, a2=100), [LAYER])
    spec = AdapterConfig(a1=7, a2=100, on_indivisible="nearest")
    options = plan(spec, [LAYER])
    assert options == {LAYER.name: {"a1": 6, "a2": 32}}
    assert any("1 x 24 -> 32: (a1, a2) (7, 100) -> (6, 32)" in line for line in plan_notes(spec, [LAYER], options))


def test_budgets_on_sdxl():
    layers = [layer for layer in layer_table("sdxl") if layer.kind != "ffn"]
    paper = AdapterConfig(params=4_000_000)
    assert set(map(str, plan(paper, layers).values())) == {"{'a1': 4, 'a2': 64}"}
    matched = AdapterConfig(match_lora_rank=4)
    count = count_parameters(matched, layers)
    assert 0.7 * 5_806_080 < count <= 5_806_080
    notes = plan_notes(matched, layers, plan(matched, layers))
    assert "allows 5,806,080" in notes[0] and f"chosen: {count:,} in 560 layers" in notes[0] and len(notes) == 5
    with pytest.raises(ValueError, match="adapter.params: 1000 allows 1,000 parameters.*need 1,443,840"):
        plan(AdapterConfig(params=1000), layers)


def test_the_authors_naming_is_told_apart_where_it_looks_like_it():
    layers = [Layer("a", 1280, 1280, "q", "self")]
    swapped, paper = AdapterConfig(a1=64, a2=8), AdapterConfig(a1=8, a2=64)
    assert any("(64, 8) is a1: 8, a2: 64 here" in line for line in plan_notes(swapped, layers, plan(swapped, layers)))
    assert plan_notes(paper, layers, plan(paper, layers)) == []
