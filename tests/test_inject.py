"""Injecting adapters, on small UNets of the real layouts and a small attention model of our own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusekrona_train.adapters.grouped import AdaptedLinear
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import find_layers, select_layers
from tests.tiny import make_unet

SPECS = {
    "krona": {"a1": 4, "a2": 8},
    "lora": {"type": "lora"},
    "lokr": {"type": "lokr", "rank": 1},
    "loha": {"type": "loha", "rank": 2},
    "full": {"type": "full"},
    "full, all": {"type": "full", "targets": "all"},
}


class Attention(nn.Module):
    """By role alone: no name and no attribute of diffusers."""

    def __init__(self, width: int, context: int | None = None):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x, context=None):
        context = x if context is None else context
        y = F.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))
        return x + self.to_out[0](y)


class Block(nn.Module):
    def __init__(self, width: int = 16, context: int = 24):
        super().__init__()
        self.norm, self.mix, self.ask = nn.LayerNorm(width), Attention(width), Attention(width, context)
        self.feed = nn.Module()
        self.feed.net = nn.ModuleList([nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)])
        self.to_queue = nn.Linear(width, width)  # named like a projection, without its role

    def forward(self, x, context):
        x = self.ask(self.mix(self.norm(x)), context)
        for step in self.feed.net:  # type: ignore[union-attr]
            x = step(x)
        return self.to_queue(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def inputs(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 16, generator=generator).to(dtype), torch.randn(2, 3, 24, generator=generator).to(dtype)


def injected(model: nn.Module, *, seed: int = 0, **spec):
    injection = inject(model, AdapterConfig(**{"a1": 4, "a2": 8, **spec}), seed=seed)
    generator = torch.Generator().manual_seed(seed + 7)
    for parameter in injection.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return injection


def fingerprint(model: nn.Module) -> list:
    """Everything that eject has to restore: modules and their classes, parameters in order, their bits and flags."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    tensors = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    return [modules, tensors, [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]]


def assert_same(before: list, after: list) -> None:
    assert before[0] == after[0] and before[2] == after[2] and list(before[1]) == list(after[1])
    for name, (dtype, tensor) in before[1].items():
        assert dtype == after[1][name][0] and torch.equal(tensor, after[1][name][1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_eject_restores_the_model_bit_for_bit(model, name, dtype):
    model.to(dtype)
    model.blocks[0].norm.requires_grad_(False)
    before, y = fingerprint(model), model(*inputs(dtype))
    injection = injected(model, **SPECS[name])
    changed = model(*inputs(dtype))
    assert changed.dtype == dtype and not torch.allclose(changed, y)
    with injection.disabled():
        assert torch.equal(model(*inputs(dtype)), y)
    injection.set_strength(0)
    assert torch.equal(model(*inputs(dtype)), y)
    injection.set_strength(1)
    assert torch.equal(model(*inputs(dtype)), changed)
    assert injection.eject() is model
    assert_same(before, fingerprint(model))
    assert torch.equal(model(*inputs(dtype)), y)


@pytest.mark.parametrize("name", SPECS)
def test_only_the_adapters_train_and_they_all_do(model, name):
    injection = injected(model, **SPECS[name])
    model(*inputs()).square().sum().backward()
    injection.assert_fp32()
    own = {id(parameter) for parameter in injection.parameters()}
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in injection.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in own)
    assert injection.count == sum(parameter.numel() for parameter in injection.parameters())


def test_output_is_that_of_the_changed_weights(model):
    dense = copy.deepcopy(model)
    injection = injected(model, scale=0.7, ffn=True)
    injection.set_strength(0.5)
    for name, adapter in injection.adapters.items():
        dense.get_submodule(name).weight.data += adapter.delta()
    torch.testing.assert_close(model(*inputs()), dense(*inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fuse_rounds_the_fp32_sum_once_and_unfuse_restores(model, name, dtype):
    model.to(dtype)
    originals = {key: value.clone() for key, value in model.state_dict().items()}
    before = fingerprint(model)
    injection = injected(model, **SPECS[name])
    y = model(*inputs(dtype))
    injection.fuse()
    fused = model(*inputs(dtype))
    torch.testing.assert_close(fused, y, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    for layer, adapter in injection.adapters.items():
        weight = model.get_submodule(layer).weight
        assert torch.equal(weight, (originals[f"{layer}.weight"].float() + adapter.delta()).to(dtype))
    injection.fuse()  # again changes nothing
    assert torch.equal(model(*inputs(dtype)), fused)
    with pytest.raises(ValueError, match="unfuse"):
        injection.set_strength(0.5)
    injection.unfuse()
    assert torch.equal(model(*inputs(dtype)), y)
    injection.fuse()
    injection.eject()
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("name", SPECS)
def test_fused_for_good_is_the_same_without_a_second_copy(model, name):
    injection = injected(model, **SPECS[name])
    injection.fuse()
    fused = {layer: model.get_submodule(layer).weight.clone() for layer in injection.adapters}
    injection.unfuse()
    injection.fuse(keep=False)
    assert all(torch.equal(model.get_submodule(layer).weight, weight) for layer, weight in fused.items())
    assert not any("_unfused_weight" in module.__dict__ for module in model.modules())
    injection.fuse(keep=False)  # again changes nothing
    assert all(torch.equal(model.get_submodule(layer).weight, weight) for layer, weight in fused.items())
    for undo in (injection.unfuse, injection.eject):
        with pytest.raises(ValueError, match="fused permanently"):
            undo()


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_subjects_on_one_model(model, first_out):
    before, y = fingerprint(model), model(*inputs())
    pair = [injected(model, seed=1), injected(model, seed=2, type="lora", targets=["q", "o"])]
    assert not {id(p) for p in pair[0].parameters()} & {id(p) for p in pair[1].parameters()}
    both = model(*inputs())
    both.sum().backward()
    assert all(p.grad is not None for injection in pair for p in injection.parameters())
    pair[0].fuse()
    pair[1].fuse()
    torch.testing.assert_close(model(*inputs()), both, rtol=1e-4, atol=1e-5)
    pair[0].unfuse()
    pair[1].unfuse()
    with pair[0].disabled(), pair[1].disabled():
        assert torch.equal(model(*inputs()), y)
    kept = pair[1 - first_out]
    pair[first_out].eject()
    alone = model(*inputs())
    assert not torch.allclose(alone, y) and not torch.allclose(alone, both)
    kept.eject()
    assert_same(before, fingerprint(model))


def test_disabled_restores_strengths_after_an_error(model):
    injection = injected(model)
    injection.set_strength(0.3)
    with pytest.raises(RuntimeError), injection.disabled():
        raise RuntimeError
    assert {adapter.strength for adapter in injection.adapters.values()} == {0.3}


def test_a_layers_start_depends_on_seed_and_name_alone(model):
    def start(**spec):
        injection = inject(copy.deepcopy(model), AdapterConfig(a1=4, a2=8, **spec), seed=3)
        return {name: value.clone() for name, value in injection.state_dict().items()}

    everything, some = start(), start(targets=["v"], blocks=["blocks.1"])
    assert 0 < len(some) < len(everything)
    assert all(torch.equal(everything[name], value) for name, value in some.items())
    A = [value for name, value in everything.items() if name.endswith("|A")]
    assert len({tuple(a.flatten().tolist()) for a in A}) == len(A)


def test_masters_survive_a_move_of_the_model(model):
    injection = injected(model)
    before = {name: value.clone() for name, value in injection.state_dict().items()}
    model.to(torch.bfloat16)
    injection.assert_fp32()
    assert all(torch.equal(before[name], value) for name, value in injection.state_dict().items())
    assert model(*inputs(torch.bfloat16)).dtype == torch.bfloat16


def test_state_goes_round_and_wrong_state_is_named(model):
    injection, other = injected(model), injected(Model(), seed=5)
    state = {name: value.clone() for name, value in injection.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    first = next(iter(state))
    with pytest.raises(ValueError, match="is missing"):
        other.load_state_dict({name: value for name, value in state.items() if name != first})
    with pytest.raises(ValueError, match="stranger is unknown"):
        other.load_state_dict({**state, "stranger": torch.ones(1)})
    with pytest.raises(ValueError, match="has shape"):
        other.load_state_dict({**state, first: torch.ones(1)})


def test_options_name_the_layers(model):
    first = injected(model, targets=["q"], blocks=["blocks.0"])
    again = inject(Model(), first.spec, options={name: {"a1": 2, "a2": 4} for name in first.options})
    assert list(again.adapters) == list(first.adapters)
    assert next(iter(again.adapters.values())).A.shape == (4, 2)
    with pytest.raises(ValueError, match="blocks.9.mix.to_q is not a layer of this Model that can be adapted"):
        inject(Model(), first.spec, options={"blocks.9.mix.to_q": {"a1": 2, "a2": 4}})


def names(layers) -> list[str]:
    return [layer.name for layer in layers]


def test_layers_are_found_by_role(model):
    layers = find_layers(model, AdapterConfig())
    assert len(layers) == 16 and "to_queue" not in " ".join(names(layers))
    assert {(layer.kind, layer.projection) for layer in layers} == {(k, p) for k in ("self", "cross") for p in "qkvo"}
    assert (layers[5].name, layers[5].in_features, layers[5].kind) == ("blocks.0.ask.to_k", 24, "cross")
    assert names(find_layers(model, AdapterConfig(targets=["k"], attention="cross"))) == [
        "blocks.0.ask.to_k",
        "blocks.1.ask.to_k",
    ]
    with_ffn = find_layers(model, AdapterConfig(ffn=True, blocks=["blocks.1"]))
    assert names(with_ffn)[-2:] == ["blocks.1.feed.net.0", "blocks.1.feed.net.2"] and len(with_ffn) == 10
    assert names(find_layers(model, AdapterConfig(blocks=["blocks.?.mix"]))) == names(layers[:4] + layers[8:12])
    everything = find_layers(model, None)
    for spec in (AdapterConfig(), AdapterConfig(ffn=True), AdapterConfig(attention="self", targets=["q", "v"])):
        assert select_layers(everything, spec) == find_layers(model, spec)
    injected(model)
    assert find_layers(model, None) == everything


def test_what_matches_nothing_is_an_error_with_near_misses(model):
    with pytest.raises(ValueError, match=r"adapter.blocks: 'block.3' matches no layer; near: .*blocks"):
        find_layers(model, AdapterConfig(blocks=["blocks.0", "block.3"]))
    with pytest.raises(ValueError, match="near: blocks.0"):
        find_layers(model, AdapterConfig(blocks=["something else entirely"]))
    with pytest.raises(ValueError, match="Linear has no attention module with to_q, to_k, to_v and to_out"):
        find_layers(nn.Linear(2, 2), AdapterConfig())
    with pytest.raises(ValueError, match="match no layer; the model has layers of these kinds: self"):
        find_layers(Attention(8), AdapterConfig(attention="cross"))
    before = fingerprint(model)
    with pytest.raises(ValueError, match="a1=5 does not divide"):
        inject(model, AdapterConfig(a1=5))
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("kind, attentions", [("sd15", 32), ("sd21", 32), ("sdxl", 34)])
def test_unets_of_each_family(kind, attentions):
    unet = make_unet(kind)
    layers = find_layers(unet, AdapterConfig())
    linears = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(names(layers)) == sorted(name for name in linears if ".attn1." in name or ".attn2." in name)
    assert sorted(names(find_layers(unet, None))) == sorted(
        n for n in linears if any(p in n for p in (".attn", ".ff."))
    )
    assert len(layers) == 4 * attentions
    for layer in layers:
        assert layer.kind == ("self" if ".attn1." in layer.name else "cross")
        assert f".to_{'out.0' if layer.projection == 'o' else layer.projection}" in layer.name
    before = fingerprint(unet)
    call = unet_call(unet)
    y = call()
    injection = injected(unet, a1=4, a2=4)
    changed = call()
    assert not torch.allclose(changed, y)
    injection.fuse()
    torch.testing.assert_close(call(), changed, rtol=1e-4, atol=1e-4)
    injection.eject()
    assert torch.equal(call(), y)
    assert_same(before, fingerprint(unet))


def unet_call(unet):
    width = unet.config.cross_attention_dim
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, width)
    added = None
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.zeros(1, 6)}
    return lambda: unet(x, torch.tensor([10]), text, added_cond_kwargs=added).sample.detach()


def test_a_transformer_with_the_same_roles():
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    inputs = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 16), torch.randn(1, 16), torch.tensor([1])
    y = transformer(*inputs).sample
    injection = injected(transformer, a1=2, a2=4)
    # The last block has no output of the text stream, so the query of its text has no gradient either.
    text = [name for name in injection.adapters if "add_" in name]
    assert len(injection.adapters) == 14 and len(text) == 6 and not torch.allclose(transformer(*inputs).sample, y)
    injection.eject()
    assert torch.equal(transformer(*inputs).sample, y)


def quantised(kind: str):
    import bitsandbytes as bnb

    dense = nn.Linear(64, 64, bias=False)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantised_base(kind):
    torch.manual_seed(0)
    model = Attention(64)
    for role in ("to_q", "to_k", "to_v"):
        setattr(model, role, quantised(kind))
    model.to_out[0].to(torch.bfloat16)
    x = torch.randn(2, 3, 64).to(torch.bfloat16)
    model(x)  # int8 settles its weight at the first call
    y, before = model(x), model.to_q.weight.clone()
    injection = injected(model, a1=4, a2=8)
    injection.assert_fp32()
    base = model.to_q.base(x)
    q = model.to_q(x)
    assert q.dtype == base.dtype == torch.bfloat16
    expected = base.float() + x.float() @ injection.adapters["to_q"].delta().T
    torch.testing.assert_close(q.float(), expected, rtol=0.05, atol=0.05)
    model(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in injection.parameters())
    with pytest.raises(ValueError, match="to_q is torch.u?int8 .*load it unquantized"):
        injection.fuse()
    assert not injection.fused
    with injection.disabled():
        assert torch.equal(model(x), y)
    injection.eject()
    assert torch.equal(model(x), y) and torch.equal(model.to_q.weight, before)
    with pytest.raises(ValueError, match="load it unquantized"):
        inject(model, AdapterConfig(type="full", targets="all"))


def test_checkpointed_and_compiled_layers_agree(model):
    injection = injected(model)
    layer, x = model.blocks[0].mix.to_q, inputs()[0].requires_grad_()
    assert isinstance(layer, AdaptedLinear)
    runs = {
        "plain": layer,
        "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
        "compiled": torch.compile(layer, backend="aot_eager", fullgraph=True),
    }
    gradients = {}
    for name, run in runs.items():
        for parameter in injection.parameters():
            parameter.grad = None
        run(x).square().sum().backward()
        gradients[name] = [layer.adapter.A.grad.clone(), layer.adapter.B.grad.clone()]
    for name in ("checkpointed", "compiled"):
        torch.testing.assert_close(gradients[name], gradients["plain"])


def test_whole_denoiser_trains_every_parameter_and_its_files_rebuild_it(model):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    clean = copy.deepcopy(model)
    injection = injected(model, type="full", targets="all", scale=0.5)
    assert injection.count == parameters
    other = injected(clean, type="full", targets="all", scale=0.5, seed=4)
    for name, adapter in injection.adapters.items():
        tensors = adapter.file_tensors()
        assert set(tensors) <= {"diff", "diff_b"} and all(t.dtype == torch.float32 for t in tensors.values())
        other.adapters[name].load_file_tensors(tensors)
    torch.testing.assert_close(clean(*inputs()), model(*inputs()))
    with pytest.raises(ValueError, match="blocks.0.norm: tensor diff_b is missing"):
        other.adapters["blocks.0.norm"].load_file_tensors({"diff": torch.ones(16)})
    with pytest.raises(ValueError, match="without other adapters"):
        inject(model, AdapterConfig(type="full", targets="all"))
