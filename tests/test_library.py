"""Training and sampling as a library: what a run reports, how it is stopped, and how it leaves the process."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import weakref

import numpy as np
import pytest
import torch

from diffusekrona_train.common.process import as_found, step_by_step
from diffusekrona_train.common.progress import EventLog, Progress, Stopped
from diffusekrona_train.config import dump_config
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.sampling import sample
from diffusekrona_train.training import train
from diffusekrona_train.training.loss import Objective
from tests.runs import Told, command, factors, finish, make_run, make_world, newest_state, same_factors, start


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """The final factors of a run of 6 steps that nobody stopped."""
    return factors(train(make_run(world, tmp_path_factory.mktemp("runs") / "straight")).file.parent)


def events(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def denoisers(monkeypatch):
    """Weak references to every denoiser that is loaded."""
    load, found = ModelSource.load_denoiser, []

    def loaded(self, *args, **kwargs):
        denoiser = load(self, *args, **kwargs)
        found.append(weakref.ref(denoiser))
        return denoiser

    monkeypatch.setattr(ModelSource, "load_denoiser", loaded)
    return found


# ---- what a run reports --------------------------------------------------------------------------------------------


def test_a_run_reports_the_same_to_its_caller_and_to_its_folder(world, tmp_path, capsys):
    told, watch = Told(), {"every": 2, "prompts": ["[V]"]}
    result = train(make_run(world, tmp_path / "run", train={"steps": 2}, validation=watch), progress=told)
    assert [phase["name"] for phase in told.of("phase")] == ["prepare", "train", "finished"]
    assert [fields["step"] for fields in told.of("step")] == [1, 2]
    losses = [fields["loss"] for fields in told.of("loss")]
    assert tuple(losses) == result.losses and (result.steps, len(losses)) == (2, 2)
    assert [fields["step"] for fields in told.of("image")] == [0, 2]
    assert [fields["step"] for fields in told.of("saved")] == [2, 2]
    assert told.of("saved")[-1]["file"] == str(result.file) and result.file.is_file() and result.seconds > 0
    lines = events(tmp_path / "run")
    for kind in ("phase", "loss", "image", "saved", "message"):
        fields = [
            {k: v for k, v in line.items() if k not in ("event", "time")} for line in lines if line["event"] == kind
        ]
        wanted = told.of(kind)
        if kind == "loss":  # which has a `time` of its own
            wanted = [{k: v for k, v in one.items() if k != "time"} for one in wanted]
        assert fields == wanted
    assert "".join(capsys.readouterr()) == ""


def test_a_config_may_be_a_tree_or_a_file(world, tmp_path, straight):
    config = make_run(world, tmp_path / "straight")
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert same_factors(factors(train(tmp_path / "run.yaml").file.parent), straight)
    tree = config.model_dump(mode="json", by_alias=True)
    assert same_factors(factors(train(tree, overwrite=True).file.parent), straight)
    with pytest.raises(ValueError, match="train.steps"):
        train({**tree, "train": {"steps": "many"}})


def test_a_failure_is_an_event_and_a_run_that_is_refused_leaves_nothing(world, tmp_path, monkeypatch):
    told, config = Told(), make_run(world, tmp_path / "run")
    monkeypatch.setattr(Objective, "batches", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config, progress=told)
    assert told.of("phase")[-1] == {"name": "failed", "error": "division by zero"}
    assert events(tmp_path / "run")[-1]["error"] == "division by zero"
    with pytest.raises(ValueError, match="init_from"):
        train(make_run(world, tmp_path / "no" / "run", train={"init_from": "nowhere.safetensors"}))
    assert not (tmp_path / "no").exists()


def test_lines_that_no_disk_takes_cost_one_warning(tmp_path):
    told = Told()
    log = EventLog(told)
    log.message("before the folder is there")
    (tmp_path / "file").write_text("")
    log.open(tmp_path / "file" / "events.jsonl")
    log.message("lost")
    assert told.text.count("lines are lost") == 1 and "lost" in told.text.splitlines()
    log.open(tmp_path / "run" / "events.jsonl")
    log.message("kept")
    assert [line["text"] for line in events(tmp_path / "run")] == ["kept"]


# ---- how it is stopped ---------------------------------------------------------------------------------------------


def test_stopped_through_progress_and_resumed_is_a_straight_run(world, straight, tmp_path):
    config = make_run(world, tmp_path / "straight", train={"checkpoint_every": 100})
    progress = Progress(lambda event, fields: progress.stop() if (event, fields.get("step")) == ("step", 4) else None)
    with pytest.raises(Stopped) as stopped:
        train(config, progress=progress)
    assert (stopped.value.step, stopped.value.steps) == (4, 6) and stopped.value.checkpoint.is_file()
    assert newest_state(tmp_path / "straight").step == 4
    assert events(tmp_path / "straight")[-1]["name"] == "stopped"
    resumed = make_run(world, tmp_path / "straight")
    assert same_factors(factors(train(resumed, resume=True).file.parent), straight)
    assert [line["name"] for line in events(tmp_path / "straight") if line["event"] == "phase"].count("train") == 2


def test_a_file_called_stop_ends_a_run_once(world, straight, tmp_path):
    folder = tmp_path / "straight"
    config = make_run(world, folder, train={"checkpoint_every": 1})

    def ask(event, fields):
        if (event, fields.get("step")) == ("step", 3):
            (folder / "stop").touch()

    with pytest.raises(Stopped, match="after step 3 of 6"):
        train(config, progress=Progress(ask))
    assert not (folder / "stop").exists()
    (folder / "stop").touch()  # of yesterday: a run that starts does not obey it
    assert same_factors(factors(train(config, resume=True).file.parent), straight)
    assert not (folder / "stop").exists()


def test_the_command_ends_with_143_where_a_file_stopped_it(world, tmp_path):
    folder = tmp_path / "run"
    config = make_run(world, folder, train={"steps": 400, "checkpoint_every": 1000})
    child = start(lambda: command(config), tmp_path / "log")
    while not (folder / "metrics.jsonl").exists() and child.is_alive():
        child.join(0.05)
    (folder / "stop").touch()
    assert finish(child) == 143
    said = (tmp_path / "log").read_text()
    assert "stopped after step" in said and "Continue with: krona-train --config CONFIG.yaml --resume" in said


def test_what_a_callback_raises_ends_the_run(world, tmp_path):
    class Enough(Exception):
        pass

    def watch(event, fields):
        if event == "step":
            raise Enough

    with pytest.raises(Enough):
        train(make_run(world, tmp_path / "run"), progress=Progress(watch))


# ---- how it leaves the process -------------------------------------------------------------------------------------


def surroundings() -> dict:
    import diffusers
    import transformers
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from huggingface_hub.utils import are_progress_bars_disabled

    libraries = [library.utils.logging for library in (diffusers, transformers)]
    return {
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "recompile limit": torch._dynamo.config.recompile_limit,
        "verbosity": [library.get_verbosity() for library in libraries],
        "bars": [library.is_progress_bar_enabled() for library in libraries] + [are_progress_bars_disabled()],
        "bitsandbytes": logging.getLogger("bitsandbytes").level,
        "accelerate": [dict(cls._shared_state) for cls in (PartialState, AcceleratorState, GradientState)],
    }


@pytest.fixture
def loud():
    """Libraries that tell more than they do by themselves, and a random state in the middle of its stream."""
    import diffusers
    import torch._dynamo
    import transformers

    with as_found():
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_info()
            library.utils.logging.enable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(logging.INFO)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch._dynamo.config.recompile_limit = 5
        random.random(), np.random.rand(), torch.rand(3)
        yield surroundings()


def test_a_run_leaves_everything_as_it_was_and_frees_the_model(loud, world, tmp_path, denoisers):
    settings = {"steps": 2, "tf32": False, "mixed_precision": "no"}
    watch = {"every": 2, "prompts": ["[V]"]}
    train(make_run(world, tmp_path / "a", train=settings, validation=watch))
    assert surroundings() == loud
    assert len(denoisers) == 1 and denoisers[0]() is None
    train(make_run(world, tmp_path / "b", train={**settings, "mixed_precision": "bf16"}))  # another precision
    assert surroundings() == loud


def test_so_does_one_that_fails_and_one_that_is_stopped(loud, world, tmp_path, denoisers, monkeypatch):
    batches = Objective.batches

    def broken(self, step, micro):
        held = self.denoiser  # as the frames of a model's forward pass hold it
        np.random.seed(3), torch.manual_seed(4), random.seed(5), torch.set_default_dtype(torch.float64)
        os.environ["KRONA_TEST"] = "1"
        raise RuntimeError(f"in the middle of {type(held).__name__}")

    monkeypatch.setattr(Objective, "batches", broken)
    with pytest.raises(RuntimeError, match="in the middle") as error:
        train(make_run(world, tmp_path / "a"))
    assert surroundings() == loud
    assert error.value is not None and denoisers[0]() is None, "the exception is still here, the model is not"
    monkeypatch.setattr(Objective, "batches", batches)
    progress = Progress()
    progress.stop()
    with pytest.raises(Stopped) as stopped:
        train(make_run(world, tmp_path / "b"), progress=progress)
    assert surroundings() == loud
    assert stopped.value.step == 1 and denoisers[1]() is None


def test_sampling_does_so_between_two_images_too(loud, world, tmp_path, denoisers, monkeypatch):
    file = train(make_run(world, tmp_path / "run", train={"steps": 1})).file
    denoisers.clear()
    images = sample(file, "a [V] dog", model=str(world / "model"), seeds=(0, 1), steps=1, height=64, width=64)
    first = next(images)
    assert surroundings() == loud and denoisers[0]() is not None
    torch.rand(5)  # the caller's own stream is the caller's
    own = torch.get_rng_state()
    rest = list(images)
    assert torch.equal(torch.get_rng_state(), own) and len(rest) == 1 and denoisers[0]() is None
    assert first.image.size == (64, 64) and first.file is None and (first.seed, rest[0].seed) == (0, 1)
    assert first.prompt == "a sks dog"
    denoisers.clear()
    unfinished = sample(file, "a [V] dog", model=str(world / "model"), seeds=(0, 1), steps=1, height=64, width=64)
    next(unfinished)
    del unfinished
    gc.collect()
    assert denoisers[0]() is None


def test_a_generator_between_whose_items_nothing_changes():
    def items():
        for number in range(3):
            os.environ["KRONA_TEST"] = str(number)
            yield number

    for number in step_by_step(items()):
        assert "KRONA_TEST" not in os.environ and number < 3
    with pytest.raises(ZeroDivisionError):
        list(step_by_step(1 // (2 - n) for n in range(4)))


def test_sampling_refuses_before_the_first_image(tmp_path):
    for source, prompts, options, said in [
        (tmp_path / "none.safetensors", "a [V]", {}, "no such run folder"),
        (None, "a dog", {}, "neither an adapter nor a base model"),
        (None, [], {"model": "toybox"}, "no prompt"),
        (None, "a dog", {"model": "toybox", "steps": 0}, "steps is 0"),
        (None, "a [V]", {"model": "toybox"}, "has no adapter"),
    ]:
        with pytest.raises(ValueError, match=said.replace("[", r"\[")) as error:
            sample(source, prompts, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError):
        sample(None, "a dog", model="toybox", colour="red")
