"""Rates in units of ΔW and with a ratio: what a step of Adam moves, measured on dense ΔW, and torch's own AdamW."""

from __future__ import annotations

import math

import pytest
import torch

from diffusekrona_train.adapters import build_adapter, plan
from diffusekrona_train.adapters.grouped import flatten
from diffusekrona_train.config import AdapterConfig, TrainConfig, make_config
from diffusekrona_train.models.layers import Layer
from diffusekrona_train.training.optimizer import Descent

SPECS = {
    "krona": {"a1": 4, "a2": 8},
    "krona (2, 2)": {"a1": 2, "a2": 2},
    "krona, large a2": {"a1": 4, "a2": 40},
    "krona, scaled": {"a1": 8, "a2": 4, "scale": -0.3},
    "lora r1": {"type": "lora", "rank": 1},
    "lora r16": {"type": "lora", "rank": 16, "alpha": 4.0},
    "lokr": {"type": "lokr", "rank": 2, "alpha": 1.0},
    "lokr, both split": {"type": "lokr", "rank": 2, "factor": 12, "decompose_both": True, "scale": 0.5},
    "lokr, whole": {"type": "lokr", "factor": 4, "full_matrix": True},
    "loha": {"type": "loha", "rank": 2},
    "full": {"type": "full", "scale": 2.0},
    "terms": {"type": "terms", "rank": 4, "rho": 2, "scale": 0.7},
}
LAYERS = [Layer(f"block.attn1.to_{letter}", 96, 160, letter, "self") for letter in "qk"]


class OneProcess:
    num_processes, scaler = 1, None

    @staticmethod
    def backward(loss):
        loss.backward()


def adapters_of(name: str, *, random: bool):
    """Two layers' adapters, as they begin or with factors of many sizes."""
    spec, generator = AdapterConfig(**SPECS[name]), torch.Generator().manual_seed(3)
    options = plan(spec, LAYERS)
    adapters = {layer.name: build_adapter(spec, layer, options[layer.name], generator) for layer in LAYERS}
    if random:
        for number, adapter in enumerate(adapters.values()):
            for place, parameter in enumerate(adapter.parameters()):
                parameter.data.normal_(0, 0.3 * (1 + number) / (1 + 3 * place), generator=generator)
    return adapters


def descent_of(adapters, **train):
    settings = {"max_grad_norm": None, "weight_decay": 0.0, **train}
    return Descent(flatten([adapters]), TrainConfig(**settings), OneProcess)


def step(descent, rate, generator):
    """One step with gradients of random signs and sizes, the same signs in every step, so that Adam moves by ±1."""
    for segment in descent.factors.segments:
        size = torch.rand(1, generator=generator) * 10
        signs = torch.randn(segment.shape, generator=torch.Generator().manual_seed(segment.start)).sign()
        segment.of(descent.factors.gradient).copy_(signs * size)
    descent.step(rate)


def moved_by(adapter, factor, before):
    """rms that dense ΔW changes by when this factor alone goes from `before` to its present value."""
    parameter = adapter.get_parameter(factor)
    after, now = adapter.delta(), parameter.detach().clone()
    parameter.data.copy_(before)
    change = (after - adapter.delta()).square().mean().sqrt().item()
    parameter.data.copy_(now)
    return change


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_of_each_factor_moves_dw_by_rms_rate(name, steps):
    adapters, rate = adapters_of(name, random=True), 1e-6
    descent, generator = descent_of(adapters, rate_unit="dw"), torch.Generator()
    before = {}
    for _ in range(steps):  # a constant gradient: Adam's second moment then is the square of its first
        generator.manual_seed(1)
        before = {key: parameter.detach().clone() for a in adapters.values() for key, parameter in named(a)}
        step(descent, rate, generator)
    for adapter in adapters.values():
        for factor, _ in adapter.named_parameters():
            now = {key: parameter.detach().clone() for key, parameter in named(adapter)}
            for key, parameter in named(adapter):  # the other factors as they were, as the rates are made for
                if not key.endswith(f"|{factor}"):
                    parameter.data.copy_(before[key])
            few = adapter.get_parameter(factor).numel() < 100  # signs of few numbers do not cancel as those of many
            moved = moved_by(adapter, factor, before[f"{adapter.layer.name}|{factor}"])
            assert moved == pytest.approx(rate, rel=0.5 if few and name != "krona" else 0.12)
            for key, parameter in named(adapter):
                parameter.data.copy_(now[key])


def named(adapter):
    return [(f"{adapter.layer.name}|{factor}", parameter) for factor, parameter in adapter.named_parameters()]


@pytest.mark.parametrize("name", SPECS)
def test_the_rate_is_that_of_the_jacobian(name):
    """g² = ‖∂ΔW/∂factor‖² / (out * in), with torch's own Jacobian of the dense product."""
    layers = [Layer("block.attn1.to_q", 24, 40, "q", "self")]
    spec, generator = AdapterConfig(**SPECS[name]), torch.Generator()
    adapter = build_adapter(spec, layers[0], plan(spec, layers)[layers[0].name], generator)
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 1.0, generator=generator)
    descent = descent_of({layers[0].name: adapter}, rate_unit="dw")
    assert descent.rates is not None
    for segment, rate in zip(descent.factors.segments, descent.rates.table(1e-6).tolist(), strict=True):
        factor = segment.factor

        def dense(value):
            return torch.func.functional_call(Product(adapter), {f"adapter.{factor}": value}, ())  # noqa: B023

        jacobian = torch.autograd.functional.jacobian(dense, adapter.get_parameter(factor).detach())
        gain = (jacobian.square().sum() / (24 * 40)).sqrt().item() * abs(adapter.multiplier)
        assert rate == pytest.approx(1e-6 / gain, rel=1e-4)


class Product(torch.nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self):
        return self.adapter.product()  # type: ignore[operator]


@pytest.mark.parametrize("name", SPECS)
def test_the_first_step_of_a_run_moves_dw_by_rms_rate(name):
    """All factors at once, as they begin: one is zero, and the others move at most 5 % of their own size."""
    adapters, rate = adapters_of(name, random=False), 1e-3
    sizes = {key: parameter.detach().square().mean().sqrt() for a in adapters.values() for key, parameter in named(a)}
    earlier = {key: parameter.detach().clone() for a in adapters.values() for key, parameter in named(a)}
    descent = descent_of(adapters, rate_unit="dw")
    step(descent, rate, torch.Generator().manual_seed(1))
    for adapter in adapters.values():
        assert adapter.delta().square().mean().sqrt().item() == pytest.approx(
            rate, rel=0.3 if "split" in name else 0.12
        )
        for key, parameter in named(adapter):
            if sizes[key] > 0:
                moved = (parameter.detach() - earlier[key]).square().mean().sqrt()
                assert moved.item() == pytest.approx(0.05 * sizes[key].item(), rel=1e-3)


def test_the_rate_does_not_depend_on_how_a_product_is_shared_between_its_factors():
    """(c A, B / c) is the same ΔW, and after a step of B it still is."""
    plain, shared = adapters_of("krona", random=True), adapters_of("krona", random=True)
    for adapter in shared.values():
        adapter.get_parameter("A").data.mul_(8)
        adapter.get_parameter("B").data.div_(8)
    for adapters in (plain, shared):
        step(descent_of(adapters, rate_unit="dw"), 1e-3, torch.Generator().manual_seed(1))
    for one, other in zip(plain.values(), shared.values(), strict=True):
        torch.testing.assert_close(one.delta(), other.delta(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_rates_are_those_of_adamw_with_a_group_for_each_factor(optimizer):
    """LoRA+: torch's own AdamW, where up has 16 times the rate of down; weight decay goes with each one's rate."""
    adapters, twins = adapters_of("lora r16", random=True), adapters_of("lora r16", random=True)
    descent = descent_of(adapters, rate_ratio=16.0, weight_decay=0.1, optimizer=optimizer)
    ups = [adapter.lora_up for adapter in twins.values()]
    downs = [adapter.lora_down for adapter in twins.values()]
    groups = [{"params": ups, "lr": 16e-3}, {"params": downs, "lr": 1e-3}]
    if optimizer == "adamw":
        reference = torch.optim.AdamW(groups, weight_decay=0.1)
    else:
        import bitsandbytes

        reference = bitsandbytes.optim.AdamW8bit(groups, weight_decay=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        for name, adapter in adapters.items():
            for factor, parameter in adapter.named_parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                assert parameter.grad is not None
                parameter.grad.copy_(gradient)
                twins[name].get_parameter(factor).grad = gradient.clone()
        descent.step(1e-3)
        reference.step()
    for name, adapter in adapters.items():
        for factor, parameter in adapter.named_parameters():
            wanted = twins[name].get_parameter(factor)
            assert (parameter - wanted).abs().mean() < (1e-6 if optimizer == "adamw" else 5e-4)  # ups move by 0.03


def test_the_ratio_is_that_of_pefts_lora_plus():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = torch.nn.Linear(96, 160, bias=False)

    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["to_q"]))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    wanted = {name.split("lora_")[1][0]: rates[id(p)] for name, p in model.named_parameters() if "lora_" in name}
    adapters = adapters_of("lora r16", random=True)
    descent = descent_of(adapters, rate_ratio=16.0)
    assert descent.rates is not None
    table = dict(zip([s.factor for s in descent.factors.segments], descent.rates.table(1e-3).tolist(), strict=True))
    assert table == pytest.approx({"lora_up": wanted["B"], "lora_down": wanted["A"]})


def test_a_step_that_is_not_finite_moves_nothing_and_a_zero_factor_stays_finite():
    adapters = adapters_of("krona", random=False)
    descent = descent_of(adapters, rate_unit="dw")
    for adapter in adapters.values():
        adapter.get_parameter("A").data.zero_()  # nothing can move ΔW now
    step(descent, 1e-3, torch.Generator().manual_seed(1))
    assert descent.factors.master.isfinite().all()
    before = descent.factors.master.detach().clone()
    descent.factors.gradient.fill_(math.nan)
    descent.step(1e-3)
    assert torch.equal(before, descent.factors.master.detach())


def test_a_scale_of_zero_has_no_rate_in_dw():
    tree = {"subject": {"images": "x", "class": "dog"}, "output": "runs/x", "adapter": {"scale": 0.0}}
    with pytest.raises(ValueError, match="^train.rate_unit: dw divides by adapter.scale, which is 0"):
        make_config({**tree, "train": {"rate_unit": "dw"}})
    make_config(tree)
