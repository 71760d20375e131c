"""The baselines and study classes: rsLoRA, DoRA and OFT against PEFT, sums of Kronecker products against torch.kron."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model

from diffusekrona_train.adapters import ADAPTERS, build_adapter, formats, plan, spectra
from diffusekrona_train.adapters.formats.exports import EXPORTERS
from diffusekrona_train.adapters.grouped import AdaptedLinear
from diffusekrona_train.config import AdapterConfig, make_config
from diffusekrona_train.models.layers import Layer

LAYER = Layer("to_q", 32, 48, "q", "self")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q = torch.nn.Linear(32, 48)

    def forward(self, x):
        return self.to_q(x)


def wrapped(*, random: bool = True, **spec):
    """An adapter of this spec around a linear layer, with random factors of moderate size."""
    config, generator = AdapterConfig(**spec), torch.Generator().manual_seed(1)
    adapter = build_adapter(config, LAYER, plan(config, [LAYER])[LAYER.name], generator)
    module = AdaptedLinear(Net().to_q.requires_grad_(False), adapter)
    for name, parameter in adapter.named_parameters() if random else ():
        kept = parameter.data.clone() if name == "dora_magnitude" else 0
        parameter.data.normal_(0, 0.2, generator=generator).add_(kept)
    return module


def peft_model(config, values):
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        for key, value in values.items():
            if key in name:
                parameter.data.copy_(value)
    return model


def compare(module, model, names):
    """Outputs, gradients of the input and of every factor are PEFT's."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = module(mine), model(theirs)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    (y * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    parameters = dict(model.named_parameters())
    for name, part in names.items():
        (key,) = [key for key in parameters if part in key]
        own, other = module.adapter.get_parameter(name).grad, parameters[key].grad
        torch.testing.assert_close(own, other.view_as(own), rtol=1e-4, atol=1e-4)


def test_dora_is_pefts():
    module = wrapped(type="dora", rank=4, alpha=6.0)
    a = module.adapter
    values = {"lora_A": a.dora_down, "lora_B": a.dora_up, "lora_magnitude_vector": a.dora_magnitude}
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q"])
    compare(module, peft_model(config, {key: value.detach() for key, value in values.items()}), {
        "dora_down": "lora_A", "dora_up": "lora_B", "dora_magnitude": "lora_magnitude_vector",
    })  # fmt: skip


@pytest.mark.parametrize("block", [4, 16])
def test_oft_is_pefts_with_the_exact_cayley_transform(block):
    module = wrapped(type="oft", block_size=block)
    config = OFTConfig(r=0, oft_block_size=block, use_cayley_neumann=False, target_modules=["to_q"])
    compare(module, peft_model(config, {"oft_R": module.adapter.rotation.detach()}), {"rotation": "oft_R"})
    R = torch.eye(block) + module.adapter.rotations().detach()
    torch.testing.assert_close(R @ R.mT, torch.eye(block).expand_as(R), rtol=1e-5, atol=1e-5)


def test_rslora_is_pefts():
    module = wrapped(type="lora", rank=9, alpha=6.0, rank_scale="rs")
    a = module.adapter
    config = LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules=["to_q"])
    model = peft_model(config, {"lora_A": a.lora_down.detach(), "lora_B": a.lora_up.detach()})
    compare(module, model, {"lora_down": "lora_A", "lora_up": "lora_B"})
    tensors = a.file_tensors()  # what any reader makes of the file
    dense = tensors["lora_up.weight"] @ tensors["lora_down.weight"] * tensors["alpha"] / 9
    torch.testing.assert_close(dense, a.delta())


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_over_a_base_the_adapter_begins_as_nothing_and_is_the_dense_difference(kind):
    fresh = wrapped(random=False, type=kind)
    x = torch.randn(7, 32)
    assert torch.equal(fresh(x), fresh.base(x))
    module = wrapped(type=kind, scale=0.7)
    module.adapter.strength = 0.5
    delta = module.adapter.delta()
    torch.testing.assert_close(module(x) - module.base(x), x @ delta.T, rtol=1e-4, atol=1e-5)
    weight = module.base.weight.clone()
    module.fuse()
    torch.testing.assert_close(module.base.weight, weight + delta)
    module.unfuse()
    assert torch.equal(module.base.weight, weight)
    again = wrapped(type=kind, scale=0.7)
    for parameter in again.adapter.parameters():
        parameter.data.zero_()
    again.adapter.load_file_tensors(module.adapter.file_tensors())
    torch.testing.assert_close(again.adapter.delta(), module.adapter.delta() * 2)
    y = module(x.to(torch.bfloat16).float())
    assert y.dtype == torch.float32


@pytest.mark.parametrize("kind", ["dora", "oft"])
def test_fused_beside_another_adapter_it_still_means_its_own_base(kind):
    inner = wrapped(type=kind)
    config = AdapterConfig(type="lora", rank=2)
    other = build_adapter(config, LAYER, plan(config, [LAYER])[LAYER.name], torch.Generator().manual_seed(7))
    for parameter in other.parameters():
        parameter.data.normal_(0, 0.2)
    outer = AdaptedLinear(inner, other)
    weight = inner.base.weight.clone()
    wanted = weight + inner.adapter.delta() + other.delta()
    inner.fuse()
    outer.fuse()
    torch.testing.assert_close(inner.base.weight, wanted)
    outer.unfuse()
    inner.unfuse()
    assert torch.equal(inner.base.weight, weight)


@pytest.mark.parametrize("rho", [1, 2, 4])
def test_a_sum_of_terms_is_a_sum_of_krons_with_an_exact_lora(rho):
    module = wrapped(type="terms", rank=3, rho=rho, scale=0.7)
    a = module.adapter
    dense = 0.7 * sum(torch.kron(A, B) for A, B in zip(a.terms_a.detach(), a.terms_b.detach(), strict=True))
    torch.testing.assert_close(a.delta(), dense)
    up, down = spectra.lora_pair(a.file_tensors()) or (None, None)
    assert up is not None and up.shape[1] == 3 * rho**2
    torch.testing.assert_close(up @ down, dense, rtol=1e-4, atol=1e-5)
    count = sum(parameter.numel() for parameter in a.parameters())
    assert count == 3 * (32 + 48)  # LoRA's, whatever rho
    values = spectra.singular_values(a.file_tensors())
    wanted = torch.linalg.svdvals(dense.double())[: len(values)]
    torch.testing.assert_close(values[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["terms", "dora", "oft"])
def test_files_load_back_and_exports_are_exact_or_refused(kind, tmp_path):
    from diffusekrona_train.adapters.inject import inject
    from tests.tiny import make_unet

    unet = make_unet("sd15")
    spec = AdapterConfig(type=kind, rank=2, targets=["q", "v"], **({"block_size": 8} if kind == "oft" else {}))
    injection = inject(unet, spec)
    for parameter in injection.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)), alpha=0.1)
    deltas = {name: adapter.delta() for name, adapter in injection.adapters.items()}
    path = tmp_path / "a.safetensors"
    formats.save_adapter(path, injection, {"family": "sd"})
    injection.eject()
    loaded = formats.load_adapter(unet, path)
    for name, adapter in loaded.adapters.items():
        torch.testing.assert_close(adapter.delta(), deltas[name], rtol=1e-5, atol=1e-7)
    file = formats.read_adapter(path)
    assert file.metadata["ss_network_module"] == "diffusekrona"
    for to in ("lora", "diffusers", "lokr"):
        target = tmp_path / f"{to}.safetensors"
        if kind == "terms" and to != "lokr":
            EXPORTERS[to](file, target, dtype="fp32")
            assert target.is_file()
            continue
        with pytest.raises(ValueError, match=f"a.safetensors: (is a {kind} adapter|holds {kind})"):
            EXPORTERS[to](file, target, dtype="fp32")
        assert not target.exists()
    if kind == "terms":
        loaded.eject()
        exported = formats.load_adapter(unet, tmp_path / "lora.safetensors")
        for name, adapter in exported.adapters.items():
            torch.testing.assert_close(adapter.delta(), deltas[name], rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=f"is a {kind} adapter, which changes with its base"):
            formats.merge(make_unet("sd15"), file)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"adapter": {"type": "dora"}, "train": {"quantize": "nf4"}},
            "type: dora needs the base's own weights",
        ),
        ({"adapter": {"type": "oft"}, "train": {"memory": "nf4"}}, "adapter.type: oft needs the base's own weights"),
        (
            {"adapter": {"type": "oft"}, "train": {"rate_unit": "dw"}},
            "dw has no rates for adapter.type: oft",
        ),
        ({"adapter": {"rho": 4}}, "rho is for type: terms, and type is krona"),
        ({"adapter": {"block_size": 8}}, "block_size is for type: oft, and type is krona"),
        ({"adapter": {"rank_scale": "rs"}}, "rank_scale is for type: lora or lokr or loha or dora"),
    ],
)
def test_what_a_type_cannot_do_is_one_line(sections, line):
    with pytest.raises(ValueError, match=line):
        make_config({"subject": {"images": "x", "class": "dog"}, "output": "runs/x", **sections})


def test_a_part_that_does_not_divide_a_width_is_named_with_its_neighbours():
    for spec, line in (
        ({"type": "oft", "block_size": 12}, "block_size=12 does not divide the input width 32 of to_q.*8 and 16"),
        ({"type": "terms", "rho": 5}, "rho=5 does not divide the input width 32 of to_q; nearest divisors: 4 and 8"),
    ):
        with pytest.raises(ValueError, match=line):
            plan(AdapterConfig(**spec), [LAYER])


def test_a_quantised_layer_is_refused():
    base = torch.nn.Linear(32, 48)
    base.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    adapter = ADAPTERS["dora"](LAYER, {"rank": 2, "alpha": 2.0}, AdapterConfig(type="dora", rank=2))
    with pytest.raises(ValueError, match="dora needs the weights of to_q unquantised; set train.quantize: none"):
        AdaptedLinear(base, adapter)
