"""scripts/paper.py: studies from YAML, shared runs, records that are never made twice, tables against numpy."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from scripts import paper
from scripts.studies import conduct, records, tables, work
from scripts.studies.plan import Planner, order, unfinished
from scripts.studies.study import MODELS, Series, Study, Value, known_studies, load_base, load_studies
from scripts.studies.tables import rows_of
from scripts.studies.work import Cell, Task

ROOT = Path(__file__).resolve().parents[1]
WANTED = """baselines factors guidance images inference-steps init learning-rate lokr-factors modules steps suite"""


def planner_for(model: str, runs: Path, base=None, **more) -> Planner:
    return Planner(model, base or load_base(model), runs, **{"seeds": 1, **more})


# ---- studies -------------------------------------------------------------------------------------------------------


def test_all_studies_of_the_paper_are_there():
    assert known_studies() == WANTED.split()
    assert all(study.values_for(model) for study in load_studies(["all"]).values() for model in MODELS)


@pytest.fixture
def photos(tmp_path):
    """A folder of photos for the subjects of DreamBench that the bases of SDXL and SD 1.5 name."""
    for name in load_base("sdxl").subjects:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), (40 * i, 90, 120)).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_toybox_flow_takes_the_values_and_the_judges_of_toybox(tmp_path):
    for study in load_studies(["all", "confirm"]).values():
        assert study.values_for("toybox-flow") == study.values_for("toybox")
        assert [each.fields_for("toybox-flow") for each in study.series] == [
            each.fields_for("toybox") for each in study.series
        ]
    planner = planner_for("toybox-flow", tmp_path)
    assert planner.encoders == {"CLIP": "toybox", "DINO": "toybox"} and work.stays("toybox-flow")
    assert re.fullmatch("toybox-flow sha256:[0-9a-f]{64} vae sha256:[0-9a-f]{16}", planner.mark)
    own = Study.model_validate(
        {
            **{"title": "a", "paper": "b", "axis": "c", "series": [{"models": {"toybox-flow": {"train.seed": 1}}}]},
            "values": {"toybox": [{"label": "x"}], "toybox-flow": [{"label": "y"}], "default": [{"label": "z"}]},
        }
    )
    labels = {model: own.values_for(model)[0].label for model in MODELS}
    assert labels == {"toybox": "x", "toybox-flow": "y", "sdxl": "z", "sd15": "z"}
    assert [own.series[0].fields_for(model) for model in ("toybox", "toybox-flow")] == [{}, {"train.seed": 1}]


@pytest.mark.parametrize("model", MODELS)
def test_every_study_expands_to_valid_configs(model, photos, tmp_path):
    planner = planner_for(model, tmp_path, subjects=load_base(model).subjects[:1], photos=photos)
    for name, study in load_studies(["all"]).items():
        cells = planner.expand(name, study, model)
        assert len({cell.key for cell in cells}) > 1 or name == "suite"
        assert all((cell.seed, cell.subject) == (0, planner.asked[0]) for cell in cells)
    trained = [task for task in planner.tasks.values() if task.steps]
    assert len(planner.tasks) - len(trained) == 1, "one base model without an adapter"
    assert all(task.config["validation"]["every"] == 0 for task in trained)


def test_studies_share_their_runs(tmp_path):
    planner, base = planner_for("toybox", tmp_path), load_base("toybox")
    for name, study in load_studies(["steps", "guidance", "inference-steps", "factors"]).items():
        planner.expand(name, study, "toybox")
    tasks = [task for task in planner.tasks.values() if task.subject == "poodle" and task.steps]
    shared = max(tasks, key=lambda task: len(task.needs))
    assert len(tasks) == 6, "the base's run, which all four share, and five other factors"
    assert shared.studies == {"steps", "guidance", "inference-steps", "factors"}
    assert shared.steps == [25, 50, 100, 200] and base.config["train"]["steps"] in shared.steps
    assert len(shared.needs) == 4 + 4 + 5, "base's own settings are counted once"


def test_a_run_is_named_by_what_determines_it(tmp_path):
    def run(**more) -> str:
        planner = planner_for("toybox", tmp_path / "other", subjects=["poodle"], **more)
        planner.expand("suite", load_studies(["suite"])["suite"], "toybox")
        return next(iter(planner.tasks.values())).run

    first = run()
    assert first == run(sets=["train.steps=7"]) == run(sets=["train.log_every=3", "data.cache_dir=elsewhere"])
    others = [run(sets=[text]) for text in ("train.steps=7", "train.learning_rate=1e-3", "subject.limit=2")]
    assert first == others[0] and len({first, *others}) == 3
    assert run(sets=["train.schedule=cosine"]) != run(sets=["train.schedule=cosine", "train.steps=7"])


def test_whole_seeds_come_first_and_shared_runs_before_others(tmp_path):
    planner = planner_for("toybox", tmp_path, seeds=2)
    for name, study in load_studies(["init", "factors"]).items():
        planner.expand(name, study, "toybox")
    tasks = order(list(planner.tasks.values()))
    assert [task.seed for task in tasks] == sorted(task.seed for task in tasks)
    first = [len(task.studies) for task in tasks if task.seed == 0 and task.steps]
    assert first == sorted(first, reverse=True) and first[:5] == [2, 2, 2, 2, 1]


PICTURE = str(ROOT / "docs" / "images" / "toybox-flow.png")
MISTAKES = {
    "an unknown study": (["initt"], "study 'initt' is not known; there are baselines, "),
    "an unknown model": (["init", "--model", "sd9"], "--model 'sd9' is not known; there are toybox, toybox-flow, sdxl"),
    "an unknown subject": (["init", "--subjects", "unicorn"], "--subjects unicorn: suite toybox has poodle, "),
    "no photos": (["init", "--model", "sd15"], "give the folder that holds dog/ with --photos"),
    "a wrong override": (["init", "--set", "train.stepz=3"], "train.stepz is not a known key"),
    "a model by --set": (["init", "--set", "model=sdxl"], "--set model: the base and its suite say that"),
    "other photos by --set": (["init", "--set", "subject.images=x"], "--set subject.images: the base and its suite"),
    "records that are not there": (["init", "--import-records", "nowhere.jsonl"], "--import-records nowhere.jsonl: No"),
    "records that are no text": (["init", "--import-records", PICTURE], "flow.png: is damaged, or not of the"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path, capsys):
    given, told = MISTAKES[name]
    assert paper.main([*given, "--seeds", "1", "--runs", str(tmp_path / "runs")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and told in printed.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["--runs", "--export"])
def test_a_file_in_the_place_of_a_folder_is_one_line(option, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = ["init", "--runs", str(tmp_path / "runs"), option, str(tmp_path / "file")]
    assert paper.main(given) == 2
    assert capsys.readouterr().err == f"error: {option} {tmp_path / 'file'}: is a file; give a folder\n"


def test_an_export_keeps_other_studies_records(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    records.write_lines(path, [{"key": "b", "scores": 1}, {"key": "a", "scores": 1}])
    records.write_lines(path, [{"key": "c", "scores": 2}, {"key": "a", "scores": 2}])
    assert path.read_bytes()[4:8] == bytes(4)  # no time in it (RFC 1952): equal records are equal files
    kept = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert [(one["key"], one["scores"]) for one in kept] == [("a", 2), ("b", 1), ("c", 2)]
    for content in (b"no record\n", path.read_bytes()[:-9], gzip.compress(b"no record\n")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no file of records"):
            records.write_lines(path, [])
        assert path.read_bytes() == content
    assert paper.main(["init", "--runs", str(tmp_path / "runs"), "--export", str(tmp_path)]) == 2
    assert sorted(tmp_path.iterdir()) == [path], "refused before anything is done"


def test_captions_are_part_of_what_a_run_is_named_by(photos, tmp_path):
    def key() -> str:
        planner = planner_for("sdxl", tmp_path, subjects=["dog"], photos=photos)
        return planner.expand("suite", load_studies(["suite"])["suite"], "sdxl")[0].key

    before = key()
    (photos / "dog" / "0.txt").write_text("a dog that sits")
    assert key() != before
    (photos / "dog" / "0.txt").unlink()
    assert key() == before


def test_a_study_of_ones_own_with_a_mistake_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: a\npaper: b\naxis: c\nvalues: {toybox: [{label: x, sets: {}}]}\n")
    with pytest.raises(ValueError, match="mine.yaml: values.toybox.*sets"):
        load_studies([str(tmp_path / "mine.yaml")])


def test_a_key_that_no_study_has_is_told_with_the_keys_of_a_study(tmp_path):
    (tmp_path / "mine.yaml").write_text("title: a\npaper: b\naxis: c\nvalue: {toybox: [{label: x}]}\n")
    with pytest.raises(ValueError) as refused:
        load_studies([str(tmp_path / "mine.yaml")])
    assert "did you mean values?" in str(refused.value) and "vae" not in str(refused.value)


def test_a_value_that_no_run_can_have_is_told_with_its_study(tmp_path, capsys):
    own = tmp_path / "mine.yaml"
    own.write_text("title: a\npaper: b\naxis: c\nvalues: {toybox: [{label: deep, set: {adapter.a1: -4}}]}\n")
    assert paper.main([str(own), "--seeds", "1", "--runs", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert "study mine, value 'deep': adapter.a1" in told and told.count("\n") == 1


# ---- a small study, really trained ---------------------------------------------------------------------------------

STUDY = {
    "title": "Rates and steps",
    "paper": "none",
    "axis": "rate",
    "series": [{"label": "KronA"}],
    "spread_of_series": True,
    "values": {
        "default": [
            {"label": "one step", "x": 1, "set": {"train.steps": 1}},
            {"label": "two steps", "x": 2, "set": {"train.steps": 2}},
            {"label": "guided", "x": 3, "set": {"train.steps": 2}, "sample": {"guidance": 2}},
            {"label": "bare", "x": 0, "untrained": True},
        ]
    },
}


def here(tasks, runs, workers):
    """Runs tasks in this process."""
    for task in tasks:
        yield task, conduct.attempt(task, runs)[0]


def write_world(folder: Path, model: str = "toybox") -> list[str]:
    """Arguments of a call that trains one run of two steps and measures four times, one prompt in one sampling step."""
    base = load_base(model).model_dump(mode="json")
    base |= {
        "subjects": ["poodle"],
        "prompts": base["prompts"][:1],
        "pictures": 1,
        "sampling": {"steps": 1, "guidance": 0},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "small.yaml").write_text(yaml.safe_dump(STUDY))
    return [str(folder / "small.yaml"), "--base", str(folder / "base.yaml"), "--seeds", "1", "--workers", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(arguments, runs) of a small study that was measured, but for one value that failed at first."""
    folder = tmp_path_factory.mktemp("paper")
    call = write_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conduct.RUNNERS, "local", here)
        assert paper.main([*call, "--runs", str(folder / "runs"), "--export", str(folder / "export")]) == 0
    return call, folder / "runs", folder / "export"


def test_a_study_runs_on_the_flow_model(tmp_path, monkeypatch):
    """Trained and generated by toybox-flow, measured by toybox's judges."""
    call = [*write_world(tmp_path, "toybox-flow"), "--model", "toybox-flow", "--runs", str(tmp_path / "runs")]
    monkeypatch.setitem(conduct.RUNNERS, "local", here)
    assert paper.main(call) == 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "records").iterdir()]
    assert {record["parameters"] for record in found} == {0, 74_240}
    assert all(record["of"]["run"]["model"].startswith("toybox-flow sha256:") for record in found)
    assert all(record["measured_with"]["DINO"].startswith("toybox identity ") for record in found)


def forbid(tasks, runs, workers):
    raise AssertionError("nothing is left to do")


def test_a_finished_study_is_not_computed_again(world, monkeypatch, capsys):
    call, runs, _ = world
    before = (runs / "small" / "toybox" / "table.csv").read_bytes()
    monkeypatch.setitem(conduct.RUNNERS, "local", forbid)
    assert paper.main([*call, "--runs", str(runs)]) == 0
    assert "everything is measured" in capsys.readouterr().out
    assert (runs / "small" / "toybox" / "table.csv").read_bytes() == before


def test_one_training_serves_all_values(world):
    _, runs, _ = world
    (run,) = (runs / "trained").glob("*")
    assert sorted(path.parent.name for path in run.glob("checkpoints/*/*.safetensors")) == [
        "step-000001",
        "step-000002",
    ]
    assert not (run / "resume").exists(), "state that nobody needs any more"
    assert not (run / "report.html").exists(), "a page of no picture, for every one of hundreds of runs"
    found = [json.loads(path.read_text()) for path in (runs / "records").glob("*.json")]
    assert sorted(record["of"]["step"] for record in found) == [0, 1, 2, 2]
    assert {record["run"] for record in found} == {run.name, "base"}
    assert sorted({record["parameters"] for record in found})[0] == 0
    assert len({tuple(record["scores"].values()) for record in found}) == 4, "each was measured with its own adapter"


def test_a_study_leaves_table_sheet_and_plot(world):
    _, runs, _ = world
    text = (runs / "small" / "toybox" / "table.md").read_text()
    assert "| KronA, one step |" in text and "## Spread over the values" in text and "missing" not in text
    for name in ("sheet.png", "plot.png"):
        with Image.open(runs / "small" / "toybox" / name) as picture:
            assert min(picture.size) > 100
    lines = list(csv.DictReader((runs / "small" / "toybox" / "table.csv").open()))
    assert [line["label"] for line in lines] == [f"KronA, {value['label']}" for value in STUDY["values"]["default"]]


def test_records_of_another_machine_give_the_same_tables(world, tmp_path, monkeypatch):
    call, runs, export = world
    monkeypatch.setitem(conduct.RUNNERS, "local", forbid)
    source = ["--import-records", str(export / "records.jsonl.gz")]
    assert paper.main([*call, "--runs", str(tmp_path / "runs"), *source]) == 0
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "runs" / "small" / "toybox" / name).read_bytes() == (
            runs / "small" / "toybox" / name
        ).read_bytes()


TAMPERED = {
    "other weights": (lambda record: record["of"]["run"].update(model="toybox sha256:0"), "other weights"),
    "another step": (lambda record: record["of"].update(step=99), "does not fit its key"),
    "no scores": (lambda record: record.update(scores={}), "is no record"),
    "a path for a key": (lambda record: record.update(key="../../evil"), "does not fit its key"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_records_of_other_weights_or_changed_ones_are_refused(name, world, tmp_path, capsys):
    call, _, export = world
    change, told = TAMPERED[name]
    record = records.lines_of(export / "records.jsonl.gz")[0][1]
    change(record)
    if name == "other weights":
        record["key"] = records.key_of(record["of"])
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    source = ["--import-records", str(tmp_path / "records.jsonl")]
    assert paper.main([*call, "--runs", str(tmp_path / "runs"), *source]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs" / "records").exists()


def test_an_interrupted_study_goes_on(world, tmp_path, monkeypatch):
    """A record and the last checkpoint are gone, a resume state is there: training goes on from it."""
    call, runs, _ = world
    again = tmp_path / "runs"
    shutil.copytree(runs / "cache", again / "cache")

    def stopped(tasks, place, workers):
        """The run as a signal leaves it after its first step, before its states are cleared away."""
        task = next(task for task in tasks if task.steps)
        task.needs = {key: need for key, need in task.needs.items() if need["step"] == 1}
        patch.setattr("scripts.studies.work.claimed", interrupt)
        conduct.attempt(task, place)
        yield task, None

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(conduct.RUNNERS, "local", stopped)
        assert paper.main([*call, "--runs", str(again)]) == 130
    (run,) = (again / "trained").glob("*")
    assert (run / "resume" / "step-000001").is_dir() and not (again / "records").exists()
    monkeypatch.setitem(conduct.RUNNERS, "local", here)
    assert paper.main([*call, "--runs", str(again)]) == 0
    assert "resuming after step 1 of 2" in (run / "log.txt").read_text()
    ours, theirs = (scores_of(place) for place in (again, runs))
    assert ours == theirs


def scores_of(runs: Path) -> dict:
    return {path.stem: json.loads(path.read_text())["scores"] for path in (runs / "records").glob("*.json")}


def test_a_run_that_diverges_is_a_result(world, tmp_path, monkeypatch):
    call, *_ = world
    monkeypatch.setitem(conduct.RUNNERS, "local", here)
    module = importlib.import_module("diffusekrona_train.training")

    def diverge(config, **_):
        raise module.Diverged("not finite")

    monkeypatch.setattr(module, "train", diverge)
    assert paper.main([*call, "--runs", str(tmp_path)]) == 0
    text = (tmp_path / "small" / "toybox" / "table.md").read_text()
    assert text.count("| 0, 1 diverged |") == 3 and "missing" not in text
    monkeypatch.setitem(conduct.RUNNERS, "local", forbid)
    assert paper.main([*call, "--runs", str(tmp_path)]) == 0, "it is not tried again"


def test_a_state_that_cannot_go_on_is_left_behind(monkeypatch):
    asked = []

    def refuse_to_resume(config, resume=False, overwrite=False, **_):
        asked.append((resume, overwrite))
        if resume:
            raise ValueError("cannot resume: changed subject.images")

    monkeypatch.setattr(importlib.import_module("diffusekrona_train.training"), "train", refuse_to_resume)
    assert work._train(None, True) is False
    assert asked == [(True, False), (False, True)]


def test_an_adapter_that_is_missing_for_another_reason_is_no_divergence(world, tmp_path, monkeypatch, capsys):
    call, *_ = world
    monkeypatch.setitem(conduct.RUNNERS, "local", here)
    monkeypatch.setattr(importlib.import_module("diffusekrona_train.training"), "train", lambda *_, **__: None)
    assert paper.main([*call, "--runs", str(tmp_path)]) == 1
    assert "failed: poodle, seed 0" in capsys.readouterr().err
    assert "diverged" not in (tmp_path / "small" / "toybox" / "table.md").read_text()


def test_a_task_that_fails_costs_only_itself(world, tmp_path, monkeypatch, capsys):
    call, runs, _ = world
    shutil.copytree(runs / "cache", tmp_path / "runs" / "cache")
    shutil.copytree(runs / "records", tmp_path / "runs" / "records")
    lost = next(
        path for path in (tmp_path / "runs" / "records").glob("*") if json.loads(path.read_text())["of"]["step"]
    )
    lost.unlink()

    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("scripts.studies.work.ensure_trained", fail)
    monkeypatch.setitem(conduct.RUNNERS, "local", here)
    assert paper.main([*call, "--runs", str(tmp_path / "runs")]) == 1
    assert "RuntimeError: out of luck" in capsys.readouterr().err
    text = (tmp_path / "runs" / "small" / "toybox" / "table.md").read_text()
    assert text.count(" missing |") == 1 and "| – | – | – | 0, 1 missing |" in text


# ---- the pool ------------------------------------------------------------------------------------------------------


def empty_task(name: str, **needs) -> Task:
    return Task(name, {}, {}, "poodle", "live", "toybox:poodle", 0, needs=needs)


def test_the_pool_gives_every_task_its_answer(tmp_path):
    """The tasks need nothing, or something that cannot be; no model is loaded."""
    tasks = [empty_task("good"), empty_task("bad", abc={}), empty_task("fine")]
    answers = {task.run: why for task, why in conduct.run_local(tasks, tmp_path, 2)}
    assert answers == {"good": None, "fine": None, "bad": "KeyError: 'step'"}
    assert "KeyError" in (tmp_path / "trained" / "bad" / "log.txt").read_text()


def test_a_worker_that_dies_is_told(tmp_path):
    worker = conduct.Worker(0, tmp_path, None)
    worker.task = task = empty_task("doomed")
    worker.process.kill()
    assert worker.take() == (task, "its process ended (exit code -9); was there too little memory?")
    worker.stop()


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"--on ray needs the extra `ray`: pip install -e '.\[ray\]'"):
        list(conduct.run_ray([empty_task("any")], tmp_path, 1))


# ---- tables --------------------------------------------------------------------------------------------------------


def made_up(seed: int = 0) -> tuple[list[Cell], dict[str, dict], np.ndarray]:
    """Two series x three values x two subjects x three seeds, and their scores (series, value, metric, cell)."""
    scores = np.random.default_rng(seed).uniform(0.1, 0.9, (2, 3, 3, 6))
    cells, found = [], {}
    for s, series in enumerate([Series(label="KronA"), Series(label="LoRA")]):
        for v in range(3):
            for k in range(6):
                key = f"{s}{v}{k}"
                value = Value(label=f"v{v}", x=v, reference=v == 1)
                cells.append(Cell(series, value, ("a", "b")[k % 2], k // 2, key, group="g"))
                own = dict(zip(records.METRICS, map(float, scores[s, v, :, k]), strict=True))
                found[key] = {"key": key, "scores": own, "parameters": 10 + s, "seconds": {"train": k}, "group": "g"}
    return cells, found, scores


def test_means_spreads_and_gaps_are_numpys(tmp_path):
    study = load_studies(["learning-rate"])["learning-rate"]
    cells, found, scores = made_up()
    rows = rows_of(study, cells, found)
    tables.write_csv(tmp_path / "table.csv", study, rows)
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [line["label"] for line in lines] == [f"{s}, v{v}" for s in ("KronA", "LoRA") for v in range(3)]
    for i, line in enumerate(lines):
        own = scores[i // 3, i % 3]
        for metric, values, other in zip(records.METRICS, own, scores[0, 1], strict=True):
            assert float(line[metric]) == pytest.approx(values.mean(), abs=1e-6)
            assert float(line[f"{metric}_spread"]) == pytest.approx(values.std(ddof=1), abs=1e-6)
            of_seeds = np.sqrt(np.mean([values[::2].var(ddof=1), values[1::2].var(ddof=1)]))
            assert float(line[f"{metric}_spread_of_seeds"]) == pytest.approx(of_seeds, abs=1e-6)
            if metric in tables.COMPARED and i != 1:
                assert float(line[f"{metric}_minus_reference"]) == pytest.approx((values - other).mean(), abs=1e-6)
        assert (line["n"], line["missing"], line["trained_parameters"]) == ("6", "0", str(10 + i // 3))
        assert float(line["train_seconds"]) == 2.5
    for metric in records.METRICS:
        own = scores[:, :, records.METRICS.index(metric)]
        for told, values in zip(tables.spreads_of(rows, metric), own, strict=True):
            assert np.mean(list(told.deviation.values())) == pytest.approx(values.std(axis=0, ddof=1).mean())
            assert np.mean(list(told.reach.values())) == pytest.approx(np.ptp(values, axis=0).mean())


def test_intervals_are_students_within_subjects():
    """Against the least squares of a model with one mean a subject, worked out with numpy."""
    cells, found, scores = made_up()
    rows = rows_of(load_studies(["learning-rate"])["learning-rate"], cells, found)
    gap = tables.against(rows[3], rows[0], "dino")
    differences = scores[1, 0, 2] - scores[0, 0, 2]
    design = np.array([[1, 1] if k % 2 == 0 else [1, -1] for k in range(6)], dtype=float)  # columns: mean, contrast
    fitted, squares, *_ = np.linalg.lstsq(design, differences, rcond=None)
    error = np.sqrt(squares[0] / 4 * np.linalg.inv(design.T @ design)[0, 0])
    half = 2.776445105 * error  # Student's t of four degrees of freedom, 97.5 %
    assert gap is not None
    assert [gap.value, gap.low, gap.high] == pytest.approx([fitted[0], fitted[0] - half, fitted[0] + half], abs=1e-5)
    signs = [np.sign(differences[::2].mean()), np.sign(differences[1::2].mean())]
    assert (gap.agree, gap.subjects) == (signs.count(np.sign(fitted[0])), 2)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (8, 2.3060), (30, 2.0423), (500, 1.9647)])
def test_students_quantile(freedom, quantile):
    assert tables.student(freedom) == pytest.approx(quantile, abs=2e-4)


def test_a_difference_is_clear_where_the_interval_leaves_out_zero_and_all_subjects_agree():
    same = tables.gap_of({(subject, seed): 0.1 + 0.001 * seed for subject in "abcd" for seed in range(3)})
    one_apart = tables.gap_of(
        {(s, seed): (-0.01 if s == "d" else 0.1) + 0.001 * seed for s in "abcd" for seed in range(3)}
    )
    noisy = tables.gap_of({(subject, seed): 0.1 + (seed - 1) for subject in "abcd" for seed in range(3)})
    assert same is not None and one_apart is not None and noisy is not None
    assert same.clear and tables.told(same).startswith("**+0.101** [") and tables.told(same).endswith(" 4/4")
    assert not one_apart.clear and one_apart.low is not None and one_apart.low > 0
    assert tables.told(one_apart).endswith(" 3/4")
    assert not noisy.clear and noisy.agree == 4
    below = tables.gap_of({(subject, seed): -0.1 - 0.001 * seed for subject in "abcd" for seed in range(3)})
    assert below is not None and below.clear and tables.told(below).startswith("**-0.101** [")


def test_one_seed_gives_no_interval():
    gap = tables.gap_of({("a", 0): 0.1, ("b", 0): 0.2})
    assert gap is not None and (gap.low, gap.high, gap.clear) == (None, None, False)
    assert tables.told(gap) == "+0.150 2/2" and tables.gap_of({}) is None


def test_how_much_more_one_series_spreads_than_another_is_known_where_nothing_is_left_to_chance():
    """The second series' values lie 0.1 apart in every subject and seed, the first's do not differ."""
    cells, found, _ = made_up()
    for cell in cells:
        by_cell = 0.1 * (cell.subject == "b") + 0.01 * cell.seed
        by_value = 0.1 * (cell.value.x or 0) * (cell.series.label == "LoRA")
        found[cell.key]["scores"] = dict.fromkeys(records.METRICS, by_cell + by_value)
    rows = rows_of(load_studies(["learning-rate"])["learning-rate"], cells, found)
    for metric in records.METRICS:
        first, other = tables.spreads_of(rows, metric)
        gap = tables.spread_gap(first, other)
        assert (first.series, other.series, first.values) == ("KronA", "LoRA", 3) and gap is not None
        assert [gap.value, gap.low, gap.high] == pytest.approx([-0.1] * 3) and gap.agree == 2


def test_pairs_are_the_same_value_in_two_series_and_values_against_each_other(tmp_path):
    value = {"title": "t", "paper": "p", "axis": "a", "values": {"default": [{"label": "x"}]}}
    cells, found, scores = made_up()
    cells = [
        Cell(cell.series, cell.value.model_copy(update={"against": "v2" if cell.value.label == "v0" else ""}),
             cell.subject, cell.seed, cell.key)
        for cell in cells
    ]  # fmt: skip
    rows = rows_of(Study.model_validate(value), cells, found)
    tables.write_markdown(tmp_path / "table.md", Study.model_validate(value), rows, "about")
    told = (tmp_path / "table.md").read_text().split("## Pairs")[1]
    wanted = [
        (("KronA, v0", "KronA, v2"), scores[0, 0] - scores[0, 2]),
        (("LoRA, v0", "LoRA, v2"), scores[1, 0] - scores[1, 2]),
        *(((f"KronA, v{v}", f"LoRA, v{v}"), scores[0, v] - scores[1, v]) for v in range(3)),
    ]
    lines = told.strip().splitlines()[2:]
    assert len(lines) == len(wanted)
    for line, (names, gaps) in zip(lines, wanted, strict=True):
        parts = [part.strip() for part in line.strip("|").split("|")]
        assert tuple(parts[:2]) == names
        assert [float(part.split()[0].strip("*")) for part in parts[2:]] == pytest.approx(gaps.mean(axis=1), abs=5e-4)


def test_a_value_against_none_is_refused(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("title: a\npaper: b\naxis: c\nvalues: {toybox: [{label: x, against: y}]}\n")
    with pytest.raises(ValueError, match="values.toybox: x is against 'y', which is not there"):
        load_studies([str(own)])


def test_runs_that_diverged_are_counted_apart(tmp_path):
    study = load_studies(["learning-rate"])["learning-rate"]
    cells, found, scores = made_up()
    del found["000"]
    for key in ("001", *(f"02{k}" for k in range(6))):
        found[key] |= {"diverged": True, "scores": {}}
    rows = rows_of(study, cells, found)
    assert (rows[0].missing, rows[0].diverged, len(rows[0].found)) == (1, 1, 4)
    assert rows[0].mean("dino") == pytest.approx(scores[0, 0, 2, 2:].mean())
    tables.write_markdown(tmp_path / "table.md", study, rows, "about")
    tables.write_csv(tmp_path / "table.csv", study, rows)
    text = (tmp_path / "table.md").read_text()
    assert "| 4, 1 missing, 1 diverged |" in text and "| KronA, v2 | – | – | – | 0, 6 diverged |" in text
    assert list(csv.DictReader((tmp_path / "table.csv").open()))[2]["diverged"] == "6"


def test_missing_cells_are_counted_and_left_out_of_means():
    cells, found, scores = made_up()
    for key in ("000", "003"):
        del found[key]
    row = rows_of(load_studies(["learning-rate"])["learning-rate"], cells, found)[0]
    assert (row.missing, len(row.found)) == (2, 4)
    assert row.mean("dino") == pytest.approx(scores[0, 0, 2, [1, 2, 4, 5]].mean())


def test_a_table_of_subjects_ends_with_groups_and_all():
    cells, found, scores = made_up()
    own = [cell for cell in cells if cell.key.startswith("00")]
    rows = rows_of(load_studies(["suite"])["suite"], own, found)
    assert [row.label for row in rows] == ["a", "b", "all g", "all subjects"]
    assert rows[0].mean("clip_i") == pytest.approx(scores[0, 0, 0, ::2].mean())
    assert rows[3].mean("clip_i") == pytest.approx(scores[0, 0, 0].mean())


def test_the_estimate_is_made_of_finished_records(tmp_path):
    planner = planner_for("toybox", tmp_path, subjects=["poodle"])
    planner.expand("steps", load_studies(["steps"])["steps"], "toybox")
    tasks = unfinished(list(planner.tasks.values()), tmp_path)
    assert "no record yet" in conduct.estimate(tasks, tmp_path, 1)
    run = next(task for task in tasks if task.steps)
    key = next(iter(run.needs))
    of, seconds = run.needs[key]["of"], {"train": 60.0, "sample": 30.0, "measure": 6.0, "set_up": 24.0}
    of = {**of, "step": 100}
    record = {"key": records.key_of(of), "of": of, "seconds": seconds, "scores": {}}
    records.keep(tmp_path, record)
    # 200 steps at 0.6 s, one set-up, and five times (the base and four steps) a draw and a measurement
    wanted = round((200 * 0.6 + 24 + 5 * (30 + 6)) / 60)
    assert conduct.estimate(tasks, tmp_path, 1) == f", about {wanted} minutes"
    assert conduct.estimate(tasks, tmp_path, 2) == f", about {round((200 * 0.6 + 24 + 5 * 36) / 120)} minutes"


# ---- what is committed ---------------------------------------------------------------------------------------------

DOCS = ROOT / "docs"
COMMITTED = {
    ("paper", "toybox"): ["all", "--seeds", "3"],
    ("paper", "toybox-flow"): ["baselines", "learning-rate", "modules", "--seeds", "3"],
    ("method", "toybox"): ["stage-1", "--seeds", "1"],
}
"""(page of docs/, model) -> the call of its studies; tables and records lie in docs/PAGE/MODEL."""


@pytest.mark.parametrize(
    ("page", "model"), [pytest.param(*key, marks=[pytest.mark.full] * (key[0] == "method")) for key in COMMITTED]
)
def test_the_committed_tables_are_made_of_the_committed_records(page, model, tmp_path, monkeypatch):
    """And of today's studies, subjects and weights: each record's key is worked out anew from these."""
    monkeypatch.setitem(conduct.RUNNERS, "local", forbid)
    for name in ("write_plot", "write_sheet"):
        monkeypatch.setattr(conduct.figures, name, lambda *_, **__: False)
    monkeypatch.setattr(conduct.judge, "write_fronts", lambda *_, **__: False)
    call, committed = COMMITTED[page, model], DOCS / page / model
    source = ["--model", model, "--import-records", str(committed / "records.jsonl.gz")]
    assert paper.main([*call, "--runs", str(tmp_path), *source]) == 0
    studies = [path.parent.name for path in committed.glob("*/table.md")]
    assert set(studies) == set(known_studies() if call[0] == "all" else call[: call.index("--seeds")])
    for study in studies:
        for name in ("table.md", "table.csv"):
            told = (committed / study / name).read_text(encoding="utf-8")
            assert (tmp_path / study / model / name).read_text(encoding="utf-8") == told, f"{study}/{name}"


@pytest.mark.parametrize("page", ["paper", "method"])
def test_the_numbers_of_the_page_stand_in_the_tables_that_it_links(page):
    text, checked, link = (DOCS / f"{page}.md").read_text(encoding="utf-8"), 0, re.compile(r"\(([\w/-]+/table\.md)\)")
    heading: list[str] = []
    for line in text.splitlines():
        cells = line.split(" | ")
        if not line.startswith("|"):
            heading = []
            continue
        heading = heading or cells
        linking = cells if link.search(line) else heading
        found = [(i, link.findall(cell)) for i, cell in enumerate(linking) if link.search(cell)]
        if not found or set(line) <= set("|-"):
            continue
        ((at, (name,)),) = found
        table = (DOCS / name).read_text(encoding="utf-8")
        for number in re.findall(r"[+-]?\d+\.\d+", cells[at]):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", table), f"{name}: {number} of {cells[at]!r}"
            checked += 1
    assert checked > 20
