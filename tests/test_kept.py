"""What frozen layers make of captions is kept: nothing changes but the work, in numbers, in memory and in time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from diffusekrona_train.adapters.texts import Kept
from diffusekrona_train.training.base import enable_checkpointing
from tests.test_graph import contender
from tests.test_grouped import SPECS, dense_gradients, model, staged
from tests.test_inject import injected, inputs

KEYS = ("blocks.0.ask.to_k", "blocks.0.ask.to_v", "blocks.1.ask.to_k", "blocks.1.ask.to_v")


def text(kept: Kept, key: int = 0) -> torch.Tensor:
    """A caption as the objective gives it: the same tensor for the same key."""
    _, context = inputs(torch.float64)
    return kept.again(key, lambda: {"text": context + key})["text"]


def linear(net) -> nn.Linear:
    found = net.blocks[0].ask.to_k.innermost()
    assert isinstance(found, nn.Linear)
    return found


def made(net, flat, x, context, way: str = "plain") -> list[torch.Tensor]:
    """Output and gradients, in fp64."""
    flat.clear()
    x = x.detach().clone().requires_grad_()
    y = recomputed(net, x, context, use_reentrant=False) if way == "checkpointed" else net(x, context)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(value.clone() for value in staged_of(flat))]


def staged_of(flat) -> list[torch.Tensor]:
    return [segment.of(flat.stage(torch.float64)) for segment in flat.segments]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("way", ["plain", "checkpointed"])
def test_gradients_are_those_of_the_dense_weights(name, way):
    net = model()
    injection = injected(net, **SPECS[name])
    x, context = inputs(torch.float64)
    wanted, factors, grad_x = dense_gradients(net, injection, x, context)
    flat, texts = injection.flatten(), injection.texts
    computed = made(net, flat, x, context, way)
    assert texts.kept.nbytes == 0  # this text is not one that comes again
    for _ in range(2):
        found = made(net, flat, x, text(texts.kept), way)
        assert all(map(torch.equal, found, computed))
        for mine, theirs in zip(found[:2], (wanted, grad_x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        for key, value in staged(injection).items():
            torch.testing.assert_close(value, factors[key], rtol=1e-12, atol=1e-12)
    assert texts.kept.nbytes == context.nbytes + 4 * 2 * 3 * 16 * 8  # k and v of two blocks


def test_each_product_is_computed_once(monkeypatch):
    net = model()
    injection = injected(net)
    injection.flatten()
    texts = injection.texts
    asked = []
    whole = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (asked.append(x), whole(self, x))[1])
    x, _ = inputs(torch.float64)
    context = text(texts.kept)
    for _ in range(3):
        net(x, text(texts.kept))
    assert sum(value is context for value in asked) == len(KEYS)


def test_captions_do_not_mix():
    net = model()
    injection = injected(net)
    flat, texts = injection.flatten(), injection.texts
    x, context = inputs(torch.float64)
    wanted = {key: made(net, flat, x, context + key) for key in (0, 1, 2)}
    assert not torch.equal(wanted[0][0], wanted[1][0])
    for key in (0, 1, 0, 2, 1, 0):
        assert all(map(torch.equal, made(net, flat, x, text(texts.kept, key)), wanted[key]))


def test_memory_stays_below_the_limit_and_the_last_used_stay():
    net = model()
    injection = injected(net)
    injection.flatten()
    texts = injection.texts
    one = 2 * 3 * (24 + 4 * 16) * 8  # a text and what is made of it
    x, context = inputs(torch.float64)
    for limit in (0, 1200, one, 2 * one + 1200):  # nothing; a text alone; one; two
        texts.kept = Kept(limit)
        for key in (0, 1, 2, 0, 0, 1):
            assert torch.equal(net(x, text(texts.kept, key)), net(x, context + key))
            assert texts.kept.nbytes <= limit
        assert (texts.kept.nbytes >= one) == (limit >= one)
        assert (text(texts.kept, 1) is text(texts.kept, 1)) == (limit > 0)


def test_it_is_freed_with_the_injection_and_layers_with_the_model():
    net = model()
    injection = injected(net)
    flat, texts = injection.flatten(), injection.texts
    x, _ = inputs(torch.float64)
    net(x, text(texts.kept))
    base = linear(net)
    output = weakref.ref(texts.kept.of(base, text(texts.kept)))
    layer, kept = weakref.ref(base), texts.kept
    assert output() is not None
    injection.eject()
    del injection, flat, texts, net, base
    gc.collect()
    assert layer() is None and output() is None and kept.nbytes > 0  # whoever has `kept` holds no model
    kept.stop()
    assert kept.nbytes == 0 and kept.again(0, lambda: {"text": x}) is not kept.again(0, lambda: {"text": x})


def test_changed_texts_and_weights_and_adapted_bases_are_computed_anew():
    net = model()
    under, over = injected(net, seed=1), injected(net, seed=2)
    for parameter in under.parameters():
        parameter.requires_grad_(False)
    x, _ = inputs(torch.float64)
    over.flatten()
    context = text(over.texts.kept)
    before = net(x, context)
    under.set_strength(2.0)
    twice = net(x, context)
    torch.testing.assert_close(twice, net(x, context.clone()), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        under.eject()  # only now the layers themselves are beneath, thawed
        linear(net).requires_grad_(False)
        without = net(x, context)
        linear(net).weight.mul_(2)
    changed = net(x, context)
    torch.testing.assert_close(changed, net(x, context.clone()), rtol=1e-12, atol=1e-12)
    context.mul_(2)
    last = net(x, context)
    torch.testing.assert_close(last, net(x, context.clone()), rtol=1e-12, atol=1e-12)
    each = (before, twice, without, changed, last)
    assert not any(map(torch.equal, each, each[1:]))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_is_bit_for_bit_the_same_without(checkpointed):
    found = []
    for limit in (None, 0):
        run = contender()
        if checkpointed:
            enable_checkpointing(run.objective.denoiser)
        run.objective.kept.limit = limit
        for number in range(3):
            run.step(number)
        assert run.descent is not None and (run.objective.kept.nbytes > 10_000) == (limit is None)
        found.append(run.descent.factors.master.detach().clone())
    assert torch.equal(*found)
