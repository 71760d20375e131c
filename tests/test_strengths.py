"""Schedules of the strength over noise levels, and the strength that is chosen together with the checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona_train import evaluation as evaluate
from diffusekrona_train.adapters.formats import read_adapter, save_adapter, tensorfile
from diffusekrona_train.adapters.formats.annotate import annotate
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig, make_config
from diffusekrona_train.config.strengths import Part, parse_strengths, strength_at
from diffusekrona_train.evaluation.adapters import choose
from diffusekrona_train.models import open_model
from diffusekrona_train.models.schedulers import build_scheduler
from diffusekrona_train.sampling import plan as pictures
from diffusekrona_train.sampling import session as studio
from diffusekrona_train.sampling.render import SampleSettings, noise_generator
from diffusekrona_train.sampling.strengths import scheduled
from diffusekrona_train.training import train
from tests.runs import make_run, make_world
from tests.test_evaluate import a_plan, run_app
from tests.test_sample import door, levels

LEVELS = build_scheduler("ddim", open_model("toybox").load("scheduler")["scheduler"])
PROMPT, SEED = "a sks dog on the grass", 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """toybox, and two adapters for it as files."""
    root, source = tmp_path_factory.mktemp("strengths"), open_model("toybox")
    unet = source.load("denoiser")["denoiser"]
    for i, token in enumerate(("sks", "zwx")):
        injection = inject(unet, AdapterConfig(a1=4, a2=4), seed=i)
        dice = torch.Generator().manual_seed(i)
        for parameter in injection.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=dice)
        about = {"model": "toybox", "token": token, "class": "dog", "resolution": 64}
        save_adapter(root / f"{token}.safetensors", injection, about)
        injection.eject()
    return root, source, unet


# ---- the notation --------------------------------------------------------------------------------------------------


def test_a_schedule_is_read_and_followed():
    parts = parse_strengths("0.3@0.25+0.8@.5")
    assert parts == (Part(0.3, 0.25), Part(0.8, 0.5)) and parse_strengths("") == parse_strengths("none") == ()
    told = [strength_at(parts, progress) for progress in (0.0, 0.2499, 0.25, 0.4999, 0.5, 1.0)]
    assert told == [0.3, 0.3, 0.8, 0.8, 1.0, 1.0]
    assert strength_at((), 0.0) == 1.0 and strength_at(parse_strengths("0@1"), 1.0) == 1.0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0.3", "should be STRENGTH@UNTIL such as 0.3@0.25"),
        ("0.3@0.25,1@0.5", "joined with +"),
        ("-1@0.5", "should be STRENGTH@UNTIL"),
        ("11@0.5", "strength 11; give 0 to 10"),
        ("0.3@0", "0 should lie above the part before and up to 1"),
        ("0.3@1.5", "1.5 should lie"),
        ("0.3@0.5+0.5@0.5", "0.5 should lie above the part before"),
    ],
)
def test_a_schedule_that_is_none_is_refused(text, why, world, tmp_path):
    with pytest.raises(ValueError, match="strength_schedule: ") as refused:
        parse_strengths(text)
    assert why in str(refused.value)
    done = door(world[0] / "sks.safetensors", "a [V]", "--strength-schedule", text, "--output", tmp_path / "out")
    assert done.exit_code == 2 and why in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="strength_schedule"):
        tree: dict[str, Any] = {"subject": {"images": "x", "class": "dog"}, "output": "runs/x"}
        make_config({**tree, "validation": {"strength_schedule": text}})


def test_the_strength_is_set_where_the_noise_level_changes_it_and_is_1_afterwards():
    """With a sampler that asks twice a level, and timesteps by position and by name."""
    said: list[float] = []

    class Denoiser(torch.nn.Module):
        def forward(self, sample, timestep):
            said.append(float(timestep))
            return sample

    denoiser, sample = Denoiser(), torch.zeros(1)
    with scheduled(denoiser, "0.3@0.25", LEVELS, said.append):
        for t in (999, 751, 750, 749, 500):
            denoiser(sample, torch.tensor(t))
            denoiser(sample, timestep=torch.tensor([t, t]).max())
    denoiser(sample, torch.tensor(999))
    assert said == [0.3, 999, 999, 751, 751, 750, 750, 1.0, 749, 749, 500, 500, 999]
    said.clear()
    with pytest.raises(RuntimeError), scheduled(denoiser, "0.3@0.25", LEVELS, said.append):
        denoiser(sample, torch.tensor(999))
        raise RuntimeError
    assert said == [0.3, 999, 1.0], "set back where sampling fails too"


def test_a_model_without_noise_levels_is_told():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with (
        pytest.raises(ValueError, match="strength_schedule: works for models with discrete noise levels"),
        scheduled(torch.nn.Identity(), "0.3@0.25", flow, print),
    ):
        pass
    with scheduled(torch.nn.Identity(), "", flow, print):
        pass


# ---- images --------------------------------------------------------------------------------------------------------


def with_delta(unet, files: list, strength: float):
    """A copy of the denoiser with W + strength * sum of A ⊗ B as its weights, built by torch.kron."""
    unet = copy.deepcopy(unet)
    for file in files:
        for name, group in file.groups.items():
            factors = [value for key, value in sorted(group.items()) if key != "alpha"]
            delta = torch.kron(*factors)
            weight = unet.get_submodule(name).weight
            weight.data += strength * delta.reshape(weight.shape)
    return unet


@torch.no_grad()
def by_hand(source, unet, files: list, strength_of) -> np.ndarray:
    """The image of a plain DDIM loop of 4 steps without guidance; strength_of(t) is the strength at timestep t."""
    parts = source.load("vae", "scheduler")
    scheduler = build_scheduler("ddim", parts["scheduler"])
    scheduler.set_timesteps(4)
    texts = studio.encode_texts(source, [PROMPT], torch.device("cpu"))[PROMPT]
    texts = source.family.collate([{**texts, **source.family.picture_conditioning((64, 64), (0, 0), (64, 64))}])
    side = unet.config.sample_size
    x = torch.randn((1, unet.config.in_channels, side, side), generator=noise_generator(PROMPT, SEED))
    made: dict[float, Any] = {}
    for t in scheduler.timesteps:
        strength = strength_of(float(t))
        made.setdefault(strength, with_delta(unet, files, strength))
        x = scheduler.step(source.family.predict(made[strength], x, t[None], texts), t, x).prev_sample
    assert len(made) == 2, "both strengths are used"
    pixels = source.family.decode(parts["vae"], x)[0]
    return (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def drawn(world, uses: list, schedule: str, *, fuse: bool, scale: float | None = 1.0, count: int = 1, **more) -> list:
    """Images of PROMPT from the sampling path, 4 steps; uses: (adapter, strength)."""
    root, source, _ = world
    subjects = studio.subjects_of([(root / f"{name}.safetensors", strength) for name, strength in uses])
    settings = SampleSettings(4, **{"guidance": 1.0, **more}, height=64, width=64, strength_schedule=schedule)
    room = studio.Studio(source, subjects, [PROMPT, ""], studio.Memory(fuse=fuse), torch.device("cpu"))
    plan = pictures.plan_pictures([PROMPT], range(SEED, SEED + count), settings, scale=scale)
    paint = room.painter([scale], keep=False, varies=bool(schedule))
    return [paint([item])[0] for item in plan]


@pytest.mark.parametrize("fuse", [False, True])
def test_the_image_is_that_of_weights_changed_by_hand(world, fuse):
    """ComfyUI's rule: start_percent 0.25 begins at timestep 0.75 * 999."""
    root, source, unet = world
    files = [read_adapter(root / f"{name}.safetensors") for name in ("sks", "zwx")]
    for chosen, uses in ((files[:1], [("sks", 1.0)]), (files, [("sks", 1.0), ("zwx", 1.0)])):
        wanted = by_hand(source, unet, chosen, lambda t: 0.3 if t > 749.25 else 1.0)
        (found,) = drawn(world, uses, "0.3@0.25", fuse=fuse, scheduler="ddim")
        (without,) = drawn(world, uses, "", fuse=fuse, scheduler="ddim")
        assert levels(found, wanted) <= 2 and levels(without, wanted) > 8


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "euler_a"])
def test_every_sampler_follows_it_fused_and_apart(world, scheduler):
    apart, fused = (
        drawn(world, [("sks", 0.8), ("zwx", 0.5)], "0.2@0.5", fuse=fuse, scheduler=scheduler)[0]
        for fuse in (False, True)
    )
    (without,) = drawn(world, [("sks", 0.8), ("zwx", 0.5)], "", fuse=False, scheduler=scheduler)
    assert levels(apart, fused) <= 2 and levels(apart, without) > 8


def test_strength_1_is_bitwise_no_schedule_and_the_next_image_begins_anew(world):
    for fuse in (False, True):
        plain = drawn(world, [("sks", 1.0)], "", fuse=fuse, count=2)
        ones = drawn(world, [("sks", 1.0)], "1@0.5", fuse=fuse, count=2)
        assert all(levels(a, b) == 0 for a, b in zip(plain, ones, strict=True))
    first, second = drawn(world, [("sks", 1.0)], "0.3@0.25", fuse=True, count=2)
    assert levels(first, drawn(world, [("sks", 1.0)], "0.3@0.25", fuse=True)[0]) == 0 and levels(first, second) > 8
    half = drawn(world, [("sks", 1.0)], "0.6@1", fuse=False, scale=0.5)[0]
    assert levels(half, drawn(world, [("sks", 0.3)], "", fuse=False)[0]) == 0, "it multiplies the scale"
    base = drawn(world, [("sks", 1.0)], "0.3@0.25", fuse=False, scale=None)[0]
    assert levels(base, drawn(world, [], "", fuse=False, scale=None)[0]) == 0, "the base model has no strength"


def test_the_record_of_an_image_has_its_schedule(world, tmp_path):
    file = world[0] / "sks.safetensors"
    common = (file, "a [V] dog", "--steps", 2, "--guidance", 1, "--output", tmp_path)
    done = door(*common, "--strength-schedule", "0.3@0.25", "--base")
    assert done.exit_code == 0, done.output
    done = door(*common, "--sweep", "strength-schedule=none,0.5@0.5")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    told = sorted(row.get("strength_schedule", "none") for row in rows)
    assert told == ["0.3@0.25", "0.5@0.5", "none", "none"] and len({row["file"] for row in rows}) == 4
    assert sum("strength_schedule-none" in row["file"] for row in rows) == 1
    assert all("strength_schedule" not in row for row in rows if row["scale"] is None)
    image = next(row["file"] for row in rows if row.get("strength_schedule") == "0.5@0.5")
    assert "Strength schedule: 0.5@0.5" in Image.open(tmp_path / image).info["parameters"]


def test_images_without_a_schedule_keep_their_names():
    (item,) = pictures.plan_pictures(["a dog"], [0], SampleSettings(3, 4.0, height=64, width=64))
    assert item.file == "000-a-dog-seed000000-43fc5a05.png"


# ---- in training ---------------------------------------------------------------------------------------------------


def test_validation_renders_with_the_schedule(tmp_path):
    """What a run shows of its last step is bitwise what krona-sample gives with the schedule."""
    shown = {"prompts": ["a [V] dog"], "every": 2, "steps": 4, "guidance": 1.0, "strength_schedule": "0.2@0.6"}
    config = make_config(
        {
            "model": "toybox",
            "subject": {"images": "toybox:poodle", "class": "dog"},
            "data": {"cache_dir": str(tmp_path / "cache")},
            "train": {"steps": 2, "batch_size": 1, "learning_rate": 0.1},
            "validation": {**shown, "loss": False, "report": False},
            "output": str(tmp_path / "run"),
        }
    )
    train(config)
    (rendered,) = (tmp_path / "run" / "samples").glob("step-000002/*.png")
    common = (tmp_path / "run", "a [V] dog", "--steps", 4, "--guidance", 1, "--no-fuse")
    for more, same in ((("--strength-schedule", "0.2@0.6"), True), ((), False)):
        out = tmp_path / f"out-{same}"
        done = door(*common, *more, "--output", out)
        assert done.exit_code == 0, done.output
        (path,) = out.glob("0*.png")
        assert (levels(Image.open(path), Image.open(rendered)) == 0) == same


# ---- the strength that is chosen with the checkpoint ---------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run with checkpoints at 2 and 4, and what was chosen of it over two strengths."""
    root = make_world(tmp_path_factory.mktemp("best"))
    shown = {"prompts": ["A [V] dog on the beach"], "every": 0, "steps": 2, "loss": False}
    config = make_run(root, root / "dog", train={"steps": 4}, validation=shown)
    train(config)
    before = {path: read_adapter(path) for path in (root / "dog").rglob("*.safetensors") if "resume" not in path.parts}
    plan = evaluate.Plan(**{**vars(a_plan()), "seeds": (0,), "strengths": (0.5, 1.0, 3.0)})
    return root / "dog", before, evaluate.best_checkpoint(root / "dog", plan), plan


def test_every_checkpoint_is_tried_at_every_strength(run):
    folder, _, best, _ = run
    assert [row["step"] for row in best["checkpoints"]] == [2, 4]
    tried = [(row["step"], one["strength"]) for row in best["checkpoints"] for one in row["strengths"]]
    assert tried == [(step, strength) for step in (2, 4) for strength in (0.5, 1.0, 3.0)]
    flat = [
        {name: {"value": one[name]} for name in ("dino", "clip_t", "class_drift")}
        for row in best["checkpoints"]
        for one in row["strengths"]
    ]
    assert len({one["dino"]["value"] for one in flat}) == 6, "each was rendered at its own strength"
    assert tried[choose(flat, best["base"]["scores"])] == (best["chosen_step"], best["strength"])
    shown = next(row for row in best["checkpoints"] if row["step"] == best["chosen_step"])
    assert (
        shown["strength"] == best["strength"] and json.loads((folder / "evaluation" / "best.json").read_text()) == best
    )


def test_the_choice_stands_in_the_metadata_and_nothing_else_changes(run):
    folder, before, best, _ = run
    chosen = folder / best["adapter"]
    for path, old in before.items():
        new = read_adapter(path)
        said = path == chosen or (path.name == "dog.safetensors" and best["chosen_step"] == 4)
        assert new.info.get("strength") == (best["strength"] if said and best["strength"] != 1 else None), path
        assert {k: v for k, v in new.info.items() if k != "strength"} == old.info
        assert all(torch.equal(new.tensors[key], value) for key, value in old.tensors.items())


def test_krona_sample_takes_the_choice_and_the_command_line_wins(world, tmp_path):
    file = shutil.copyfile(world[0] / "sks.safetensors", tmp_path / "own.safetensors")
    annotate(file, strength=0.4)
    common = ("--steps", 1, "--guidance", 1, "--output")

    def strengths(*words) -> list:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        done = door(*words, *common, out)
        assert done.exit_code == 0, done.output
        rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert ("strength 0.4, as own.safetensors recommends" in done.output) == (
            rows[0]["adapters"][0]["strength"] == 0.4
        )
        return [(row["adapters"][0]["strength"], row["scale"]) for row in rows]

    assert strengths(file, "a [V]") == [(0.4, 1.0)]
    assert strengths("--adapter", file, "a [V]") == [(0.4, 1.0)]
    assert strengths(file, "a [V]", "--strength", 1) == strengths(file, "a [V]", "--scale", 1) == [(1.0, 1.0)]
    assert strengths("--adapter", f"{file}:0.7", "a [V]") == [(0.7, 1.0)]
    assert sorted(strengths(file, "a [V]", "--sweep", "scale=0.5,1")) == [(1.0, 0.5), (1.0, 1.0)]


def test_a_recommendation_that_is_no_number_is_one_line(world, tmp_path):
    file = shutil.copyfile(world[0] / "sks.safetensors", tmp_path / "own.safetensors")
    annotate(file, strength="strong")
    done = door(file, "a [V]", "--output", tmp_path / "out")
    assert done.exit_code == 2 and "recommends strength 'strong', which is not a number" in done.stderr
    assert door(file, "a [V]", "--scale", 1, "--steps", 1, "--output", tmp_path / "out").exit_code == 0
    before = file.read_bytes()
    annotate(file, strength="strong")
    assert file.read_bytes() == before
    annotate(file, strength=None)
    assert read_adapter(file).info == read_adapter(world[0] / "sks.safetensors").info
    tensorfile.write(tmp_path / "other.safetensors", {"x.lora_up.weight": torch.ones(1, 1)}, {})
    with pytest.raises(ValueError, match="not an adapter file of this project"):
        annotate(tmp_path / "other.safetensors", strength=0.5)


def test_strengths_that_are_none_are_one_line(run, capsys):
    for text in ("", "0", "a", "1,-2", "11", "nan"):
        status, _, told = run_app(capsys, "best", run[0], "--strengths", text)
        assert status == 2 and f"--strengths {text!r}: give numbers above 0" in told and told.count("\n") == 1
