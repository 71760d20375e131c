"""Two processes are one with twice the batch; launchers; and what happens when one of two dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from diffusekrona_train.common.run_folder import read_metrics
from diffusekrona_train.config import dump_config
from diffusekrona_train.training import train
from tests.runs import command, factors, finish, make_run, make_world, newest_state, start, world_env

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def start_two(config, folder: Path, **env):
    """Two forked processes that train together."""
    shared = [{**own, **env} for own in world_env(2)]
    return [start(lambda: command(config), folder / f"log{rank}", **own) for rank, own in enumerate(shared)]


def apart(a, b) -> float:
    """Largest difference of two adapters, relative to the largest value."""
    return max(float((a[name] - b[name]).abs().max()) for name in a) / max(float(a[name].abs().max()) for name in a)


@pytest.mark.parametrize("prior", ["none", "teacher", "images"])
def test_two_processes_are_one_with_batch_2_or_accumulation_2(world, tmp_path, prior):
    settings = {"steps": 4, "batch_size": 1, "max_grad_norm": 0.1, "schedule": "linear", "learning_rate": 1e-3}
    prior = {"kind": prior, **({"images": str(world / "photos"), "count": 3} if prior == "images" else {})}

    def run(name, **more):
        return make_run(world, tmp_path / name, train={**settings, **more}, prior=prior)

    one = factors(train(run("one", batch_size=2)).file.parent)
    two = run("two")
    assert [finish(child) for child in start_two(two, tmp_path)] == [0, 0]
    state = newest_state(tmp_path / "two")
    assert state.about["processes"] == 2
    assert apart(one, factors(tmp_path / "two")) < 2e-3
    accumulated = factors(train(run("sum", gradient_accumulation=2)).file.parent)
    assert apart(one, accumulated) < 2e-3
    lines = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_signal_to_one_process_stops_both_at_the_same_step(world, tmp_path):
    config = make_run(world, tmp_path / "run", train={"steps": 300, "batch_size": 1, "checkpoint_every": 1000})
    children = start_two(config, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    os.kill(children[1].pid, signal.SIGTERM)
    assert [finish(child) for child in children] == [143, 143]
    assert 3 <= newest_state(tmp_path / "run").step < 300


def test_the_other_process_ends_when_one_dies(world, tmp_path):
    config = make_run(world, tmp_path / "run", train={"steps": 300, "batch_size": 1})
    first, second = start_two(config, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    os.kill(second.pid, signal.SIGKILL)
    began = time.monotonic()
    assert finish(first, 60) not in (0, None)
    assert time.monotonic() - began < 60
    assert finish(second) == -signal.SIGKILL


def test_out_of_memory_on_one_process_takes_both_down_a_level(world, tmp_path):
    config = make_run(world, tmp_path / "run", train={"steps": 2, "batch_size": 1})
    first, second = world_env(2)
    children = [
        start(lambda: command(config), tmp_path / "log0", **first),
        start(lambda: command(config), tmp_path / "log1", **second, KRONA_FAULT="step:1:oom"),
    ]
    assert [finish(child) for child in children] == [0, 0]
    assert newest_state(tmp_path / "run").about["level"] == "checkpointing"


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launchers_start_two_processes(world, tmp_path, launcher):
    config = make_run(world, tmp_path / "run", train={"steps": 2, "batch_size": 1})
    (tmp_path / "run.yaml").write_text(dump_config(config))
    here = Path(sys.executable).parent
    two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    commands = {
        "accelerate": [here / "accelerate", "launch", *two],
        "torchrun": [here / "torchrun", "--standalone", "--nproc_per_node", "2"],
    }
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*commands[launcher], "-m", "diffusekrona_train", "--config", tmp_path / "run.yaml"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert newest_state(tmp_path / "run").about["processes"] == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["steps"] == 2
    assert done.stdout.count("done: 2 steps") == 1


def test_a_launcher_that_meant_more_processes_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "diffusekrona_train.training.setup.Accelerator", lambda **_: type("One", (), {"num_processes": 1})()
    )
    with pytest.raises(ValueError, match="WORLD_SIZE.*ACCELERATE_USE_CPU"):
        train(make_run(world, tmp_path / "run"))
