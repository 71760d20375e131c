"""Packed adapters against W + ΔW written out, one subject at a time: predictions, gradients, optimiser steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.func import functional_call

from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.adapters.packed import Pack
from diffusekrona_train.config import AdapterConfig, make_config
from diffusekrona_train.training.optimizer import Descent
from tests.tiny import make_unet

KINDS = {
    "krona": {"a1": 4, "a2": 8},
    "krona, A first": {"a1": 8, "a2": 2},
    "lora": {"type": "lora", "rank": 3, "alpha": 1.5},
    "lokr": {"type": "lokr", "factor": 4, "full_matrix": True},
    "lokr, low rank": {"type": "lokr", "rank": 1, "alpha": 2.0, "decompose_both": True, "factor": 4},
    "loha": {"type": "loha", "rank": 2},
    "loha, dense": {"type": "loha", "rank": 8},
    "terms": {"type": "terms", "rank": 2, "rho": 2},
}
ALONE = SimpleNamespace(num_processes=1, scaler=None)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return make_unet("sdxl", 16).double().eval().requires_grad_(False)


def shown(samples: int) -> dict:
    """Return what an SDXL UNet is called with, fp64, another thing for each sample."""
    generator = torch.Generator().manual_seed(5)
    size = {"generator": generator, "dtype": torch.float64}
    return {
        "sample": torch.randn(samples, 4, 4, 4, **size),
        "timestep": torch.arange(samples) * 90 + 5,
        "encoder_hidden_states": torch.randn(samples, 7, 64, **size),
        "added_cond_kwargs": {"text_embeds": torch.randn(samples, 32, **size), "time_ids": torch.ones(samples, 6)},
    }


def rows(given: dict, at: slice) -> dict:
    cut = {name: value[at] for name, value in given.items() if name != "added_cond_kwargs"}
    return {**cut, "added_cond_kwargs": {name: value[at] for name, value in given["added_cond_kwargs"].items()}}


def fresh(base) -> torch.nn.Module:
    """Return the base without adapters: its own modules are put back where a pack wrapped them."""
    for name, module in list(base.named_modules()):
        if type(module).__name__ == "AdaptedLinear":
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.base)
    return base


def seats_of(pack: Pack, count: int) -> list:
    """Return subjects with factors that are all different from zero, fp64, in flat rows."""
    seats = [pack.seat(slot, seed=slot) for slot in range(count)]
    for number, seat in enumerate(seats):
        flat = seat.flatten()
        noise = torch.randn(flat.size, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        for segment in flat.segments:
            segment.of(flat.master.data).add_(0.1 * segment.of(noise))
    return seats


def written_out(base, seat, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the base's weights with W + scale ΔW in place of each adapted W, differentiable in `factors`."""
    weights = {}
    for name, adapter in seat.adapters.items():
        own = {key: factors[f"{name}|{key}"] for key, _ in adapter.named_parameters()}
        scale = adapter.multiplier
        if "A" in own:
            delta = torch.kron(own["A"], own["B"])
        elif "terms_a" in own:
            pairs = zip(own["terms_a"], own["terms_b"], strict=True)
            delta = sum(torch.kron(A.contiguous(), B.contiguous()) for A, B in pairs)
        elif "lora_up" in own:
            delta = own["lora_up"] @ own["lora_down"]
        elif "hada_w1_a" in own:
            delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        else:
            whole = [own.get(w) for w in ("lokr_w1", "lokr_w2")]
            whole = [
                own[f"lokr_w{i}_a"] @ own[f"lokr_w{i}_b"] if w is None else w for i, w in enumerate(whole, start=1)
            ]
            delta = torch.kron(*[w.contiguous() for w in whole])
        weights[f"{name}.weight"] = base.get_submodule(name).weight + scale * delta
    return weights


def pack_of(base, kind: str, slots: int) -> Pack:
    return Pack(fresh(base), AdapterConfig(**KINDS[kind]), slots, dtype=torch.float64, masters=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_and_gradients_are_those_of_each_subject_alone(base, kind):
    pack = pack_of(base, kind, 3)
    seats = seats_of(pack, 3)
    given = shown(6)
    pack.choose([0, 1, 2])
    packed = pack.model(**given, return_dict=False)[0]
    pack.backward(packed.square().sum())
    fresh(base)
    for slot, seat in enumerate(seats):
        part = slice(2 * slot, 2 * slot + 2)
        factors = {name: value.detach().clone().requires_grad_() for name, value in seat.named_parameters()}
        alone = functional_call(base, written_out(base, seat, factors), (), {**rows(given, part), "return_dict": False})
        torch.testing.assert_close(packed[part], alone[0], rtol=1e-10, atol=1e-10)
        wanted = torch.autograd.grad(alone[0].square().sum(), list(factors.values()))
        for (name, parameter), gradient in zip(seat.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(
                parameter.grad, gradient, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n} {m}"
            )
            assert gradient.abs().max() > 0, name


SETTINGS = (
    {"learning_rate": 1e-2, "max_grad_norm": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.99)},
    {"learning_rate": 1e-3, "max_grad_norm": None, "weight_decay": 0.0, "betas": (0.8, 0.999)},
)


@pytest.mark.parametrize("kind", ["krona", "loha"])
def test_several_steps_are_those_of_each_subject_alone(base, kind):
    """Each slot has its own rate, clipping and decay; torch.optim.AdamW on W + ΔW written out is the reference."""
    pack = pack_of(base, kind, 2)
    seats, given = seats_of(pack, 2), shown(2)
    start = [{name: value.detach().clone() for name, value in seat.named_parameters()} for seat in seats]
    trains = [config_of(**settings).train for settings in SETTINGS]
    descents = [Descent(seat.flat, train, ALONE) for seat, train in zip(seats, trains, strict=True)]
    for _ in range(3):
        pack.choose([0, 1])
        losses = pack.model(**given, return_dict=False)[0].square().flatten(1).mean(1)
        pack.backward(losses.sum())
        for descent, loss in zip(descents, losses.detach(), strict=True):
            descent.factors.flush(loss)
            descent.step(descent.train.learning_rate)
    fresh(base)
    for slot, (seat, train) in enumerate(zip(seats, trains, strict=True)):
        factors = {name: value.requires_grad_() for name, value in start[slot].items()}
        optimizer = torch.optim.AdamW(
            list(factors.values()), train.learning_rate, train.betas, train.eps, train.weight_decay
        )
        for _ in range(3):
            optimizer.zero_grad()
            weights = written_out(base, seat, factors)
            one = {**rows(given, slice(slot, slot + 1)), "return_dict": False}
            functional_call(base, weights, (), one)[0].square().mean().backward()
            if train.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(factors.values()), train.max_grad_norm)
            optimizer.step()
        for name, parameter in seat.named_parameters():
            torch.testing.assert_close(parameter.data, factors[name].data, rtol=1e-10, atol=1e-10)


def config_of(**train):
    return make_config({"subject": {"images": "x", "class": "dog"}, "output": "x", "train": train})


def test_a_slot_that_is_not_finite_harms_no_other(base):
    pack = pack_of(base, "krona", 3)
    seats, given = seats_of(pack, 3), shown(3)
    given["sample"][1] = float("nan")
    descents = [Descent(seat.flat, config_of().train, ALONE) for seat in seats]
    before = pack.masters.clone()
    gradients = []
    for chosen, part in (([0, 1, 2], [0, 1, 2]), ([0, 2], [0, 2])):
        pack.choose(chosen)
        losses = pack.model(**rows(given, part), return_dict=False)[0].square().flatten(1).mean(1)
        pack.backward(losses.sum())
        gradients.append([seats[0].flat.gradient.clone(), seats[2].flat.gradient.clone()])
        for slot, loss in zip(chosen, losses.detach(), strict=True):
            descents[slot].factors.flush(loss)
        if chosen == [0, 1, 2]:
            descents[1].step(1e-2)
            assert torch.equal(pack.masters, before), "the slot that is not finite moved, or another one did"
            assert descents[1].read()["skipped"] == 1
            for descent in descents:
                descent.clear()
    for with_it, without in zip(*gradients, strict=True):
        assert with_it.isfinite().all()
        torch.testing.assert_close(with_it, without, rtol=1e-10, atol=1e-10)


def test_strengths_are_each_subjects_own_and_both_rows_of_a_prompt_have_them(base):
    pack = pack_of(base, "krona", 2)
    seats, given = seats_of(pack, 2), shown(2)
    doubled = {name: torch.cat([value, value]) for name, value in given.items() if name != "added_cond_kwargs"}
    doubled["added_cond_kwargs"] = {n: torch.cat([v, v]) for n, v in given["added_cond_kwargs"].items()}
    with torch.no_grad(), pack.by_prompt([1, 0], [0.5, -1.0]):
        packed = pack.model(**doubled, return_dict=False)[0]
        one_row_each = pack.model(**given, return_dict=False)[0]
    with torch.no_grad(), pack.off():
        bare = pack.model(**given, return_dict=False)[0]
    torch.testing.assert_close(packed[:2], packed[2:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed[:2], one_row_each, rtol=1e-10, atol=1e-10)
    fresh(base)
    for image, (slot, strength) in enumerate(((1, 0.5), (0, -1.0))):
        seat = seats[slot]
        for adapter in seat.adapters.values():
            adapter.strength = strength
        weights = written_out(base, seat, {name: value.detach() for name, value in seat.named_parameters()})
        one = {**rows(given, slice(image, image + 1)), "return_dict": False}
        alone = functional_call(base, weights, (), one)[0]
        torch.testing.assert_close(packed[image : image + 1], alone, rtol=1e-10, atol=1e-10)
        assert (alone - bare[image]).abs().max() > 1e-3


def test_a_new_subject_starts_as_it_would_alone(base):
    spec = AdapterConfig(**KINDS["krona"])
    alone = inject(fresh(base), spec, seed=7)
    wanted = {name: value.clone() for name, value in alone.state_dict().items()}
    alone.eject()
    pack = Pack(base, spec, 2, dtype=torch.float64)
    for seed in (3, 7):  # the slot was another subject's before
        seat = pack.seat(1, seed=seed)
        seat.flatten()
    assert seat.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in seat.state_dict().items())
    assert not pack.masters[0].any()


def test_full_fine_tuning_does_not_pack(base):
    with pytest.raises(ValueError, match="type Full cannot be packed; these can: KronA, LoHa, LoKr, LoRA, Terms"):
        Pack(fresh(base), AdapterConfig(type="full"), 2)
