"""Evaluation on a tiny trained run: what is drawn, kept, chosen, compared and told, and mistakes as one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from diffusekrona_train import evaluation as evaluate
from diffusekrona_train.adapters.formats import load_adapter
from diffusekrona_train.cli.evaluate import app
from diffusekrona_train.common.progress import Progress
from diffusekrona_train.evaluation.adapters import KEPT_CLIP_T, MOST_DRIFT, choose
from diffusekrona_train.evaluation.inputs import Generated, read_generated, without_words
from diffusekrona_train.evaluation.measure import Judges, measure
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling import session as studio
from diffusekrona_train.sampling.render import render
from diffusekrona_train.training import train
from diffusekrona_train.training.page import write_run_report
from scripts.train_suite import command_for, config_of
from tests.runs import make_run, make_world


def a_plan(said: list[str] | None = None, share: tuple[int, int] = (0, 1)) -> evaluate.Plan:
    """A plan whose messages are appended to `said`."""
    progress = Progress(
        lambda event, fields: said.append(fields["text"]) if said is not None and event == "message" else 0
    )
    return evaluate.Plan(seeds=(0, 1), clip="toybox", dino="toybox", progress=progress, share=share)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two runs of a tiny SDXL: runs/dog (KronA, checkpoints at 2 and 4) and runs/lora (LoRA)."""
    root = make_world(tmp_path_factory.mktemp("world"))
    shown = {"prompts": ["A [V] dog on the beach", "A [V] {class}"], "every": 0, "steps": 2, "loss": False}
    for name, adapter in {"dog": {}, "lora": {"type": "lora", "rank": 2}}.items():
        config = make_run(root, root / "runs" / name, adapter=adapter, train={"steps": 4}, validation=shown)
        train(config)
    return root


@pytest.fixture
def plan():
    said: list[str] = []
    made = a_plan(said)
    made.said = said  # type: ignore[attr-defined]
    return made


@pytest.fixture(scope="module")
def measured(world):
    """The run's best checkpoint, measured once."""
    said: list[str] = []
    run = shutil.copytree(world / "runs" / "dog", world / "measured" / "dog")
    return run, evaluate.best_checkpoint(run, a_plan(said)), said


def run_app(capsys, *words) -> tuple[int, str, str]:
    status = 0
    try:
        app([str(word) for word in words], standalone_mode=False)
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    told = capsys.readouterr()
    return status, told.out, told.err


# ---- best ----------------------------------------------------------------------------------------------------------


def test_best_measures_every_checkpoint_and_the_page_shows_it(measured):
    run, best, _ = measured
    assert [row["step"] for row in best["checkpoints"]] == [2, 4]
    assert best["chosen_step"] in (2, 4) and (run / best["adapter"]).is_file()
    assert json.loads((run / "evaluation" / "best.json").read_text()) == best
    assert f"Chosen: step {best['chosen_step']}." in write_run_report(run).read_text()
    assert set(best["checkpoints"][0]["scores"]) == {"clip_i", "clip_t", "dino", "class_drift", "copy"}
    assert all(row["scores"]["dino"]["n"] == 4 for row in best["checkpoints"])
    assert str(run.parent) not in json.dumps(best)


def test_best_draws_nothing_twice(measured, plan):
    run, best, said = measured
    assert said, "the first time pictures were drawn"
    assert evaluate.best_checkpoint(run, plan) == best
    assert plan.said == []


def test_the_pictures_are_those_of_the_one_sampling_path(measured):
    """An adapter that was put in after others draws what it draws alone."""
    run, best, _ = measured
    rows = [json.loads(line) for line in (run / "evaluation" / "pictures" / "manifest.jsonl").read_text().splitlines()]
    file = run / "checkpoints" / "step-000004" / "adapter.safetensors"
    sha = studio.sha256(file)[:16]
    row = next(r for r in rows if r["adapters"] and r["adapters"][0]["sha256"] == sha and "beach" in r["prompt"])
    config = evaluate.best.load_config(run / "config.yaml")
    source = open_model(config.model)
    parts = source.load()
    pipe = source.family.pipeline(parts)
    load_adapter(pipe, file).fuse()
    settings = studio.SampleSettings(row["steps"], row["guidance"], height=row["height"], width=row["width"])
    [alone] = render(pipe, source.family, [(row["prompt"], row["seed"])], settings)
    kept = Image.open(run / "evaluation" / "pictures" / row["file"])
    assert np.array_equal(np.asarray(alone), np.asarray(kept))


def test_the_scores_are_those_of_the_pictures(measured, world):
    run, best, _ = measured
    folder = run / "evaluation" / "pictures"
    sha = studio.sha256(run / "checkpoints" / "step-000002" / "adapter.safetensors")[:16]
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["adapters"] and row["adapters"][0]["sha256"] == sha and "sks" in row["prompt"]]
    generated = [Generated(folder / row["file"], row["prompt"], row["seed"]) for row in own]
    judges = Judges.open("toybox", "toybox", toybox=False, device="cpu", cache=None)
    again = measure(judges, evaluate.photos_of(str(world / "photos")), generated, identifiers=["sks"]).scores
    told = best["checkpoints"][0]["scores"]
    for name in ("clip_i", "clip_t", "dino", "copy"):
        assert told[name]["value"] == pytest.approx(again[name]["value"], abs=1e-6)


def scored(dino: float, clip_t: float, drift: float) -> dict:
    return {"dino": {"value": dino}, "clip_t": {"value": clip_t}, "class_drift": {"value": drift}}


def test_the_rule_takes_the_highest_dino_that_follows_and_has_not_drifted():
    base = {"clip_t": {"value": 0.3}}
    rows = [scored(0.5, 0.3, 0.1), scored(0.6, 0.28, 0.3), scored(0.9, 0.2, 0.3), scored(0.8, 0.3, 0.9)]
    assert choose(rows, base) == 1
    assert choose([rows[2], rows[3]], base) == 1, "where none is allowed: the highest product"
    assert f"{KEPT_CLIP_T:.0%}" in evaluate.RULE and str(MOST_DRIFT) in evaluate.RULE


# ---- compare -------------------------------------------------------------------------------------------------------


def test_compare_tells_all_metrics_parameters_size_and_differences(world, plan, tmp_path, capsys):
    files = [studio.find_adapter(world / "runs" / name) for name in ("lora", "dog")]
    result = evaluate.compare(files, None, plan, tmp_path / "out", settings={"steps": 2})
    assert result is not None
    values = [row["scores"]["dino"]["value"] for row in result["rows"]]
    assert values == sorted(values, reverse=True) and sum(row["best"] for row in result["rows"]) == 1
    assert {row["name"] for row in result["rows"]} == {"dog", "lora"}
    best, other = sorted(result["rows"], key=lambda row: not row["best"])
    gap = other["best_minus_this"]["dino"]
    assert gap["value"] == pytest.approx(best["scores"]["dino"]["value"] - other["scores"]["dino"]["value"])
    assert gap["larger_than_chance"] == (gap["low"] > 0 or gap["high"] < 0)
    counts = {row["name"]: int(row["parameters"].replace(",", "")) for row in result["rows"]}
    file = studio.read_adapter(files[0])
    assert counts["lora"] == sum(layer.in_features * 2 + layer.out_features * 2 for layer in file.layers), (
        "rank 2 on each layer"
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Is it a difference?" in page and "By seed" in page and "parameters" in page

    status, out, _ = run_app(
        capsys, "compare", world / "runs" / "dog", world / "runs" / "lora", "--num-images", 2, "--steps", 2,
        "--clip", "toybox", "--dino", "toybox", "--output", tmp_path / "out", "--sort", "clip_t",
    )  # fmt: skip
    assert status == 0 and "drawing" not in out and "* " in out and "base model" in out


def test_adapters_are_compared_on_a_quantised_base(world, tmp_path, capsys):
    status, out, error = run_app(
        capsys, "compare", world / "runs" / "dog", "--num-images", 1, "--steps", 1, "--quantize", "nf4", "--vae-tiling",
        "--clip", "toybox", "--dino", "toybox", "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 0 and "generating" in out, error
    about = (tmp_path / "out" / "pictures" / "manifest.jsonl").read_text()
    assert {json.loads(line)["quantize"] for line in about.splitlines()} == {"nf4"}
    status, _, error = run_app(capsys, "compare", world / "runs" / "dog", "--quantize", "nf3")
    assert status == 2 and "--quantize 'nf3': there are none, nf4, int8" in error


def test_shares_of_two_processes_are_one(world, plan, tmp_path):
    files = [studio.find_adapter(world / "runs" / "dog")]
    alone = evaluate.compare(files, None, plan, tmp_path / "one", settings={"steps": 2})
    second = a_plan(share=(1, 2))
    assert evaluate.compare(files, None, second, tmp_path / "two", settings={"steps": 2}) is None
    drawn = len(list((tmp_path / "two" / "pictures").glob("*.png")))
    assert 0 < drawn < len(list((tmp_path / "one" / "pictures").glob("*.png")))
    first = a_plan(share=(0, 2))
    assert evaluate.compare(files, None, first, tmp_path / "two", settings={"steps": 2}) == alone


def test_prompts_that_are_not_read_are_told_by_krona_eval(world, foreign, tmp_path, capsys):
    """By what draws (`compare`), and by what only judges (`images`)."""
    long = "a [V] dog, " + "sitting, standing, looking, " * 20 + "on the beach"
    words = ["--prompt", long, "--prompt", "a ([V] dog:1.4)", "--clip", "toybox", "--dino", "toybox"]
    few = ["--steps", 1, "--num-images", 1, "--output", tmp_path / "out"]
    status, out, err = run_app(capsys, "compare", world / "runs" / "dog", *few, *words)
    assert status == 0, err
    assert "on the beach' is not read" in err and "'(sks dog:1.4)' means something to other programs" in err
    status, out, err = run_app(capsys, "images", foreign, "--photos", world / "photos", *words)
    assert status == 0, err
    assert "on the beach' is not read" in err and "the text encoder reads 22" in err


# ---- images and suites ---------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path, world):
    """A folder of pictures as another tool leaves them: copies of the photos, numbered by prompt."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for i, photo in enumerate(sorted((world / "photos").glob("*.png"))):
        shutil.copy(photo, folder / f"{i % 2:02d}-{i}.png")
    return folder


def test_images_of_another_tool(foreign, world, capsys):
    prompts = ["--prompt", "a sks dog", "--prompt", "a sks dog in the snow"]
    encoders = ["--clip", "toybox", "--dino", "toybox"]
    words = ["images", foreign, "--photos", world / "photos", "--token", "sks", *prompts, *encoders]
    status, out, err = run_app(capsys, *words)
    assert status == 0, err
    scores = json.loads((foreign / "evaluation" / "scores.json").read_text())
    assert scores["scores"]["copy"]["value"] == pytest.approx(1, abs=1e-5), "they are copies"
    assert "left out (sks)" in str(scores["settings"]) and "class_drift" not in scores["scores"]
    kept = run_app(capsys, *words, "--keep-identifier", "--output", foreign / "kept")
    with_token = json.loads((foreign / "kept" / "scores.json").read_text())
    assert kept[0] == 0 and with_token["scores"]["clip_t"] != scores["scores"]["clip_t"]
    assert with_token["scores"]["dino"] == scores["scores"]["dino"]


def test_where_a_pictures_prompt_comes_from(foreign):
    (foreign / "00-0.txt").write_text("a dog beside\n")
    (foreign / "manifest.jsonl").write_text('{"file": "01-1.png", "prompt": "from the manifest", "seed": 9}\n{"cut')
    found = {one.file.name: (one.prompt, one.seed) for one in read_generated(foreign, ["zero", "one"])}
    assert found == {"00-0.png": ("a dog beside", 0), "00-2.png": ("zero", 2), "01-1.png": ("from the manifest", 9)}


def test_identifiers_are_left_out_as_words():
    assert without_words("A sks dog on sksy sks", ["sks"]) == "A dog on sksy"
    assert without_words("A [V] dog and [V2] cat, s+k", ["s+k"]) == "A dog and cat,"
    assert without_words("a dog", []) == "a dog"


@pytest.fixture
def suite_file(tmp_path, world):
    rows = [
        {"name": "dog", "group": "live", "class": "dog", "images": str(world / "photos"), "prompts": "two"},
        {
            "name": "lora",
            "group": "object",
            "class": "dog",
            "images": str(world / "photos"),
            "prompts": ["a [V] {class}"],
        },
        {"name": "absent", "class": "cat", "images": str(world / "photos"), "prompts": "two"},
    ]
    path = tmp_path / "suite.yaml"
    prompts = {"two": ["a [V] {class} on the beach", "a [V] {class}"]}
    path.write_text(yaml.safe_dump({"name": "mine", "prompts": prompts, "rows": rows}))
    return path


def test_a_suite_by_subject_and_group_alone_and_in_shares(suite_file, world, tmp_path, plan):
    suite, runs = evaluate.load_suite(str(suite_file)), world / "runs"
    photos = Path("/")  # the rows name whole paths
    alone = evaluate.evaluate_suite(suite, plan, tmp_path / "one", runs=runs, photos=photos)
    assert alone is not None and alone["missing"] == ["absent"]
    assert set(alone["groups"]) == {"live", "object"} and alone["all"]["dino"]["n"] == 4 + 2
    subjects = [alone["subjects"][name]["scores"]["dino"] for name in ("dog", "lora")]
    assert alone["all"]["dino"]["value"] == pytest.approx(sum(s["value"] * s["n"] for s in subjects) / 6)
    shares = [a_plan(share=(rank, 2)) for rank in (1, 0)]
    results = [evaluate.evaluate_suite(suite, p, tmp_path / "two", runs=runs, photos=photos) for p in shares]
    assert results == [None, alone]
    assert "absent" in (tmp_path / "two" / "report.html").read_text()


def test_a_suite_of_other_methods_pictures(suite_file, foreign, tmp_path, capsys):
    pictures = tmp_path / "methods"
    shutil.copytree(foreign, pictures / "dog")
    status, out, err = run_app(
        capsys, "suite", suite_file, "--generated", pictures, "--photos", "/", "--clip", "toybox", "--dino", "toybox"
    )
    assert status == 0, err
    assert "not there: lora, absent" in out and "group live" in out


def test_bundled_suites_are_those_of_the_paper_and_of_toybox():
    dreambench, toybox = evaluate.load_suite("dreambench"), evaluate.load_suite("toybox")
    assert len(dreambench.rows) == 30 and {len(texts) for texts in dreambench.prompts.values()} == {25}
    live = {row.name for row in dreambench.rows if row.group == "live"}
    assert live == {"cat", "cat2", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"}
    assert "a sks dog wearing a santa hat" in dreambench.prompts_of(next(r for r in dreambench.rows if r.name == "dog"))
    assert "github.com/google/dreambooth" in dreambench.source
    assert len(toybox.rows) == 12
    for row in toybox.rows:
        assert len(evaluate.photos_of(toybox.images_of(row, None))) >= 3


def test_train_suite_makes_a_config_a_row_and_goes_on_where_it_was(suite_file, tmp_path, world):
    suite = evaluate.load_suite(str(suite_file))
    base = {
        "model": "toybox",
        "subject": {"images": "x", "class": "y", "prompt": "photo of [V]"},
        "train": {"steps": 9},
    }
    config = yaml.safe_load(config_of(suite, suite.rows[0], base, tmp_path / "runs", Path("/"), ["train.seed=3"]))
    assert config["subject"]["class"] == "dog" and config["subject"]["prompt"] == "photo of [V]"
    assert config["train"]["steps"] == 9 and config["train"]["seed"] == 3
    assert config["output"] == str(tmp_path / "runs" / "dog")
    assert command_for(world / "runs" / "dog", Path("c")) is None
    assert (command_for(tmp_path / "new", Path("c")) or [])[-2:] == ["--config", "c"]
    (tmp_path / "half" / "resume" / "step-000002").mkdir(parents=True)
    assert (command_for(tmp_path / "half", Path("c")) or [""])[-1] == "--overwrite"
    (tmp_path / "half" / "resume" / "step-000002" / "state.safetensors").touch()
    assert (command_for(tmp_path / "half", Path("c")) or [""])[-1] == "--resume"


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["images", "nowhere", "--photos", "{photos}"], "nowhere is not a folder"),
        (["images", "{photos}"], "--photos is missing"),
        (["images", "{photos}", "--photos", "{photos}", "--clip", "toybox"], "its prompt is not known"),
        (["images", "{photos}", "--prompt", "a dog", "--photos", "toybox:podle"], "did you mean toybox:poodle"),
        (["suite", "dreambnch", "--runs", "{runs}"], "bundled are dreambench, toybox"),
        (["suite", "dreambench", "--runs", "{runs}"], "give the folder that holds dog/ with --photos"),
        (["suite", "toybox"], "give either --runs"),
        (["suite", "toybox", "--runs", "{runs}"], "none of the suite's folders"),
        (["compare", "{runs}/dog", "--sort", "dinosaur"], "use one of clip_i, clip_t, dino"),
        (["compare", "{runs}/dag"], "no such run folder"),
        (["best", "{runs}"], "no config.yaml"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words, expected, world, capsys):
    paths = {"photos": str(world / "photos"), "runs": str(world / "runs")}
    status, _, err = run_app(capsys, *(word.format(**paths) for word in words))
    assert status == 2
    assert re.search(re.escape(expected), err), err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows": []}, "rows"),
        ({"nmae": "x"}, "nmae"),
        ({"rows": [{"name": "../up", "class": "dog", "prompts": ["a"]}]}, "name"),
        ({"rows": [{"name": "a", "class": "dog", "prompts": "lost"}]}, "asks for prompts 'lost'"),
        ({"rows": [{"name": "a", "class": "dog", "prompts": ["a"]}] * 2}, "duplicate name a"),
    ],
)
def test_a_wrong_suite_is_one_line(change, expected, tmp_path):
    tree = {"name": "mine", "rows": [{"name": "a", "class": "dog", "prompts": ["a"]}], **change}
    (tmp_path / "s.yaml").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=expected) as caught:
        evaluate.load_suite(str(tmp_path / "s.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: x\nrows: [{name: a, class: dog}]\nsteps: 3\n",
            "steps is not a known key; known are name, source, prompts, rows",
        ),
        ("name: x\nrows: [{name: a, clas: dog}]\n", "rows.0.clas is not a known key; did you mean class"),
        ("name: x\nrows: [{name: a}]\n", "rows[0].class is missing: What the subject is."),
        ("", "is empty; a suite needs at least name and rows"),
    ],
)
def test_mistakes_in_a_suite_are_told_in_its_own_words(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        evaluate.load_suite(str(tmp_path / "mine.yaml"))
    assert "train" not in str(error.value) and "subject (" not in str(error.value)
