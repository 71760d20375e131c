"""Many subjects on one model against runs of their own: the same adapters, whoever is beside them, killed or not."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from diffusekrona_train.fleet import personalise
from tests import fleets
from tests.runs import factors, finish, make_world, same_factors, start

TYPES = {
    "krona": {"a1": 4, "a2": 4},
    "lora": {"type": "lora", "rank": 2},
    "lokr": {"type": "lokr", "rank": 1, "factor": 4, "decompose_both": True},
    "loha": {"type": "loha", "rank": 2},
    "terms": {"type": "terms", "rank": 2, "rho": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def close(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", TYPES)
def test_each_job_becomes_what_it_would_alone(world, tmp_path, kind):
    """Four jobs over three slots: other steps, rates, losses, priors and seeds, one after another in a freed slot."""
    jobs = fleets.jobs_of(world, 4)
    tree = fleets.common(world, TYPES[kind])
    ends = fleets.trained(jobs, tmp_path / "packed", world, config=tree, pack=3)
    assert {name: done.end for name, done in ends.items()} == dict.fromkeys(ends, "trained")
    some = jobs if kind == "krona" else jobs[1:2]
    for job in some:
        close(factors(tmp_path / "packed" / job["id"]), fleets.alone(job, tmp_path / "alone", tree))
    different = [factors(tmp_path / "packed" / job["id"]) for job in jobs[:2]]
    assert not same_factors(*different)


@pytest.mark.full
def test_what_is_beside_the_structure_is_each_jobs_own(world, tmp_path):
    """A is aligned with a job's own photos while others have slots; averages, rates in dW and caps are a row's own."""
    own: list[dict] = [
        {"train.average": 0.5},
        {"train.rate_unit": "dw", "learning_rate": 1e-3},
        {"train.loss": "dco", "train.dco_beta": 50.0, "steps": 3},
    ]
    jobs = [{**job, **more} for job, more in zip(fleets.jobs_of(world, 3), own, strict=True)]
    tree = fleets.common(world, {"a1": 4, "a2": 4, "init_a": "aligned", "align_draws": 3, "norm_cap": 0.05})
    ends = fleets.trained(jobs, tmp_path / "packed", world, config=tree, pack=2)
    assert {done.end for done in ends.values()} == {"trained"}
    for job in jobs:  # a singular vector magnifies the rounding of the gradients
        mine, own = factors(tmp_path / "packed" / job["id"]), fleets.alone(job, tmp_path / "alone", tree)
        assert mine.keys() == own.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, own[name], rtol=1e-2, atol=1e-4)


def test_photos_of_other_shapes_have_passes_of_their_own(world, tmp_path):
    jobs = [{**job, "data.buckets": True, "steps": 3} for job in fleets.jobs_of(world, 3)]
    tree = fleets.common(world)
    fleets.trained(jobs, tmp_path / "packed", world, config=tree)
    for job in jobs[:2]:
        close(factors(tmp_path / "packed" / job["id"]), fleets.alone(job, tmp_path / "alone", tree))


def killed(jobs, output, world, progress, **options) -> int:
    def target() -> None:
        list(personalise(jobs, config=fleets.common(world), output=output, progress=progress, **options))

    return finish(start(target, output.parent / "log"))


def test_after_sigkill_the_same_slots_end_bit_for_bit(world, tmp_path):
    jobs = [{**job, "steps": 4} for job in fleets.jobs_of(world, 3)]
    fleets.trained(jobs, tmp_path / "whole", world, pack=3)
    died = killed(jobs, tmp_path / "killed", world, fleets.Killed("saved", 3, step=2), pack=3)
    assert died == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "killed").glob("*/resume/*"))
    assert left == ["step-000002"] * 3
    ends = fleets.trained(jobs, tmp_path / "killed", world, pack=3)
    assert {done.end for done in ends.values()} == {"trained"}
    for job in jobs:
        assert same_factors(*(factors(tmp_path / name / job["id"]) for name in ("whole", "killed"))), job["id"]
        lines = [json.loads(line) for line in (tmp_path / "killed" / job["id"] / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4], "a step was trained twice, or not at all"


def test_other_slots_end_the_same_but_for_rounding(world, tmp_path):
    jobs = [{**job, "steps": 4} for job in fleets.jobs_of(world, 3)]
    killed(jobs, tmp_path / "killed", world, fleets.Killed("saved", 1, step=2), pack=2)
    fleets.trained(reversed(jobs), tmp_path / "killed", world, pack=1)
    fleets.trained(jobs, tmp_path / "whole", world, pack=3)
    for job in jobs:
        close(*(factors(tmp_path / name / job["id"]) for name in ("whole", "killed")))


def test_a_job_that_diverges_is_a_failure_and_its_neighbours_are_as_without_it(world, tmp_path):
    first, wild, last = fleets.jobs_of(world, 3)
    wild = {**wild, "steps": 40, "train.weight_decay": 1e20}
    ends = fleets.trained([first, wild, last], tmp_path / "with", world, pack=3)
    assert [done.end for done in map(ends.__getitem__, ("job-0", "job-1", "job-2"))] == ["trained", "failed", "trained"]
    assert "not finite 3 steps in a row" in ends["job-1"].reason
    (line,) = [json.loads(line) for line in (tmp_path / "with" / "failed.jsonl").open()]
    assert (line["id"], line["reason"]) == ("job-1", ends["job-1"].reason)
    fleets.trained([first, last], tmp_path / "without", world, pack=3)
    for name in ("job-0", "job-2"):
        close(factors(tmp_path / "with" / name), factors(tmp_path / "without" / name))
