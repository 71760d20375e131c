"""The loop and its step, against losses and updates worked out by hand; and everything that may go wrong in a run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from diffusekrona_train.adapters import formats as weights
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.adapters.texts import Texts
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.data.training_set import Bucket, TrainingSet
from diffusekrona_train.models import family_named, open_model, process
from diffusekrona_train.models.process import Ddpm
from diffusekrona_train.models.sd import collate
from diffusekrona_train.sampling.session import Subject, base_model_of
from diffusekrona_train.training import Diverged, checkpoint, memory, train
from diffusekrona_train.training.draw import Shelf, draw
from diffusekrona_train.training.graph import add_gradients
from diffusekrona_train.training.journal import Stop
from diffusekrona_train.training.loss import Objective
from diffusekrona_train.training.optimizer import Descent
from tests.runs import Told, command, factors, make_run, make_world, newest_state, same_factors
from tests.tiny.photos import draw_photos


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def world_sd(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world_sd"), "sd15")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_and_says_what_to_do_next(world, tmp_path, capsys):
    watch = {"every": 2, "loss": True, "report": True, "prompts": ["A [V] {class}", "[V]"], "seeds": [0, 5]}
    command(make_run(world, tmp_path / "dog", train={"steps": 4, "log_every": 2}, validation=watch))
    path = tmp_path / "dog" / "dog.safetensors"
    for name in ("dog.png", "config.yaml", "metrics.jsonl", "report.html", "loss.png"):
        assert (tmp_path / "dog" / name).stat().st_size > 0
    pictures = sorted(file.name for file in (tmp_path / "dog" / "samples" / "step-000004").iterdir())
    assert pictures == ["00-0.png", "01-5.png", "02-0.png", "03-5.png"]
    lines = metrics(tmp_path / "dog")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    assert {"step", "loss", "lr", "grad_norm", "images_per_s", "time"} <= lines[1].keys()
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4]
    assert yaml.safe_load((tmp_path / "dog" / "config.yaml").read_text())["train"]["steps"] == 4
    assert same_factors(
        load_file(path), load_file(tmp_path / "dog" / "checkpoints" / "step-000004" / "adapter.safetensors")
    )
    said = capsys.readouterr().out
    assert "krona-sample" in said and "load_adapter" in said and "krona-convert" in said
    assert not list(tmp_path.rglob(".lock"))


def test_the_file_holds_no_local_path(world, tmp_path):
    file = weights.read_adapter(train(make_run(world, tmp_path / "dog", train={"steps": 1})).file)
    assert str(tmp_path) not in json.dumps(file.metadata) and str(world) not in json.dumps(file.metadata)
    assert file.info["token"] == "sks" and file.info["class"] == "dog" and file.info["step"] == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"mixed_precision": "bf16"}},
        {"train": {"optimizer": "adamw8bit"}},
        {"train": {"quantize": "nf4"}},
        {"train": {"memory": "nf4", "mixed_precision": "bf16"}},
        {"train": {"memory": "checkpointing", "gradient_accumulation": 2}},
        {"train": {"channels_last": True, "loss": "huber", "weighting": "min_snr", "noise_offset": 0.1}},
        {"train": {"caption_dropout": 0.5, "weighting": "debiased", "schedule": "cosine", "warmup_steps": 1}},
        {"data": {"buckets": True, "flip": True, "variants": 3}},
        {"prior": {"kind": "teacher", "weight": 0.5}},
        {"adapter": {"type": "lora", "rank": 2}},
        {"adapter": {"type": "full"}},
        {"adapter": {"type": "full", "targets": "all"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_ways_to_train(world, world_sd, tmp_path, kind, sections):
    train_section = {"steps": 2, "learning_rate": 1e-3, **sections.get("train", {})}
    adapter = sections.get("adapter", {})
    if "type" in adapter:
        sections = {**sections, "adapter": {**adapter, "a1": 4, "a2": 4}}
    place = world if kind == "sdxl" else world_sd
    path = train(make_run(place, tmp_path / "run", **{**sections, "train": train_section})).file
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


@pytest.mark.full
def test_compiled_blocks_give_the_same_losses_and_one_graph_a_shape(world, tmp_path, monkeypatch):
    """The graphs are run as they were traced (aot_eager): what inductor's kernels would round, no test can hold."""
    from torch._dynamo.utils import counters

    watch = {"every": 2, "loss": True}
    train(make_run(world, tmp_path / "a" / "run", train={"steps": 3}, validation=watch))
    monkeypatch.setattr("diffusekrona_train.training.base.COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    config = make_run(world, tmp_path / "b" / "run", train={"steps": 3, "compile": True}, validation=watch)
    told = Told()
    train(config, progress=told)
    for key in ("loss", "validation_loss"):
        eager, compiled = ([x[key] for x in metrics(tmp_path / name / "run") if key in x] for name in "ab")
        assert compiled == pytest.approx(eager, rel=1e-5) and len(compiled) == len(eager) > 2
    assert "first step compiles" in told.text and "the first step took" in told.text
    # two widths at two sides each (down and up the UNet), and eight blocks; pictures and held-out loss add none
    assert 1 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]


def test_a_compiler_that_fails_is_one_line(world, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise OSError("no working C++ compiler found")

    torch._dynamo.reset()
    monkeypatch.setattr("diffusekrona_train.training.base.COMPILER", broken)
    with pytest.raises(RuntimeError, match=r"torch\.compile failed .*C\+\+ compiler.*train\.compile: false"):
        train(make_run(world, tmp_path / "run", train={"compile": True}))


def test_training_lowers_the_held_out_loss(world, tmp_path):
    train(make_run(world, tmp_path / "run", train={"steps": 40}, validation={"every": 40, "loss": True}))
    before, after = [line["validation_loss"] for line in metrics(tmp_path / "run") if "validation_loss" in line]
    assert after < before


def test_class_images_are_made_once(world, tmp_path):
    prior = {"kind": "images", "count": 2, "images": str(tmp_path / "class")}
    for name in ("a", "b"):
        train(make_run(world, tmp_path / name, train={"steps": 2}, prior=prior))
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    assert same_factors(factors(tmp_path / "a"), factors(tmp_path / "b"))


def test_init_from_continues_the_factors_and_refuses_other_ones(world, tmp_path):
    first = train(make_run(world, tmp_path / "first", train={"steps": 2})).file
    second = make_run(world, tmp_path / "second", train={"steps": 1, "init_from": str(first), "learning_rate": 1e-9})
    before, after = load_file(first), factors(train(second).file.parent)
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-6
    other = make_run(world, tmp_path / "third", train={"init_from": str(first)}, adapter={"a1": 2, "a2": 4})
    with pytest.raises(ValueError, match="init_from.*adapter.a1: 4"):
        train(other)


def test_init_from_is_looked_at_before_anything_is_computed(world, world_sd, tmp_path, monkeypatch):
    """Unreadable, of another adapter, of another model: each is told before a latent is made, and leaves nothing."""
    first = train(make_run(world, tmp_path / "first", train={"steps": 1})).file
    (tmp_path / "cut.safetensors").write_bytes(first.read_bytes()[:300])
    monkeypatch.setattr(
        "diffusekrona_train.training.setup.build_training_set", lambda *_, **__: pytest.fail("caches are made")
    )
    cases = [
        (world, "none.safetensors", {}, "no such file"),
        (world, "cut.safetensors", {}, "cut.safetensors"),
        (world, str(first), {"adapter": {"a1": 2, "a2": 4}}, "adapter.a1: 4"),
        (world_sd, str(first), {}, "is for family 'sdxl'"),
    ]
    for place, name, sections, said in cases:
        config = make_run(place, tmp_path / "out" / "run", train={"init_from": str(tmp_path / name)}, **sections)
        with pytest.raises(ValueError, match="^train.init_from: ") as error:
            train(config)
        assert said in str(error.value) and not (tmp_path / "out").exists()


def test_notes_on_the_factors_are_reported_by_a_run_too(world, tmp_path):
    adapter = {"a1": 3, "a2": 3, "on_indivisible": "nearest"}
    told = Told()
    train(make_run(world, tmp_path / "run", adapter=adapter, train={"steps": 1}), progress=told)
    assert "factors moved to the nearest divisors in" in told.text


@pytest.mark.parametrize(
    "adapter",
    [
        {"a1": 4, "a2": 4},
        {"a1": 1, "a2": 4},
        {"type": "lora", "rank": 2, "a1": 4, "a2": 4},
        {"type": "full", "targets": "all"},
    ],
    ids=str,
)
def test_the_export_that_a_run_proposes_works(world, tmp_path, capsys, monkeypatch, adapter):
    import shlex
    import sys

    from diffusekrona_train.cli.convert import main
    from diffusekrona_train.training.page import write_run_report

    command(make_run(world, tmp_path / "my dog", adapter=adapter, train={"steps": 1}))
    line = next(line for line in capsys.readouterr().out.splitlines() if "krona-convert" in line)
    words = shlex.split(line)
    assert words[0] == "krona-convert" and ("merged" in words) == (adapter.get("targets") == "all")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0, "".join(capsys.readouterr())
    assert "krona-convert" in write_run_report(tmp_path / "my dog").read_text()


def test_keep_best_measures_the_checkpoints_and_costs_nothing_where_it_fails(world, tmp_path, monkeypatch):
    from diffusekrona_train import evaluation as evaluate

    measure = evaluate.best_checkpoint
    plan = evaluate.Plan(seeds=(0,), clip="toybox", dino="toybox")
    monkeypatch.setattr(evaluate, "best_checkpoint", lambda folder, **_: measure(folder, plan))
    best = {"steps": 4, "keep_best": True}
    watch = {"prompts": ["A [V] {class}"]}
    told = Told()
    path = train(make_run(world, tmp_path / "a" / "run", train=best, validation=watch), progress=told).file
    chosen = json.loads((path.parent / "evaluation" / "best.json").read_text())
    assert chosen["chosen_step"] in (2, 4) and [row["step"] for row in chosen["checkpoints"]] == [2, 4]
    assert f"best checkpoint: {path.parent / chosen['adapter']} (step {chosen['chosen_step']})" in told.text
    monkeypatch.setattr(evaluate, "best_checkpoint", lambda *_, **__: 1 / 0)
    again = train(make_run(world, tmp_path / "b" / "run", train=best, validation=watch), progress=told).file
    assert same_factors(load_file(path), load_file(again))
    assert "the checkpoints were not measured (ZeroDivisionError" in told.text


def test_a_v_prediction_model_is_named_in_the_file(tmp_path):
    from tests.tiny import make_pipeline

    make_pipeline("sd21", tmp_path / "model", prediction_type="v_prediction")
    draw_photos(tmp_path / "photos")
    file = weights.read_adapter(train(make_run(tmp_path, tmp_path / "run", train={"steps": 1})).file)
    assert file.info["prediction_type"] == "v_prediction" and file.metadata["modelspec.prediction_type"] == "v"
    assert file.metadata["ss_base_model_version"] == "sd_v2_v" and file.metadata["ss_v2"] == "True"


# ---- one step, by hand ---------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A denoiser that is one number: it predicts weight * x_t, or with the adapter off, x_t."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))


class Family:
    caption, collate = "", staticmethod(collate)

    @staticmethod
    def predict(denoiser, x_t, t, conditioning):
        return denoiser.weight * x_t + conditioning["prompt_embeds"].mean((1, 2)).view(-1, 1, 1, 1)


class Off:
    def __init__(self, denoiser):
        self.denoiser, self.texts = denoiser, Texts()

    def disabled(self):
        import contextlib

        @contextlib.contextmanager
        def off():
            weight = self.denoiser.weight
            self.denoiser.weight = torch.nn.Parameter(torch.tensor(1.0))
            yield
            self.denoiser.weight = weight

        return off()


def make_objective(world, tmp_path, priors=0, **sections):
    config = make_run(world, tmp_path / "x", **sections)
    torch.manual_seed(0)
    bucket = Bucket(torch.randn(3, 1, 2, 4, 4), {}, torch.tensor([1, 1, 2]), ["a", "b", "c"])
    prior = Bucket(torch.randn(2, 1, 2, *([4, 4] if priors == 1 else [2, 8])), {}, torch.tensor([3, 3]), [])
    embeds = [{"prompt_embeds": torch.full((5, 6), float(number)) / 10} for number in range(4)]
    captions = ["", "A sks dog", "a photo", "A dog"]
    data = TrainingSet([bucket], [prior] if priors else [], captions, embeds)
    process = Ddpm(torch.linspace(0.99, 0.01, 100))
    denoiser = Linear()
    device = torch.device("cpu")
    return Objective(config, Family, denoiser, Off(denoiser), data, process, torch.float32, device)


@pytest.mark.parametrize("priors", [0, 1, 2])
def test_the_loss_is_the_weighted_sum_over_instances(world, tmp_path, priors):
    kind = {"prior": {"kind": "images", "weight": 0.3}} if priors else {}
    objective = make_objective(world, tmp_path, priors, train={"batch_size": 2, "weighting": "min_snr"}, **kind)
    total = 0.0
    streams = [("instance", objective.data.instances[0], 1.0)]
    streams += [("prior", objective.data.priors[0], 0.3)] if priors else []
    for stream, bucket, share in streams:
        shelf = Shelf(len(bucket.latents), 1, tuple(bucket.latents.shape[2:]))
        drawn = draw(0, 3, range(2), 2, [shelf], draw_t=objective.process.draw_t, stream=stream)
        for i in range(2):
            a = objective.process.alphas_cumprod[drawn.t[i]]
            x_t = a.sqrt() * bucket.latents[drawn.picture[i], 0] + (1 - a).sqrt() * drawn.eps[i]
            guess = 0.5 * x_t + bucket.caption_index[drawn.picture[i]] / 10
            snr = a / (1 - a)
            total += share * min(snr, 5.0) / snr * ((guess - drawn.eps[i]) ** 2).mean()
    torch.testing.assert_close(objective.loss_of(objective.batches(3, 0)).detach(), total / 2)


def test_the_teacher_is_the_frozen_model_under_the_class_prompt(world, tmp_path):
    objective = make_objective(world, tmp_path, prior={"kind": "teacher", "weight": 0.3}, train={"batch_size": 2})
    plain = make_objective(world, tmp_path, train={"batch_size": 2})
    (batch,) = plain.batches(0, 0)
    x_t = process.add_noise(batch.x_0, batch.eps, batch.t, plain.process.alphas_cumprod)
    teaching = 0.3 * ((0.5 * x_t - 1.0 * x_t) ** 2).flatten(1).mean(1).sum() / 2
    wanted = plain.loss_of(plain.batches(0, 0)) + teaching
    torch.testing.assert_close(objective.loss_of(objective.batches(0, 0)), wanted)
    assert objective.denoiser.weight.item() == 0.5


@pytest.mark.parametrize("prior", ["none", "teacher"])
def test_dco_is_the_formula_with_the_frozen_model_under_the_same_prompt(world, tmp_path, prior):
    """-log sigmoid(-beta (loss - base)) * 2 / beta, by hand; what the teacher answers stays a squared error."""
    section = {"batch_size": 2, "loss": "dco", "dco_beta": 7.0}
    objective = make_objective(world, tmp_path, train=section, prior={"kind": prior, "weight": 0.3})
    plain = make_objective(world, tmp_path, train={"batch_size": 2})
    (batch,) = plain.batches(0, 0)
    x_t = process.add_noise(batch.x_0, batch.eps, batch.t, plain.process.alphas_cumprod)
    caption = torch.tensor(batch.caption).view(-1, 1, 1, 1) / 10
    own = ((0.5 * x_t + caption - batch.eps) ** 2).flatten(1).mean(1)
    base = ((1.0 * x_t + caption - batch.eps) ** 2).flatten(1).mean(1)
    wanted = (-torch.log(torch.sigmoid(-7.0 * (own - base))) * 2 / 7.0).sum() / 2
    if prior == "teacher":
        wanted = wanted + 0.3 * ((0.5 * x_t - 1.0 * x_t) ** 2).flatten(1).mean(1).sum() / 2
    torch.testing.assert_close(objective.loss_of(objective.batches(0, 0)), wanted)
    assert objective.denoiser.weight.item() == 0.5
    assert objective.held_out_loss() == plain.held_out_loss()  # comparable between losses: the squared error


def test_dco_begins_with_the_gradient_of_the_squared_error_and_ends_with_none():
    from diffusekrona_train.training.loss import dco

    for loss, share in ((1.0, 1.0), (0.0, 0.0), (2.0, 2.0)):
        x = torch.tensor([loss], requires_grad=True)
        dco(x, torch.tensor([1.0]), 100.0).backward()
        assert x.grad is not None and x.grad.item() == pytest.approx(share, abs=1e-6)


def test_dco_with_class_images_is_one_line(world, tmp_path):
    with pytest.raises(ValueError, match="^train.loss: dco keeps to the base without class images; set"):
        make_run(world, tmp_path / "x", train={"loss": "dco"}, prior={"kind": "images"})


def test_caption_dropout_takes_the_empty_caption(world, tmp_path):
    every = make_objective(world, tmp_path, train={"caption_dropout": 1.0})
    some = make_objective(world, tmp_path, train={"caption_dropout": 0.5, "batch_size": 8})
    assert every.batches(0, 0)[0].caption == [0, 0]
    dropped = [caption == 0 for step in range(40) for caption in some.batches(step, 0)[0].caption]
    assert 0.4 < sum(dropped) / len(dropped) < 0.6


class OneProcess:
    num_processes, scaler = 1, None

    @staticmethod
    def backward(loss):
        loss.backward()


def make_descent(world, tmp_path, **train_section):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 5), (7,), (64, 128)]]
    return parameters, Descent(parameters, make_run(world, tmp_path / "x", train=train_section).train, OneProcess)


def squares(parameters):
    return torch.stack([(parameter**2).sum() for parameter in parameters]).sum()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_adamw_on_clipped_means(world, tmp_path, accumulation):
    parameters, descent = make_descent(world, tmp_path, gradient_accumulation=accumulation, max_grad_norm=0.5)
    mine = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    reference = torch.optim.AdamW(mine, lr=0.1, weight_decay=1e-2)
    for _ in range(3):
        for _ in range(accumulation):
            add_gradients(descent, squares(parameters))
        descent.step(0.1)
        squares(mine).backward()
        torch.nn.utils.clip_grad_norm_(mine, 0.5)
        reference.step()
        reference.zero_grad()
    for a, b in zip(parameters, mine, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(world, tmp_path, optimizer, factor):
    parameters, descent = make_descent(world, tmp_path, optimizer=optimizer)

    def step(factor=1.0):
        add_gradients(descent, squares(parameters) * factor)
        descent.step(0.1)

    def everything():
        moments, numbers = checkpoint.moments_by_name(descent.factors, descent.optimizer)
        return [p.detach().clone() for p in parameters], {k: v.clone() for k, v in moments.items()}, numbers

    step()
    before = everything()
    step(factor)
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1]) and before[2] == after[2]
    read = descent.read()
    assert read["skipped"] == 1 and read["worst"] == 1
    step()
    assert not torch.equal(parameters[0], before[0][0])


def test_the_schedule_follows_optimiser_steps(world, tmp_path):
    train(make_run(world, tmp_path / "run", train={"schedule": "linear", "steps": 4, "gradient_accumulation": 2}))
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def poison(monkeypatch, steps):
    """Makes the loss of these steps NaN."""
    batches, loss_of, now = Objective.batches, Objective.loss_of, [0]

    def noted(self, step, micro):
        now[0] = step
        return batches(self, step, micro)

    monkeypatch.setattr(Objective, "batches", noted)
    monkeypatch.setattr(
        Objective, "loss_of", lambda self, shown: loss_of(self, shown) * (torch.nan if now[0] in steps else 1)
    )


def test_three_bad_steps_end_the_run_with_the_last_good_checkpoint(world, tmp_path, monkeypatch):
    poison(monkeypatch, range(2, 9))
    with pytest.raises(Diverged, match="3 steps in a row.*learning_rate below 0.01.*init_from: .*step-000004") as error:
        train(make_run(world, tmp_path / "run", train={"steps": 9}))
    assert newest_state(tmp_path / "run").step == 4  # a bad step leaves all as it was, so this one is good too
    good = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "adapter.safetensors")
    last = tmp_path / "run" / "checkpoints" / "step-000004" / "adapter.safetensors"
    assert same_factors(good, load_file(last)) and f"train.init_from: {last} lets" in str(error.value)
    monkeypatch.undo()
    advised = {"steps": 1, "learning_rate": 1e-9, "init_from": str(last)}
    begun = factors(train(make_run(world, tmp_path / "again", train=advised)).file.parent)
    assert max((begun[name] - good[name]).abs().max() for name in good) < 1e-6


def test_a_base_that_gives_nan_is_blamed_and_not_the_rate(world, tmp_path):
    """Every weight of it is a finite number, so that loading finds nothing; its answer is infinite."""
    shutil.copytree(world / "model", tmp_path / "model")
    file = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["conv_out.weight"].fill_(3e38)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Diverged, match="the base model model sha256.* gives NaN or infinity in float32. Take") as error:
        train(make_run(world, tmp_path / "run", model=str(tmp_path / "model")))
    assert "the learning rate is not the reason" in str(error.value) and "below" not in str(error.value)


def test_the_prediction_type_of_the_config_is_trained_and_kept(world_sd, tmp_path):
    """Said of a model whose own files say epsilon: the target, the file's description and its header follow."""
    said = {"adapter": {"a1": 1, "a2": 1}, "train": {"steps": 1}}
    first = train(make_run(world_sd, tmp_path / "epsilon", **said)).file
    other = train(make_run(world_sd, tmp_path / "v", prediction_type="v_prediction", **said)).file
    losses = [metrics(path.parent)[-1]["loss"] for path in (first, other)]
    assert losses[0] != losses[1]
    file = weights.read_adapter(other)
    assert file.info["prediction_type"] == "v_prediction" == file.said_prediction()
    assert file.metadata["modelspec.prediction_type"] == "v" and weights.read_adapter(first).said_prediction() is None
    # who renders with it at the same base, by its path, need not say it again; another base has its own
    model = str(world_sd / "model")
    assert base_model_of([Subject(file)], model) == {"model": model, "prediction_type": "v_prediction"}
    assert base_model_of([Subject(file)], "elsewhere/other") == {"model": "elsewhere/other"}
    assert json.loads(other.with_suffix(".json").read_text())["activation text"] == "sks dog"


def test_two_bad_steps_are_skipped_and_counted(world, tmp_path, monkeypatch):
    poison(monkeypatch, (2, 3))
    train(make_run(world, tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    assert lines[-1]["skipped"] == 2 and lines[2]["loss"] is None and lines[-1]["loss"] > 0


@pytest.mark.parametrize(("failures", "level"), [(1, "checkpointing"), (2, "nf4")])
def test_out_of_memory_goes_a_level_down_and_on(world, tmp_path, monkeypatch, failures, level):
    batches, failed = Objective.batches, []

    def short(self, step, micro):
        if step == 1 and len(failed) < failures:
            failed.append(step)
            raise torch.OutOfMemoryError
        return batches(self, step, micro)

    monkeypatch.setattr(Objective, "batches", short)
    train(make_run(world, tmp_path / "run"))
    assert newest_state(tmp_path / "run").about["level"] == level
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_out_of_memory_at_the_bottom_names_three_settings(world, tmp_path, monkeypatch):
    def short(self, step, micro):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Objective, "batches", short)
    with pytest.raises(RuntimeError, match="batch_size.*resolution.*nf4"):
        train(make_run(world, tmp_path / "run"))


def test_the_lowest_level_first_gives_up_what_is_kept_of_captions(world, tmp_path, monkeypatch):
    batches, kept = Objective.batches, []

    def short(self, step, micro):
        if step == 3 and self.kept.on:
            kept.append(self.kept.nbytes)
            raise torch.OutOfMemoryError
        return batches(self, step, micro)

    bottom = {"train": {"memory": "checkpointing"}}
    whole = factors(train(make_run(world, tmp_path / "a" / "run", **bottom)).file.parent)
    monkeypatch.setattr(Objective, "batches", short)
    told = Told()
    run = train(make_run(world, tmp_path / "b" / "run", **bottom), progress=told).file.parent
    assert len(kept) == 1 and kept[0] > 0 and same_factors(factors(run), whole)
    assert "out of memory with memory: checkpointing; continuing without keeping keys and values" in told.text


def test_a_failing_validation_or_report_never_ends_a_run(world, tmp_path, monkeypatch):
    straight = factors(train(make_run(world, tmp_path / "a" / "run")).file.parent)
    monkeypatch.setattr("diffusekrona_train.training.preview.render", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(Objective, "held_out_loss", lambda self, at_once: 1 / 0)
    monkeypatch.setattr("diffusekrona_train.training.page.write_run_report", lambda folder: 1 / 0)
    watched = make_run(world, tmp_path / "b" / "run", validation={"every": 2, "loss": True, "report": True})
    told = Told()
    assert same_factors(factors(train(watched, progress=told).file.parent), straight)
    said = told.text
    assert "after step 0: validation failed (ZeroDivisionError" in said
    for what in ("validation failed", "the held-out loss failed", "report.html was not written"):
        assert said.count(what) == 1, "the same failure is told once"


def test_validation_does_not_change_the_run_and_loads_no_text_encoder(world, tmp_path, monkeypatch):
    straight = factors(train(make_run(world, tmp_path / "a" / "run")).file.parent)
    config = make_run(world, tmp_path / "b" / "run", validation={"every": 3, "loss": True})
    train(config)  # fills the cache with the prompts
    monkeypatch.setattr("diffusekrona_train.models.source.ModelSource._load_text_encoders", lambda *_: 1 / 0)
    again = make_run(world, tmp_path / "c" / "run", validation={"every": 3, "loss": True})
    assert same_factors(factors(train(again).file.parent), straight)
    assert len(list((tmp_path / "c" / "run" / "samples").iterdir())) == 3


def test_a_folder_that_holds_a_run_is_refused(world, tmp_path):
    config = make_run(world, tmp_path / "run", train={"steps": 1})
    train(config)
    with pytest.raises(ValueError, match="--resume.*--overwrite"):
        train(config)
    with pytest.raises(ValueError, match="opposite"):
        train(config, resume=True, overwrite=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    longer = make_run(world, tmp_path / "run", train={"steps": 2, "learning_rate": 1e-3})
    train(longer, overwrite=True)
    assert (tmp_path / "run" / "notes.txt").exists() and newest_state(tmp_path / "run").step == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        train(make_run(world, tmp_path / "file"))


def test_two_runs_in_one_folder_are_refused(world, tmp_path):
    from diffusekrona_train.common.run_folder import claimed

    with claimed(tmp_path / "run"), pytest.raises(ValueError, match="another run .process [0-9]+"):
        train(make_run(world, tmp_path / "run"))


def test_a_mistake_before_the_first_step_leaves_the_old_run_alone(world, tmp_path):
    train(make_run(world, tmp_path / "run", train={"steps": 1}))
    before = factors(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError):
        train(make_run(world, tmp_path / "run", subject={"images": str(empty), "class": "dog"}), overwrite=True)
    assert same_factors(factors(tmp_path / "run"), before)
    with pytest.raises(ValueError, match="holds no image"):
        train(make_run(world, tmp_path / "new" / "run", subject={"images": str(empty), "class": "dog"}))
    assert not (tmp_path / "new").exists()


def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_last_state_goes_on(world, tmp_path, monkeypatch):
    straight = factors(train(make_run(world, tmp_path / "a" / "run")).file.parent)
    config = make_run(world, tmp_path / "b" / "run")
    monkeypatch.setenv("KRONA_FAULT", "state:4:full")
    with pytest.raises(RuntimeError, match="step 4.*No space left.*step-000002.*--resume"):
        train(config)
    assert same_factors(factors(train(config, resume=True).file.parent), straight)


def test_the_folder_removed_under_a_run_is_made_again(world, tmp_path, monkeypatch):
    import shutil

    batches = Objective.batches

    def remove(self, step, micro):
        if step == 3:
            shutil.rmtree(tmp_path / "run")
        return batches(self, step, micro)

    monkeypatch.setattr(Objective, "batches", remove)
    assert train(make_run(world, tmp_path / "run")).file.exists()


def test_fp16_on_a_cpu_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="mixed_precision: 'fp16' needs a GPU"):
        train(make_run(world, tmp_path / "run", train={"mixed_precision": "fp16"}))


def test_tensorboard_gets_the_metrics(world, tmp_path):
    train(make_run(world, tmp_path / "run", train={"steps": 2, "trackers": ["tensorboard"]}))
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents*"))


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(world, tmp_path, monkeypatch):
    import errno

    from accelerate import Accelerator

    def full(self, values, step=None, log_kwargs=None):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "log", full)
    told = Told()
    train(make_run(world, tmp_path / "run", train={"steps": 3, "trackers": ["tensorboard"]}), progress=told)
    assert told.text.count("a tracker failed (OSError: No space left on device)") == 1
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


# ---- small parts ---------------------------------------------------------------------------------------------------


FIGURES = family_named("sdxl").memory


def test_memory_levels_go_from_fast_to_small(world, tmp_path, monkeypatch):
    cuda, config = torch.device("cuda"), make_run(world, tmp_path / "x", data={"resolution": 1024})
    chosen = {}
    for gib in (80, 24, 12, 5):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gib=gib: (gib * memory.GIB, 80 * memory.GIB))
        chosen[gib] = memory.choose(config, 2_567_463_684, 1, torch.bfloat16, cuda, FIGURES)[0].name
    assert chosen == {80: "plain", 24: "plain", 12: "checkpointing", 5: "nf4"}
    named = make_run(world, tmp_path / "x", train={"memory": "checkpointing"})
    assert memory.choose(named, 1, 1, torch.float32, torch.device("cpu"), FIGURES)[0].checkpointing
    assert memory.below(memory.levels(named)[1], named, cuda) is None
    full = make_run(world, tmp_path / "x", adapter={"type": "full"})
    assert [level.name for level in memory.levels(full)] == ["plain", "checkpointing"]


def test_processes_agree_on_a_stop_by_the_averaged_wish():
    progress = Progress()
    stop = Stop(progress)
    assert not stop.agreed(torch.tensor(0.0), 2) and stop.agreed(torch.tensor(0.5), 2)
    assert not stop.agreed(torch.tensor(0.5), 1)
    progress.stop()
    assert stop.agreed(torch.tensor(0.0), 1) and stop.wanted()


def test_checkpointing_and_strength_leave_the_gradient_alone(world):
    """Gradient checkpointing changes when things are computed, not what."""
    source = open_model(str(world / "model"))
    gradients = []
    for checkpointing in (False, True):
        denoiser = source.load_denoiser(torch.float32)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        injection = inject(denoiser, AdapterConfig(a1=4, a2=4), seed=0)
        torch.manual_seed(0)
        conditioning = {
            "prompt_embeds": torch.randn(1, 7, 64),
            "pooled": torch.randn(1, 32),
            "size_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        }
        source.family.predict(
            denoiser, torch.randn(1, 4, 8, 8), torch.tensor([5]), conditioning
        ).square().mean().backward()
        gradients.append([parameter.grad for parameter in injection.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_photos_are_drawn_the_same_each_time(tmp_path):
    a, b = draw_photos(tmp_path / "a"), draw_photos(tmp_path / "b")
    assert [file.read_bytes() for file in sorted(a.iterdir())] == [file.read_bytes() for file in sorted(b.iterdir())]
