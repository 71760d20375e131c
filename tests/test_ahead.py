"""Keys and values of all cross-attentions computed before the model runs: the same numbers in fewer kernels."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from diffusekrona_train.adapters import texts as module
from diffusekrona_train.adapters.grouped import Group
from scripts.bench.contender import Bench
from scripts.bench.kernels import Kernels
from tests.test_grouped import SPECS, dense_gradients, model, staged
from tests.test_inject import injected, inputs
from tests.tiny import make_unet

WIDTH, MEMBERS = 24, 4
"""Of the text that `inputs` gives, and k and v of two blocks."""


@pytest.fixture
def alone(monkeypatch) -> list[int]:
    """Grows with each group that computes from the text in a block."""
    seen: list[int] = []
    enter = Group.enter

    def note(self: Group, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] == WIDTH:
            seen.append(len(self.adapters))
        return enter(self, x)

    monkeypatch.setattr(Group, "enter", note)
    return seen


def forward(net: nn.Module, x: torch.Tensor, context: torch.Tensor, way: str = "plain") -> torch.Tensor:
    """The model, block by block as UNets do it."""
    for block in net.blocks:  # type: ignore[union-attr]
        if way == "plain":
            x = block(x, context)
        else:
            work = functools.partial(block, context=context)  # the text is the same tensor when it is computed again
            x = recomputed(work, x, use_reentrant=way == "reentrant")  # type: ignore[assignment]
    return x


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("way", ["plain", "checkpointed", "reentrant"])
def test_gradients_are_those_of_the_dense_weights(name, way, alone):
    net = model()
    injection = injected(net, **SPECS[name])
    x, context = inputs(torch.float64)
    y, wanted, grad_x = dense_gradients(net, injection, x, context)
    flat, texts = injection.flatten(), injection.texts
    for text in (context, texts.kept.again(0, lambda: {"text": context.clone()})["text"]):  # kept ones too
        for _ in range(2):
            x = x.detach().requires_grad_()
            texts.expect(text)
            out = forward(net, x, text, way)
            out.square().sum().backward()
            torch.testing.assert_close(out, y, rtol=0, atol=1e-12)
            torch.testing.assert_close(x.grad, grad_x, rtol=1e-12, atol=1e-12)
            for key, value in staged(injection).items():
                torch.testing.assert_close(value, wanted[key], rtol=1e-12, atol=1e-12)
            flat.clear()
    assert bool(alone) == (way == "reentrant")  # whose blocks have graphs of their own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_no_less_exact(dtype):
    """Against fp64 on the same rounded numbers, both ways err alike."""
    errors = {}
    for expected in (False, True):
        net = model(dtype)
        injection = injected(net)
        x, context = inputs(dtype)
        injection.load_state_dict({n: value.to(dtype).float() for n, value in injection.state_dict().items()})
        exact = model(dtype).double()
        exact_injection = injected(exact)
        exact_injection.load_state_dict(injection.state_dict())
        wanted = exact(x.double(), context.double())
        wanted.square().sum().backward()
        flat, texts = injection.flatten(), injection.texts
        if expected:
            texts.expect(context)
        out = net(x, context)
        out.float().square().sum().backward()
        flat.flush()
        pairs = [(out, wanted)]
        pairs += [(p.grad, q.grad) for p, q in zip(injection.parameters(), exact_injection.parameters(), strict=True)]
        errors[expected] = sum(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)
    assert 0 < errors[True] < 1.2 * errors[False]


def test_all_layers_of_a_shape_take_as_many_kernels_as_one():
    counts = {}
    for blocks in (1, 2, 4):
        for expected in (False, True):
            torch.manual_seed(0)
            net = model()
            net.blocks = nn.ModuleList([net.blocks[0], *(model().blocks[1] for _ in range(blocks - 1))])
            injection = injected(net)
            injection.flatten()
            x, context = inputs(torch.float64)
            counts[blocks, expected] = kernels(net, injection, x.requires_grad_(), context, expected)
    assert counts[1, True] <= counts[1, False]
    with_it, without = ((counts[4, way] - counts[2, way]) / 2 for way in (True, False))  # a block more
    assert without - with_it >= 9  # z, what is added (2), grad_z (2), gradients of A and sums over tokens (2 + 1), of B


def kernels(net: nn.Module, injection, x: torch.Tensor, context: torch.Tensor, expected: bool) -> int:
    with Kernels() as counted:
        if expected:
            injection.texts.expect(context)
        net(x, context).square().sum().backward()
        injection.flat.flush()
    return counted.found.total()


def test_several_texts_and_uses_before_one_backward_pass(alone):
    """Two batches of a step, one of them twice, and one whose text nobody expected."""
    net = model()
    injection = injected(net)
    x, context = inputs(torch.float64)
    given = [context, context + 1, context - 1]
    _, *wanted = zip(*(dense_gradients(net, injection, x, text) for text in (*given, given[0])), strict=True)
    flat, texts = injection.flatten(), injection.texts
    for way in ("plain", "checkpointed"):
        alone.clear()
        x = x.detach().requires_grad_()
        texts.expect(given[0])
        total = forward(net, x, given[0], way).square().sum()
        texts.expect(given[1])
        total = total + forward(net, x, given[1], way).square().sum()
        total = total + forward(net, x, given[2], way).square().sum()
        texts.expect(given[0])
        total = total + forward(net, x, given[0], way).square().sum()
        assert len(alone) == 2  # a group for each block
        total.backward()
        flat.flush()
        torch.testing.assert_close(x.grad, sum(wanted[1]), rtol=1e-12, atol=1e-12)
        for name, parameter in injection.named_parameters():
            exact = sum(gradients[name] for gradients in wanted[0])
            torch.testing.assert_close(parameter.grad.double(), exact, rtol=1e-5, atol=1e-5)
        flat.clear()


def test_layers_that_are_not_called_have_no_gradient():
    net = model()
    injection = injected(net)
    flat, texts = injection.flatten(), injection.texts
    _, context = inputs(torch.float64)
    texts.expect(context)
    net.blocks[1].ask.to_v(context).square().sum().backward()
    flat.flush()
    moved = {name.partition("|")[0] for name, parameter in injection.named_parameters() if parameter.grad.any()}
    assert moved == {"blocks.1.ask.to_v"}


def test_what_is_ready_is_of_this_text_these_factors_and_this_strength(alone):
    net = model()
    injection = injected(net)
    x, context = inputs(torch.float64)
    base = net.blocks[0].ask.to_k.base
    flat, texts = injection.flatten(), injection.texts

    def outputs() -> torch.Tensor:
        return net.blocks[0].ask.to_k(context).detach()

    def wanted() -> torch.Tensor:
        adapter = injection.adapters["blocks.0.ask.to_k"]
        return context @ (base.weight + adapter.delta()).T.double()

    texts.expect(context)
    assert set(texts.ready[id(context)].outputs) == {
        injection.adapters[f"blocks.{block}.ask.to_{role}"] for block in (0, 1) for role in "kv"
    }
    torch.testing.assert_close(outputs(), wanted())
    assert not alone
    with injection.disabled():  # a teacher, between two uses
        torch.testing.assert_close(outputs(), context @ base.weight.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs(), wanted())
    context.add_(1)
    torch.testing.assert_close(outputs(), wanted())
    assert alone
    flat.flush()
    assert not texts.ready
    with torch.no_grad():
        flat.master.mul_(2)
    flat.refresh()
    injection.set_strength(0.5)
    texts.expect(context)
    alone.clear()
    torch.testing.assert_close(outputs(), wanted())
    assert not alone


def fused(injection):
    injection.fuse()


def off(injection):
    injection.set_strength(0)


def of_two_strengths(injection):
    injection.adapters["blocks.1.ask.to_k"].strength = 2.0


def trained_base(injection):
    injection.model.blocks[1].ask.to_v.base.weight.requires_grad_()


def heard(injection):
    injection.model.blocks[1].ask.to_v.base.register_forward_hook(lambda module, given, y: y + 1)


def ejected(injection):
    injection.eject()
    injection.model.requires_grad_(False)  # as the bases that a run loads: only that nothing is adapted counts


@pytest.mark.parametrize("change", [fused, off, of_two_strengths, trained_base, heard, ejected])
def test_nothing_is_ready_where_layers_must_compute_it_themselves(change):
    net, twin = model(), model()
    injections = [injected(one) for one in (net, twin)]
    injections[0].flatten()
    texts = injections[0].texts
    x, context = inputs(torch.float64)
    for injection in injections:
        change(injection)
    texts.expect(context)
    assert not texts.ready
    torch.testing.assert_close(net(x, context), twin(x, context))


def test_nothing_is_ready_of_other_inputs(monkeypatch):
    net = model()
    injection = injected(net)
    injection.flatten()
    texts = injection.texts
    x, context = inputs(torch.float64)
    texts.expect(x)  # of another width
    texts.expect(context.clone().requires_grad_())
    with torch.no_grad():
        texts.expect(context)
    with torch.autocast("cpu", torch.bfloat16):
        texts.expect(context.float())
    texts.expect(context.to("meta"))  # the layers are on another device, as those in host memory are
    assert not texts.ready
    monkeypatch.setattr(module, "MOST_AHEAD", MEMBERS * context[..., 0].numel() * 16 * 8)
    texts.expect(context)
    assert len(texts.ready.pop(id(context)).outputs) == MEMBERS
    texts.expect(torch.cat([context, context[:1]]))
    assert not texts.ready


def test_one_of_two_injections_is_computed_ahead_under_the_other():
    net = model()
    under, over = injected(net, seed=1), injected(net, seed=2, type="lora", targets=["k", "v"])
    x, context = inputs(torch.float64)
    both = net(x, context)
    both.square().sum().backward()
    wanted = {id(p): p.grad.clone() for injection in (under, over) for p in injection.parameters()}
    for injection in (under, over):
        for parameter in injection.parameters():
            parameter.grad = None
    flats = [injection.flatten() for injection in (under, over)]
    for injection in (under, over):
        injection.texts.expect(context)
    assert under.texts.ready and not over.texts.ready
    again = net(x, context)
    torch.testing.assert_close(again, both)
    again.square().sum().backward()
    for flat in flats:
        flat.flush()
    for injection in (under, over):
        for parameter in injection.parameters():
            torch.testing.assert_close(parameter.grad, wanted[id(parameter)], rtol=1e-5, atol=1e-5)


def test_a_failed_pass_leaves_nothing_that_holds_the_model():
    net = model()
    injection = injected(net)
    flat, texts = injection.flatten(), injection.texts
    _, context = inputs(torch.float64)
    texts.expect(context)
    layer = weakref.ref(net.blocks[0].ask.to_k.base)
    flat.clear()
    del net, injection, flat, texts
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_the_objective_expects_the_captions_of_a_unet(monkeypatch, kind):
    """Each step's captions, of the given batch; and a run ends with the same numbers, up to rounding, without."""
    found, takes = {}, []
    take = module.Texts.take
    monkeypatch.setattr(module.Texts, "take", lambda *given: (takes.append(y := take(*given)), y)[1])
    for limit in (module.MOST_AHEAD, 0):
        monkeypatch.setattr(module, "MOST_AHEAD", limit)
        torch.manual_seed(0)
        run = Bench(make_unet(kind).requires_grad_(False), 64, 2).contender({"a1": 4, "a2": 4})
        takes.clear()
        for number in range(3):
            run.step(number)
        assert run.descent is not None
        found[limit] = run.descent.factors.master.detach().clone()
        cross = [a for a in run.objective.injection.adapters.values() if a.layer.kind == "cross"]
        readers = sum(adapter.layer.projection in "kv" for adapter in cross)
        assert sum(y is not None for y in takes) == (3 * readers if limit else 0)
        assert not run.objective.injection.texts.ready
    one, other = found.values()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    assert not torch.equal(one, torch.zeros_like(one))
