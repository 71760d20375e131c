"""Steps, memory, disk and device, against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch

from diffusekrona_train.config import make_config
from diffusekrona_train.data import Collection, Picture
from diffusekrona_train.models import open_model
from diffusekrona_train.training.check import needs


def photos(count, repeats=1):
    return Collection([Picture(None, "A sks dog", False, "00", 64, 64, str(i), repeats) for i in range(count)])


def run(tmp_path, **more):
    return make_config({"subject": {"images": "x", "class": "dog"}, "output": str(tmp_path / "runs" / "dog")} | more)


@pytest.mark.parametrize("world", [None, "4", "nonsense"])
def test_batches_count_processes(world, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    count = 4 if world == "4" else 1
    first, second, *_ = needs.step_lines(run(tmp_path, train={"steps": 100, "batch_size": 2}), photos(5))
    assert f"batch {2 * count} " in first and f"= {200 * count} views" in first
    assert f"passes: {200 * count / 5:.1f}" in second


def test_kohyas_counting_gives_the_same_number_of_views(tmp_path):
    config = run(tmp_path, train={"steps": 480, "batch_size": 3})
    line = needs.step_lines(config, photos(7))[1]
    repeats, per_epoch, epochs = (
        float(part)
        for part in __import__("re")
        .search(r"counting (\d+) repeats .* = (\d+) steps an epoch, ([\d.]+) epochs", line)
        .groups()
    )
    assert per_epoch == math.ceil(7 * repeats / 3)
    assert abs(per_epoch * epochs * 3 - 480 * 3) < 0.02 * 480 * 3


@pytest.mark.parametrize(("rate", "said"), [(1e-3, "overfit"), (5e-5, "ignore the photos"), (5e-4, "")])
def test_learning_rates_outside_the_papers_range(rate, said, tmp_path):
    lines = needs.step_lines(run(tmp_path, train={"learning_rate": rate}), photos(5))
    assert said in lines[-1] and len(lines) == (3 if said else 2)


def test_memory_falls_from_plain_to_nf4_and_says_how(tmp_path):
    lines = needs.memory_lines(run(tmp_path), open_model("sdxl"))
    plain, checkpointing, nf4, offload = (
        float(part.split()[0]) for part in lines[0].removeprefix("about ").split(", ")
    )
    assert plain > checkpointing > nf4 > 3 and nf4 > offload > 1
    assert "train.memory: nf4" in lines[-1]
    assert "offload keeps 1.0 GiB" in "".join(lines)  # 1.9 B numbers of 4.5 bits
    assert "train.batch_size: 1" in needs.memory_lines(run(tmp_path, train={"batch_size": 4}), open_model("sdxl"))[-1]


@pytest.mark.parametrize(("precision", "said"), [("auto", "7.5 GiB"), ("int8", "3.7 GiB"), ("fp32", "15.0 GiB")])
def test_what_text_encoders_take_is_said(precision, said, tmp_path):
    source = open_model("z-image", text_precision=precision)
    (line,) = needs.encoder_lines(source)
    assert said in line and ("int8" in line) == (precision != "int8")
    assert needs.encoder_lines(open_model("sdxl")) == []


def test_disk_is_what_the_files_weigh(tmp_path):
    config = run(tmp_path, train={"steps": 200, "checkpoint_every": 100}, validation={"every": 0})
    (line,) = needs.disk_lines(config, open_model("sdxl"), photos(5), trainable=1_000_000)
    latents = 5 * 4 * 128 * 128 * 4
    # two checkpoints and the final adapter in fp32, two resume states of factor and two moments
    assert f"cache {latents / 1e6:.1f} MB" in line and f"run {(3 * 4 + 2 * 12):.1f} MB" in line


def test_encoded_prompts_of_a_transformer_are_counted(tmp_path):
    """FLUX.2 dev: 512 tokens of three layers of 5120 numbers in 16 bits, for four prompts."""
    config = run(tmp_path, validation={"every": 0, "prompts": ["A [V] dog at night"]})
    source = open_model("flux2-dev")
    (line,) = needs.disk_lines(config, source, photos(5), trainable=1_000_000)
    side = config.data.resolution // 8
    prompts = len({"", "A sks dog", "a dog", "A sks dog at night"})
    assert f"cache {(5 * 32 * side**2 * 4 + prompts * 512 * 15360 * 2) / 1e6:.1f} MB" in line


def test_too_little_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "are free there" in needs.disk_lines(run(tmp_path), open_model("sdxl"), photos(5), 1_000_000)[-1]


@pytest.mark.parametrize(
    ("gpu", "built", "said"),
    [(True, None, "pip install --force-reinstall torch"), (True, "12.8", "cannot reach"), (False, None, "")],
)
def test_a_gpu_that_torch_cannot_use(gpu, built, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(needs, "has_nvidia_gpu", lambda: gpu)
    lines = needs.device_lines()
    assert lines[0].startswith("CPU") and (said in lines[-1] if said else len(lines) == 1)
