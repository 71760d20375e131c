"""Adapters that train together (flat, grouped, products), against explicit dense weights and against autograd."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from diffusekrona_train.adapters.flat import ALIGN, SPARE
from diffusekrona_train.adapters.grouped import Group
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.training.optimizer import Descent
from tests.runs import make_run
from tests.test_inject import Model, injected, inputs
from tests.test_train import OneProcess

SPECS = {
    "B first": {"a1": 4, "a2": 8},
    "A first": {"a1": 8, "a2": 2},
    "scaled": {"a1": 4, "a2": 8, "scale": 0.7},
    "lora": {"type": "lora", "rank": 3, "alpha": 2.0},
    "lokr": {"type": "lokr", "full_matrix": True},
    "ffn too": {"a1": 4, "a2": 8, "ffn": True},
}


def model(dtype=torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def dense_gradients(net: Model, injection: Injection, x, context) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Output, gradients of the factors and of x where each weight is W + ΔW, by autograd alone, all in fp64."""
    plain = model()
    factors = {name: value.detach().double().requires_grad_() for name, value in injection.named_parameters()}
    weights = {}
    for layer, adapter in injection.adapters.items():
        own = {name.partition("|")[2]: value for name, value in factors.items() if name.startswith(layer + "|")}
        if {"lora_up", "lora_down"} <= set(own):
            product = own["lora_up"] @ own["lora_down"]
        else:
            product = torch.kron(*own.values())
        base = net.get_submodule(layer).weight.detach()
        weights[f"{layer}.weight"] = base + adapter.multiplier * product
    x = x.detach().clone().requires_grad_()
    y = torch.func.functional_call(plain, weights, (x, context))
    grads = torch.autograd.grad(y.square().sum(), [x, *factors.values()])
    return y.detach(), dict(zip(factors, grads[1:], strict=True)), grads[0]


def staged(injection: Injection, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """The gradients before they are rounded to fp32."""
    flat = injection.flat
    assert flat is not None
    return {segment.name: segment.of(flat.stage(dtype)) for segment in flat.segments}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("way", ["plain", "checkpointed", "twice"])
def test_gradients_are_those_of_the_dense_weights(name, way):
    net = model()
    injection = injected(net, **SPECS[name])
    x, context = inputs(torch.float64)
    y, wanted, grad_x = dense_gradients(net, injection, x, context)
    flat = injection.flatten()
    x.requires_grad_()
    if way == "twice":  # both passes in one backward: the first one's gradients are put away in fp32
        (net(x, context).square().sum() + net(x, context).square().sum()).backward()
        flat.flush()
        for key, parameter in injection.named_parameters():
            torch.testing.assert_close(parameter.grad, 2 * wanted[key].float(), rtol=1e-5, atol=1e-6)
        return
    out = recomputed(net, x, context, use_reentrant=False) if way == "checkpointed" else net(x, context)
    out.square().sum().backward()
    torch.testing.assert_close(out, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, grad_x, rtol=1e-12, atol=1e-12)
    assert wanted.keys() == staged(injection).keys()
    for key, value in staged(injection).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-12, atol=1e-12)
    flat.flush()
    assert not any(value.any() for value in staged(injection).values())
    for key, parameter in injection.named_parameters():
        assert torch.equal(parameter.grad, wanted[key].float()) or torch.allclose(parameter.grad, wanted[key].float())


def test_layers_with_one_input_are_computed_together():
    net = model()
    injection = injected(net)
    flat = injection.flatten()
    sizes = Counter(len(layers) for _, layers, _ in flat.layout)
    assert sizes == {3: 2, 4: 1, 1: 2 * 3}  # q, k, v of two blocks; k, v of both; and self o, cross q, cross o
    lanes = {name: adapter.lane for name, adapter in injection.adapters.items()}
    together = Counter(lane.group for lane in lanes.values())
    assert Counter(together.values()) == {3: 2, 2: 2, 1: 2 * 3}
    assert lanes["blocks.0.mix.to_q"].group is lanes["blocks.0.mix.to_v"].group
    assert lanes["blocks.0.ask.to_k"].group is lanes["blocks.0.ask.to_v"].group
    assert lanes["blocks.0.ask.to_q"].group is not lanes["blocks.0.ask.to_k"].group


def test_a_member_that_is_not_called_has_no_gradient():
    net = model()
    injection = injected(net)
    flat = injection.flatten()
    mix = net.blocks[0].mix
    x, _ = inputs(torch.float64)
    (mix.to_q(x) + mix.to_v(x)).square().sum().backward()
    flat.flush()
    grads = {name: parameter.grad.abs().sum().item() for name, parameter in injection.named_parameters()}
    assert all((grads[f"blocks.0.mix.{layer}|B"] > 0) == (layer != "to_k") for layer in ("to_q", "to_k", "to_v"))


def test_the_operator_gives_the_same():
    for spec in (SPECS["B first"], SPECS["A first"], SPECS["scaled"]):
        found = {}
        for chosen in (False, True):
            net = model(torch.float32)
            injection = injected(net, **spec)
            flat = injection.flatten(by_operator=lambda *_, chosen=chosen: chosen)
            x, context = inputs()
            x.requires_grad_()
            y = net(x, context)
            y.square().sum().backward()
            flat.flush()
            found[chosen] = [y.detach(), x.grad, *(p.grad for p in injection.parameters())]
        for mine, theirs in zip(found[True], found[False], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_use_a_shadow_that_follows_the_factors(dtype):
    net = model(dtype)
    injection = injected(net)
    x, context = inputs(dtype)
    before = net(x, context).float()
    flat = injection.flatten()
    torch.testing.assert_close(net(x, context).float(), before, rtol=2e-2, atol=2e-2)
    injection.load_state_dict({name: value * 2 for name, value in injection.state_dict().items()})
    changed = net(x, context)
    other = model(dtype)
    twice = injected(other)
    twice.load_state_dict(injection.state_dict())
    torch.testing.assert_close(changed, other(x, context), rtol=3e-2, atol=3e-2)
    assert not torch.allclose(changed.float(), before, rtol=2e-2, atol=2e-2)
    net(x, context).float().square().sum().backward()
    flat.flush()
    other(x, context).float().square().sum().backward()
    for mine, theirs in zip(injection.parameters(), twice.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - theirs.grad).norm() <= 0.05 * theirs.grad.norm()


def test_strengths_and_stacks_work_while_training():
    net = model(torch.float32)
    x, context = inputs()
    y = net(x, context)
    first, second = injected(net, seed=1), injected(net, seed=2, type="lora", targets=["q", "k", "v"])
    both = net(x, context)
    both.square().sum().backward()
    wanted = {id(p): p.grad.clone() for injection in (first, second) for p in injection.parameters()}
    for injection in (first, second):
        for parameter in injection.parameters():
            parameter.grad = None
    flats = [first.flatten(), second.flatten()]
    again = net(x, context)
    torch.testing.assert_close(again, both)
    again.square().sum().backward()
    for flat in flats:
        flat.flush()
    for injection in (first, second):
        for parameter in injection.parameters():
            torch.testing.assert_close(parameter.grad, wanted[id(parameter)], rtol=1e-4, atol=1e-4)
    with first.disabled(), second.disabled():
        assert torch.equal(net(x, context), y)
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x, context), both)


def test_bases_that_are_not_plain_keep_their_own_gradient():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes as bnb

    torch.manual_seed(0)
    net = nn.Module()
    net.attn1 = Model().blocks[0].mix
    for name in ("to_q", "to_k", "to_v"):
        linear = getattr(net.attn1, name)
        new = bnb.nn.Linear4bit(16, 16, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        setattr(net.attn1, name, new.to("cpu"))
    x, _ = inputs()
    found = []
    for flat in (False, True):
        injection = injected(net)
        buffers = injection.flatten() if flat else None
        x.grad = None
        x.requires_grad_()
        y = net.attn1(x)
        y.square().sum().backward()
        if buffers:
            buffers.flush()
        found.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in injection.parameters())])
        injection.eject()
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_still_works():
    net = model(torch.float32)
    injection = injected(net)
    x, context = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x, context)
        injection.flatten()
        after = net(x, context)
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
    after.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in injection.parameters())


def test_nothing_of_a_checkpointed_pass_is_kept(monkeypatch):
    """x and z of a recomputed region die with it: what nodes exchange holds no activation in the meantime."""
    net = model()
    injected(net).flatten()
    x, context = inputs(torch.float64)
    x.requires_grad_()
    import weakref

    seen = []
    enter = Group.enter
    monkeypatch.setattr(Group, "enter", lambda self, rows: (seen.append(weakref.ref(z := enter(self, rows))), z)[1])
    y = recomputed(net, x, context, use_reentrant=False)
    assert seen and all(reference() is None for reference in seen)
    y.sum().backward()


# ---- the flat buffers ------------------------------------------------------------------------------------------------


def test_segments_lie_on_blocks_and_are_views():
    injection = injected(model(torch.float32), ffn=True)
    before = {name: value.clone() for name, value in injection.state_dict().items()}
    flat = injection.flatten()
    assert len(flat.buffer) == flat.size + SPARE and flat.size % ALIGN == 0
    assert {segment.name for segment in flat.segments} == before.keys()
    assert all(segment.start % ALIGN == 0 and segment.slot == 0 for segment in flat.segments)
    taken = torch.zeros(flat.size)
    for segment in flat.segments:
        assert torch.equal(segment.of(flat.master.detach()), before[segment.name])
        segment.of(taken).add_(1)
    assert taken.max() == 1 and taken.sum() == injection.count
    flat.master.data += 1
    assert all(torch.equal(value, before[name] + 1) for name, value in injection.state_dict().items())


def test_two_slots_have_one_layout_each():
    from diffusekrona_train.adapters.grouped import flatten

    pair = [injected(model(torch.float32), seed=seed) for seed in (1, 2)]
    flat = flatten([injection.adapters for injection in pair])
    for slot, injection in enumerate(pair):
        own = [segment for segment in flat.segments if segment.slot == slot]
        share = flat.of_slot(slot, flat.master.detach())
        state = injection.state_dict()
        for segment in own:
            start = segment.start - slot * flat.size // 2
            assert torch.equal(share[start : start + segment.size].view(segment.shape), state[segment.name])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_flat_step_is_that_of_each_factor_alone(tmp_path, optimizer):
    """AdamW is elementwise, and no 8-bit block mixes two factors: bit for bit what each parameter has by itself."""
    if optimizer == "adamw8bit":
        bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 4), (20, 320), (8, 6), (4, 4)]  # of whole vectors: CPUs round the rest of a tensor otherwise
    alone = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    together = [nn.Parameter(parameter.detach().clone()) for parameter in alone]
    config = make_run(tmp_path, tmp_path / "x", train={"optimizer": optimizer, "max_grad_norm": None}).train
    descent = Descent(together, config, OneProcess)
    settings = {"lr": 0.1, "betas": tuple(config.betas), "weight_decay": config.weight_decay, "eps": config.eps}
    if optimizer == "adamw":
        reference = torch.optim.AdamW(alone, fused=True, **settings)
    else:
        reference = bnb.optim.AdamW8bit(alone, min_8bit_size=1, **settings)
    for _ in range(4):
        grads = [torch.randn(shape, generator=generator) * 10.0**k for k, shape in enumerate(shapes)]
        for one, two, grad in zip(alone, together, grads, strict=True):
            one.grad = grad
            two.grad.copy_(grad)
        reference.step()
        descent.step(0.1)
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))


def test_products_into_what_is_there():
    """Left and Right against einsum, with what the target holds counted or not."""
    from diffusekrona_train.adapters.kron import Left, Right

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    M = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    expected = {Right: F.linear(x.view(5, 3, 4), M), Left: torch.einsum("oi,niw->now", M, x.view(5, 4, 3))}
    for side, product in expected.items():
        there = torch.randn(5, 21, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(side.add(there, M, x, 0.5, fresh=True), there + 0.5 * product.reshape(5, 21))
        into = torch.full((5, 21), torch.nan, dtype=torch.float64)
        torch.testing.assert_close(side.add(into, M, x, 2.0, beta=0), 2 * product.reshape(5, 21))
        torch.testing.assert_close(side.many(M[None], x)[0], product.reshape(5, 21))
