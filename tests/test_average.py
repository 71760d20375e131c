"""The running average: torch's own AveragedModel, files and images made of it, runs that go on from it bit for bit."""

from __future__ import annotations

import signal

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from diffusekrona_train.adapters.flat import FlatFactors
from diffusekrona_train.training import train
from diffusekrona_train.training.average import Average
from diffusekrona_train.training.run import work
from tests.runs import factors, finish, make_run, make_world, newest_state, same_factors, start

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
GOOD, BAD = torch.tensor(False), torch.tensor(True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def moving(steps: int):
    """A parameter in a flat buffer that moves at random, and torch's average of its twin."""
    parameter = torch.nn.Parameter(torch.zeros(5, 7))
    flat = FlatFactors([{"a": torch.nn.ParameterList([parameter])}])
    generator = torch.Generator().manual_seed(0)
    return flat, parameter, [torch.randn(5, 7, generator=generator) for _ in range(steps)]


def test_it_is_the_plain_mean_at_first_and_then_exponential():
    flat, parameter, values = moving(40)
    average, reference = Average(flat, 0.9), None
    for number, value in enumerate(values, 1):
        parameter.data.copy_(value)
        average.update(GOOD)
        found = flat.segments[0].of(average.values)
        if number <= 10:
            torch.testing.assert_close(found, torch.stack(values[:number]).mean(0))
        reference = torch.stack(values[:10]).mean(0) if number == 10 else reference
        if number > 10:
            assert reference is not None
            reference = 0.9 * reference + 0.1 * value
            torch.testing.assert_close(found, reference)


def test_it_is_torchs_own_average_once_it_is_exponential():
    flat, parameter, values = moving(30)
    average = Average(flat, 0.8)
    for value in values[:5]:
        parameter.data.copy_(value)
        average.update(GOOD)
    twin = torch.nn.ParameterList([torch.nn.Parameter(flat.segments[0].of(average.values).clone())])
    theirs = AveragedModel(twin, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(twin)  # the first one is a copy
    for value in values[5:]:
        parameter.data.copy_(value)
        twin[0].data.copy_(value)
        average.update(GOOD)
        theirs.update_parameters(twin)
    torch.testing.assert_close(flat.segments[0].of(average.values), next(theirs.parameters()).detach())


def test_a_step_that_moves_nothing_does_not_count():
    flat, parameter, values = moving(3)
    once, twice = Average(flat, 0.9), Average(flat, 0.9)
    for value in values:
        parameter.data.copy_(value)
        once.update(GOOD)
        twice.update(GOOD)
        twice.update(BAD)
    assert torch.equal(once.values, twice.values) and once.steps.item() == twice.steps.item() == 3


def test_it_is_shown_inside_the_block_alone_even_where_that_fails():
    flat, parameter, values = moving(2)
    average = Average(flat, 0.5)
    for value in values:
        parameter.data.copy_(value)
        average.update(GOOD)
    half = flat.shadow(torch.bfloat16)
    with pytest.raises(RuntimeError), average.shown():
        torch.testing.assert_close(parameter.detach(), (values[0] + values[1]) / 2)
        assert torch.equal(half, flat.master.detach().bfloat16())
        raise RuntimeError
    assert torch.equal(parameter.detach(), values[1]) and torch.equal(half, flat.master.detach().bfloat16())


def test_the_files_hold_the_average_and_the_run_goes_on_with_the_factors(world, tmp_path):
    """Against a run without it, whose factors are averaged here by hand."""
    plain = make_run(world, tmp_path / "plain", train={"checkpoint_every": 1})
    train(plain)
    steps = [factors(tmp_path / "plain" / "checkpoints" / f"step-00000{n}", "adapter") for n in range(1, 7)]
    expected = {name: torch.stack([own[name] for own in steps[:2]]).mean(0) for name in steps[0]}
    for own in steps[2:]:
        expected = {name: 0.5 * expected[name] + 0.5 * own[name] for name in own}
    train(make_run(world, tmp_path / "averaged", train={"average": 0.5}))
    found = factors(tmp_path / "averaged")
    assert found.keys() == expected.keys() and not same_factors(found, steps[-1])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert same_factors(found, factors(tmp_path / "averaged" / "checkpoints" / "step-000006", "adapter"))
    kept, moved = (newest_state(tmp_path / name).part("factors") for name in ("averaged", "plain"))
    assert same_factors(kept, moved)


def test_validation_shows_the_average(world, tmp_path):
    """The images of an averaged run are those of its file, not those of its factors; the held-out loss too."""
    shown = {"every": 6, "prompts": ["A [V] dog"], "loss": True}
    config = make_run(world, tmp_path / "averaged", train={"average": 0.9, "learning_rate": 0.1}, validation=shown)
    lines = losses(config)
    again = make_run(
        world, tmp_path / "again", validation=shown,
        train={"steps": 1, "learning_rate": 1e-9, "init_from": str(tmp_path / "averaged" / "averaged.safetensors")},
    )  # fmt: skip
    plain = make_run(world, tmp_path / "plain", train={"learning_rate": 0.1}, validation=shown)
    assert losses(again)[0] == pytest.approx(lines[-1], rel=1e-4)
    assert abs(losses(plain)[-1] - lines[-1]) > 5e-4 * lines[-1]


def losses(config):
    import json

    lines = (train(config).file.parent / "metrics.jsonl").read_text().splitlines()
    return [line["validation_loss"] for line in map(json.loads, lines) if "validation_loss" in line]


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"train": {"average": 0.7}}, marks=pytest.mark.full),
        {"train": {"average": 0.7, "rate_unit": "dw", "learning_rate": 1e-3}, "adapter": {"norm_cap": 0.1}},
        pytest.param({"train": {"rate_ratio": 4.0}, "adapter": {"type": "loha"}}, marks=pytest.mark.full),
    ],
    ids=["average", "all three", "ratio"],
)
def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(world, tmp_path, sections):
    straight = factors(train(make_run(world, tmp_path / "a" / "run", **sections)).file.parent)
    config = make_run(world, tmp_path / "b" / "run", **sections)
    assert finish(start(lambda: train(config), tmp_path / "log", KRONA_FAULT="step:3:SIGKILL")) == -signal.SIGKILL
    assert same_factors(factors(train(config, resume=True).file.parent), straight)
    changed = make_run(world, tmp_path / "b" / "run", **{**sections, "train": {"average": 0.2}})
    with pytest.raises(ValueError, match=r"changed .*train\.average"):
        train(changed, resume=True)


@pytest.mark.full
def test_a_level_down_keeps_the_average(world, tmp_path, monkeypatch):
    """Running out of memory rebuilds the optimiser; the average comes along."""
    from diffusekrona_train.training.loss import Objective

    straight = factors(train(make_run(world, tmp_path / "a" / "run", train={"average": 0.7})).file.parent)
    real, seen = Objective.batches, []

    def short(self, step, micro):
        if step == 3 and not seen:
            seen.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, step, micro)

    monkeypatch.setattr(Objective, "batches", short)
    found = factors(train(make_run(world, tmp_path / "b" / "run", train={"average": 0.7})).file.parent)
    assert seen and all(torch.allclose(found[name], straight[name], atol=1e-6) for name in straight)


def test_rates_up_to_one_stay_finite_under_the_cap(world, tmp_path):
    from diffusekrona_train.adapters import formats

    config = make_run(world, tmp_path / "run", adapter={"norm_cap": 0.2}, train={"learning_rate": 1.0})
    sizes = {}

    def looked_at(run):
        sizes.update(run.objective.injection.base_sigmas())
        return work(run)

    from diffusekrona_train.training import run as running

    original, running.work = running.work, looked_at
    try:
        file = formats.read_adapter(train(config).file)
    finally:
        running.work = original
    for name, group in file.groups.items():
        dense = torch.kron(group["lokr_w1"], group["lokr_w2"])
        assert 0 < torch.linalg.matrix_norm(dense, 2) <= 0.2 * sizes[name] * (1 + 1e-4)
