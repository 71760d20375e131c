"""A run that was stopped, killed or extended ends with the factors of an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from diffusekrona_train.training import checkpoint, train
from tests.runs import Told, command, factors, finish, make_run, make_world, newest_state, same_factors, start

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The final factors of an uninterrupted run of 6 steps."""
    return factors(train(make_run(world, tmp_path_factory.mktemp("runs") / "straight")).file.parent)


@pytest.mark.parametrize(
    ("fault", "starts_above"),
    [
        ("setup:0:SIGKILL", 0),
        ("step:1:SIGKILL", 0),
        ("step:3:SIGKILL", 2),
        ("adapter:4:SIGKILL", 2),
        ("state:2:SIGKILL", 0),
        ("state:4:SIGKILL", 2),
        ("rotation:6:SIGKILL", 6),
        ("end:6:SIGKILL", 6),
    ],
)
def test_killed_and_resumed(world, straight, tmp_path, fault, starts_above):
    config = make_run(world, tmp_path / "straight")
    assert finish(start(lambda: train(config), tmp_path / "log", KRONA_FAULT=fault)) == -signal.SIGKILL
    assert not (tmp_path / "straight" / "straight.safetensors").exists()
    state = checkpoint.newest(tmp_path / "straight")
    assert (state.step if state else 0) == starts_above
    result = train(config, resume=True)
    assert same_factors(factors(result.file.parent), straight)
    assert not list(tmp_path.rglob(".writing-*"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_killed_while_the_cache_is_written(world, straight, tmp_path):
    config = make_run(world, tmp_path / "straight", data={"cache_dir": str(tmp_path / "cache")})
    assert finish(start(lambda: train(config), tmp_path / "log", KRONA_FAULT="cache:2:SIGKILL")) == -signal.SIGKILL
    assert any((tmp_path / "cache").rglob("*.safetensors"))
    assert same_factors(factors(train(config, resume=True).file.parent), straight)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(world, straight, tmp_path, number, status):
    config = make_run(world, tmp_path / "straight", train={"checkpoint_every": 100})
    child = start(lambda: command(config), tmp_path / "log", KRONA_FAULT=f"step:2:{signal.Signals(number).name}")
    assert finish(child) == status
    assert newest_state(tmp_path / "straight").step == 3
    assert "--resume" in (tmp_path / "log").read_text()
    resumed = make_run(world, tmp_path / "straight", train={"checkpoint_every": 1})
    assert same_factors(factors(train(resumed, resume=True).file.parent), straight)


def test_a_signal_from_outside_in_the_middle(world, straight, tmp_path):
    config = make_run(world, tmp_path / "straight", train={"checkpoint_every": 100, "steps": 400})
    child = start(lambda: command(config), tmp_path / "log")
    metrics = tmp_path / "straight" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    assert finish(child) == 143
    assert 3 <= newest_state(tmp_path / "straight").step < 400


def test_a_longer_run_is_a_straight_one_and_resume_from_takes_an_older_state(world, straight, tmp_path):
    short = train(make_run(world, tmp_path / "straight", train={"steps": 4}))
    assert not same_factors(factors(short.file.parent), straight)
    longer = make_run(
        world, tmp_path / "straight", train={"log_every": 3}, validation={"prompts": ["[V]"], "loss": False}
    )
    assert same_factors(factors(train(longer, resume=True).file.parent), straight)
    elsewhere = make_run(world, tmp_path / "other" / "straight")
    state = tmp_path / "straight" / "resume" / "step-000004"
    assert same_factors(factors(train(elsewhere, resume_from=str(state)).file.parent), straight)


def test_rewinding_forgets_later_states(world, straight, tmp_path):
    config = make_run(world, tmp_path / "straight", train={"keep_resume_states": 9})
    train(config)
    state = tmp_path / "straight" / "resume" / "step-000002"
    shorter = make_run(world, tmp_path / "straight", train={"keep_resume_states": 9, "steps": 4})
    train(shorter, resume_from=str(state))
    assert [path.name for path in checkpoint.states(tmp_path / "straight")] == ["step-000004", "step-000002"]
    assert newest_state(tmp_path / "straight").step == 4


@pytest.mark.parametrize(
    ("section", "values", "field"),
    [
        ("train", {"learning_rate": 0.02}, "train.learning_rate"),
        ("train", {"seed": 1}, "train.seed"),
        ("train", {"batch_size": 1}, "train.batch_size"),
        ("adapter", {"a1": 2, "a2": 4}, "adapter.a1"),
        ("subject", {"token": "zwx"}, "subject.token"),
        ("prior", {"kind": "teacher"}, "prior.kind"),
        ("data", {"flip": True}, "data.flip"),
    ],
)
def test_resume_refuses_another_run_by_field(world, tmp_path_factory, section, values, field):
    place = tmp_path_factory.getbasetemp() / "refused" / "run"
    if not place.exists():
        train(make_run(world, place, train={"steps": 1}))
    with pytest.raises(ValueError, match=field) as error:
        train(make_run(world, place, **{section: values}), resume=True)
    assert "\n" not in str(error.value)


def test_resume_refuses_other_pictures_and_fewer_steps(world, tmp_path):
    from tests.tiny.photos import draw_photos

    own = tmp_path / "photos"
    draw_photos(own, 2)
    subject = {"images": str(own), "class": "dog"}
    train(make_run(world, tmp_path / "run", subject=subject, train={"steps": 2}))
    with pytest.raises(ValueError, match="train.steps: 1 "):
        train(make_run(world, tmp_path / "run", subject=subject, train={"steps": 1}), resume=True)
    (own / "0.png").unlink()
    with pytest.raises(ValueError, match=r"photos are not those .*0\.png is not there any more"):
        train(make_run(world, tmp_path / "run", subject=subject), resume=True)


def test_a_damaged_newest_state_is_named_and_the_one_before_taken(world, straight, tmp_path):
    config = make_run(world, tmp_path / "straight")
    finish(start(lambda: train(config), tmp_path / "log", KRONA_FAULT="step:5:SIGKILL"))
    newest = tmp_path / "straight" / "resume" / "step-000004" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    told = Told()
    assert same_factors(factors(train(config, resume=True, progress=told).file.parent), straight)
    assert "step-000004" in told.text and "resuming after step 2" in told.text


def test_eight_bit_adam_resumes_bitwise(world, tmp_path):
    settings = {"optimizer": "adamw8bit", "steps": 4}
    adapter = {"type": "lora", "rank": 64}  # factors above 4096 elements are those that get 8-bit state
    whole = train(make_run(world, tmp_path / "a" / "run", train=settings, adapter=adapter))
    part = make_run(world, tmp_path / "b" / "run", train=settings, adapter=adapter)
    assert finish(start(lambda: train(part), tmp_path / "log", KRONA_FAULT="step:3:SIGKILL")) == -signal.SIGKILL
    assert same_factors(factors(train(part, resume=True).file.parent), factors(whole.file.parent))
