"""The judge of studies: hypervolume, paired differences, gallery and bars against values worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scripts import paper
from scripts.studies import conduct, judge, records, work
from scripts.studies.plan import Planner
from scripts.studies.study import Series, Study, Value, load_base, load_studies
from scripts.studies.work import Cell
from tests.test_paper import here

ROOT = Path(__file__).resolve().parents[1]
BARS = [
    {"kind": "hypervolume", "methods": ["KronA", "other"], "least": 0.03, "subjects": 2},
    {"kind": "one rate", "methods": ["KronA", "LoRA"], "within": 0.01},
    {"kind": "floor", "methods": ["KronA"], "within": 0.1},
    {"kind": "hypervolume", "methods": ["unmeasured"], "least": 0.0, "subjects": 0},
]


# ---- hypervolume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0.0),
        ([(0.5, 0.4)], 0.2),
        ([(0.8, 0.5), (0.4, 0.9)], 0.8 * 0.5 + 0.4 * 0.4),
        ([(0.8, 0.5), (0.4, 0.9), (0.3, 0.3)], 0.8 * 0.5 + 0.4 * 0.4),  # a dominated point adds nothing
        ([(0.8, 0.5), (0.8, 0.5)], 0.4),
        ([(0.8, 0.5), (0.8, 0.7), (0.6, 0.7)], 0.56),
        ([(0.8, -0.1), (-0.2, 0.9), (0.0, 0.5)], 0.0),  # nothing beyond (0, 0) in both
        ([(0.9, -0.1), (0.5, 0.5)], 0.25),
    ],
)
def test_the_hypervolume_of_a_few_points(points, area):
    assert judge.hypervolume(points) == pytest.approx(area)


def test_the_hypervolume_is_the_area_that_a_grid_counts():
    dice = np.random.default_rng(3)
    centres = (np.arange(1000) + 0.5) / 1000
    for count in (1, 3, 12, 40):
        points = dice.uniform(-0.2, 1, (count, 2))
        inside = np.zeros((1000, 1000), dtype=bool)
        for x, y in points:
            inside |= (centres[:, None] < x) & (centres[None, :] < y)
        assert judge.hypervolume(map(tuple, points)) == pytest.approx(inside.mean(), abs=4e-3)


# ---- methods and their differences ---------------------------------------------------------------------------------


def a_study(**more: Any) -> Study:
    rates = [{"label": label, "x": x} for label, x in (("low", 1), ("high", 2))]
    return Study.model_validate(
        {
            "title": "Judge",
            "paper": "none",
            "axis": "rate",
            "series": [{"label": label} for label in ("KronA", "LoRA", "other", "unmeasured")],
            "strengths": [0.5, 1.0],
            "metrics": ["dino", "clip_t", "copy", "gallery"],
            "values": {"default": rates},
            "judge": {"against": "LoRA", "bars": BARS, "keep": 1, "always": ["KronA", "LoRA"], **more},
        }
    )


def measured(scores: np.ndarray) -> tuple[list[Cell], dict[str, dict]]:
    """Cells and records of scores (method, subject, seed, rate, strength, [dino, clip_t])."""
    cells, found = [], {}
    for place in np.ndindex(scores.shape[:-1]):
        method, subject, seed, rate, strength = place
        key = "-".join(map(str, place))
        series, value = Series(label=("KronA", "LoRA", "other")[method]), Value(label=("low", "high")[rate], x=1 + rate)
        cells.append(Cell(series, value, "abc"[subject], seed, key, strength=(0.5, 1.0)[strength]))
        dino, clip_t = map(float, scores[place])
        own = {"dino": dino, "clip_t": clip_t, "copy": dino / 2, "gallery": 0.25 * seed}
        found[key] = {"key": key, "scores": own, "parameters": 10 * (1 + method), "seconds": {"train": 1.0}}
    return cells, found


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.9, (3, 3, 2, 2, 2, 2))


def volumes_by_hand(scores: np.ndarray) -> np.ndarray:
    """(methods, subjects) from the seeds' means, by inclusion and exclusion of the four boxes."""
    means = scores.mean(axis=2).reshape(3, 3, 4, 2)
    result = np.zeros((3, 3))
    for chosen in range(1, 16):
        picks = [i for i in range(4) if chosen >> i & 1]
        corner = means[:, :, picks].min(axis=2)
        result += (-1) ** (len(picks) + 1) * corner.prod(axis=-1)
    return result


def test_scores_are_averaged_over_seeds_before_the_area_is_taken(scores):
    cells, found = measured(scores)
    methods = judge.methods_of(a_study(), cells, found)
    assert [method.label for method in methods] == ["KronA", "LoRA", "other"]
    for method, wanted in zip(methods, volumes_by_hand(scores), strict=True):
        assert list(method.volumes()) == ["a", "b", "c"]
        assert list(method.volumes().values()) == pytest.approx(wanted)
    means = scores.mean(axis=(1, 2))
    assert methods[0].mean(("high", 0.5), "dino") == pytest.approx(means[0, 1, 0, 0])
    assert methods[0].mean(("high", 0.5), "copy") == pytest.approx(means[0, 1, 0, 0] / 2)
    products = scores.mean(axis=2).prod(axis=-1).mean(axis=1)[0]
    rate, strength = np.unravel_index(products.argmax(), products.shape)
    assert methods[0].best() == (("low", "high")[rate], (0.5, 1.0)[strength])


def test_the_interval_is_students_over_subjects():
    gap = judge.paired({"a": 0.5, "b": 0.6, "c": 0.4, "d": 9.0}, {"a": 0.4, "b": 0.4, "c": 0.45})
    assert gap is not None  # differences 0.1, 0.2, -0.05: mean 1/12, standard deviation 0.125831
    half = 4.302653 * 0.1258306 / np.sqrt(3)
    assert [gap.value, gap.low, gap.high] == pytest.approx([1 / 12, 1 / 12 - half, 1 / 12 + half], abs=1e-5)
    assert (gap.agree, gap.subjects, gap.clear) == (2, 3, False)
    alone = judge.paired({"a": 0.5, "b": 0.6}, {"a": 0.4, "b": 0.4}, without=["a"])
    assert alone is not None and (alone.value, alone.low, alone.subjects) == (pytest.approx(0.2), None, 1)
    assert judge.paired({"a": 0.5}, {"b": 0.5}) is None


def test_a_subject_with_a_missing_record_is_left_out_and_named(scores):
    cells, found = measured(scores)
    del found["0-1-0-0-0"]
    krona = judge.methods_of(a_study(), cells, found)[0]
    assert (list(krona.volumes()), krona.incomplete) == (["a", "c"], ["b"])
    told = "\n".join(judge.lines_of_verdict(a_study(), cells, found, "about"))
    assert "Not complete, and left out: KronA: b." in told
    gap = judge.paired(krona.volumes(), judge.methods_of(a_study(), cells, found)[1].volumes())
    assert gap is not None and gap.subjects == 2


def test_a_run_that_diverged_counts_as_nothing(scores):
    cells, found = measured(scores)
    found["0-1-0-0-0"] |= {"diverged": True, "scores": {}}
    krona = judge.methods_of(a_study(), cells, found)[0]
    scores[0, 1, 0, 0, 0] = 0
    assert list(krona.volumes().values()) == pytest.approx(volumes_by_hand(scores)[0])
    assert krona.diverged == 1 and krona.incomplete == []


def test_bars_are_judged(scores):
    scores[:] = 0.5
    scores[0, :, :, 1, 1] = 0.6  # KronA at the high rate and strength 1: 0.36 against 0.25
    scores[2, 0, :, 1, 1] = 0.9  # other: far above in one subject only, below in one
    scores[2, 1] = 0.49
    cells, found = measured(scores)
    methods = judge.methods_of(a_study(), cells, found)
    krona, other, one_rate, floor, unmeasured = judge.findings(a_study(), methods)[:5]
    assert (krona.holds, krona.told) == (True, "+0.110, above 0 in 3 of 3")
    assert (other.holds, other.told.split(", ")[1]) == (False, "above 0 in 1 of 3")
    assert one_rate.holds and one_rate.told.startswith("at high ")
    assert floor.holds and floor.told == "the lowest is low, 0.100 below the best"
    assert unmeasured.holds is None
    assert judge.going_on(a_study(), methods) == ["KronA", "LoRA", "other"]
    scores[1, :, :, 0, 1] = 0.52  # LoRA is now best at the low rate, KronA at the high one
    again = judge.findings(a_study(), judge.methods_of(a_study(), *measured(scores)))
    assert again[2].holds is False
    lower = judge.findings(a_study(bars=[{**BARS[2], "within": 0.09}]), methods)
    assert [finding.holds for finding in lower] == [False]


def test_the_verdict_tells_with_and_without_the_subjects_of_the_selection(scores):
    cells, found = measured(scores)
    study = a_study(selected_on=["a"], dropped=[{"what": "min-SNR", "why": "CLIP-T -0.037"}])
    lines = judge.lines_of_verdict(study, cells, found, "about")
    volumes = volumes_by_hand(scores)
    (line,) = [line for line in lines if line.startswith("| KronA |")]
    parts = [part.strip() for part in line.strip("|").split("|")]
    assert parts[1:3] == ["10", f"{volumes[0].mean():.3f}"]
    gaps = volumes[0] - volumes[1]
    for part, own in zip(parts[3:5], (gaps, gaps[1:]), strict=True):
        assert float(part.split()[0].strip("*")) == pytest.approx(own.mean(), abs=5e-4)
        assert part.endswith(f"/{len(own)}")
    assert "| min-SNR | CLIP-T -0.037 |" in lines and "without a" in "\n".join(lines)
    order = [line.split(" | ")[0] for line in lines if line.startswith(("| KronA |", "| LoRA |", "| other |"))][:3]
    assert order == [f"| {('KronA', 'LoRA', 'other')[i]}" for i in np.argsort(-volumes.mean(axis=1))]


def test_a_judge_of_series_that_are_not_there_is_refused():
    with pytest.raises(ValueError, match="judge: 'DoRA' is no series; there are KronA, LoRA"):
        a_study(against="DoRA")


# ---- gallery -------------------------------------------------------------------------------------------------------


def test_ranks_count_the_look_alikes_that_are_as_near():
    nearest = np.array([[0.9, 0.5, 0.7], [0.1, 0.6, 0.7], [0.2, 0.8, 0.1]])  # the subject, then two look-alikes
    assert work.ranks_of(nearest).tolist() == [1, 3, 2]


def test_photos_of_a_subject_are_recognised_among_toyboxs_sprites():
    from diffusekrona_train.evaluation.inputs import Generated
    from diffusekrona_train.evaluation.metrics.encoders import open_dino

    folder = ROOT / "diffusekrona_train" / "assets" / "toybox" / "subjects"
    shown = [Generated(folder / name / "04.png", "", 0) for name in ("owl", "owl", "poodle", "robot")]
    others = [f"toybox:{name}" for name in ("poodle", "robot", "teapot")]
    found = work.rank_in_gallery(open_dino("toybox"), "toybox:owl", others, shown)
    assert found["gallery"] == 0.5 and found["rank"] >= 1.5


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_a_name_is_made_of_every_value_and_young_fields_are_left_out_at_their_neutral_value():
    tree = {"train": {"average": 0.0, "rate": 1}, "adapter": {"cap": None}, "young": 3}
    since = {"train.average": 0.0, "adapter.cap": None, "young": 4}
    assert records.without_neutral(tree, since) == {"train": {"rate": 1}, "adapter": {}, "young": 3}
    tree["train"]["average"] = 0.95
    assert records.without_neutral(tree, since)["train"] == {"average": 0.95, "rate": 1}


def test_every_young_field_has_its_neutral_value_written_down():
    """A field that is in no record yet belongs into records.SINCE, with the value that trains as it did before."""
    from diffusekrona_train.config.run import RunConfig

    config = RunConfig.model_validate({"subject": {"images": "x", "class": "dog"}, "output": "runs/x"})
    mark = records.run_mark(config, "", [])["config"]
    fields = {f"{section}.{name}" for section, own in mark.items() if isinstance(own, dict) for name in own}
    known = {f"{s}.{name}" for s, own in records.DEFAULTS_OF_0_1.items() if isinstance(own, dict) for name in own}
    assert fields == known and mark.keys() == records.DEFAULTS_OF_0_1.keys()


def test_a_changed_default_finds_no_old_record(tmp_path, monkeypatch):
    from diffusekrona_train.config.training import TrainConfig

    def key() -> str:
        planner = Planner("toybox", load_base("toybox"), tmp_path, seeds=1, subjects=["poodle"])
        return planner.expand("suite", load_studies(["suite"])["suite"], "toybox")[0].key

    committed = {record["key"] for _, record in records.lines_of(ROOT / "docs/paper/toybox/records.jsonl.gz")}
    assert key() in committed
    monkeypatch.setattr(TrainConfig.model_fields["weight_decay"], "default", 0.02)
    TrainConfig.model_rebuild(force=True)
    from diffusekrona_train.config.run import RunConfig

    RunConfig.model_rebuild(force=True)
    try:
        assert key() not in committed
    finally:
        monkeypatch.undo()
        TrainConfig.model_rebuild(force=True)
        RunConfig.model_rebuild(force=True)
    assert key() in committed


def test_records_of_0_1_get_their_new_names_once(tmp_path):
    """A committed record, written as 0.1 wrote it, comes back byte for byte."""
    whole = [record for _, record in records.lines_of(ROOT / "docs" / "paper" / "toybox" / "records.jsonl.gz")]
    chosen = [
        next(record for record in whole if record["of"]["step"] == 0),
        next(record for record in whole if record["of"]["run"]["config"].get("adapter", {}).get("type") == "lora"),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(as_0_1_wrote(record), sort_keys=True) + "\n" for record in chosen))
    for _ in range(2):
        assert records.main([str(path)]) == 0
        assert sorted(path.read_text().splitlines()) == sorted(
            json.dumps(record, ensure_ascii=False, sort_keys=True) for record in chosen
        )
    changed = as_0_1_wrote(chosen[1])
    changed["of"]["step"] = 99
    path.write_text(json.dumps(changed) + "\n")
    assert records.main([str(path)]) == 2 and json.loads(path.read_text()) == changed


def as_0_1_wrote(record: dict) -> dict:
    """Without what was default, under the hash of the rest."""
    of = json.loads(json.dumps(record["of"]))
    for name in ("encoders", "gallery"):
        del of[name]
    for name in ("negative", "scheduler", "noise", "strength", "strength_schedule", "batch_size"):
        del of["sampling"][name]
    config = of["run"]["config"]
    for section, value in list(config.items()):
        defaults = records.DEFAULTS_OF_0_1[section]
        if isinstance(value, dict) and defaults:
            config[section] = {name: own for name, own in value.items() if own != defaults[name]}
        if config[section] in ({}, None):
            del config[section]
    run = "base" if record["run"] == "base" else records.key_of(of["run"])
    return {**record, "of": of, "key": records.key_of(of), "run": run}


# ---- a study that is really run ------------------------------------------------------------------------------------


def test_a_judged_study_from_yaml_to_verdict(tmp_path, monkeypatch, capsys):
    """One run of one step; strengths and a schedule are sampled from the same adapter."""
    base = load_base("toybox").model_dump(mode="json")
    base |= {"subjects": ["poodle"], "prompts": base["prompts"][:1], "sampling": {"steps": 2, "guidance": 2.0}}
    study = {
        "title": "Tiny",
        "paper": "none",
        "axis": "rate",
        "series": [{"label": "plain"}, {"label": "scheduled", "sample": {"strength_schedule": "0@0.5"}}],
        "strengths": [0.5, 1.0],
        "metrics": ["dino", "clip_t", "copy", "gallery", "rank"],
        "values": {"default": [{"label": "0.1", "x": 0.1, "set": {"train.learning_rate": 0.1, "train.steps": 2}}]},
        "judge": {"against": "plain", "keep": 1, "bars": [{"kind": "hypervolume", "methods": ["scheduled"]}]},
    }
    for name, tree in (("base", base), ("tiny", study)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setitem(conduct.RUNNERS, "local", here)
    call = [str(tmp_path / "tiny.yaml"), "--base", str(tmp_path / "base.yaml"), "--seeds", "1"]
    assert paper.main([*call, "--runs", str(tmp_path / "runs")]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "runs" / "trained").iterdir())) == 1, "both methods share the run"
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "records").glob("*.json")]
    assert len(found) == 4 and len({json.dumps(record["scores"]) for record in found}) == 4
    assert all(0 <= record["scores"]["gallery"] <= 1 and record["scores"]["rank"] >= 1 for record in found)
    by_setting = {
        (record["of"]["sampling"]["strength"], record["of"]["sampling"]["strength_schedule"]): record["scores"]
        for record in found
    }
    told = (tmp_path / "runs" / "tiny" / "toybox" / "table.md").read_text()
    for schedule, label in (("", "plain"), ("0@0.5", "scheduled")):
        own = [(by_setting[s, schedule]["dino"], by_setting[s, schedule]["clip_t"]) for s in (0.5, 1.0)]
        assert f"| {label} | " in told and f" | {judge.hypervolume(own):.3f} | " in told
    assert all(
        (tmp_path / "runs" / "tiny" / "toybox" / name).is_file() for name in ("plot.png", "sheet.png", "table.csv")
    )


# ---- the studies that wait to be run ---------------------------------------------------------------------------------


MORE = (
    ("module-rates", 5 * 36),
    ("rate-unit", 8 * 60),
    ("rate-unit-modules", 5 * 36),
    ("average", 5 * 60),
    ("norm-cap", 4 * 60),
    ("one-photo", 5 * 60),
    ("aligned", 3 * 60),
)


def test_the_edge_of_what_points_dominate_is_a_staircase():
    """By hand: (0.4, 0.8) and (0.6, 0.5) are on it, (0.3, 0.7) and (0.5, 0.4) are below it."""
    x, y = judge._edge([(0.3, 0.7), (0.6, 0.5), (0.4, 0.8), (0.5, 0.4)])
    assert list(zip(x, y, strict=True)) == [(0.4, 0.8), (0.4, 0.5), (0.6, 0.5), (0.6, 0.0)]


def test_the_studies_beyond_the_paper_expand_and_share_runs(tmp_path):
    for name, runs in (("stage-1", 25 * 20), ("stage-2", 6 * 252), ("factor-rates", 5 * 36), *MORE):
        planner = Planner("toybox", load_base("toybox"), tmp_path, seeds=1 if name == "stage-1" else 3)
        planner.expand(name, load_studies([name])[name], "toybox")
        assert len(planner.tasks) == runs, name
        assert name not in load_studies(["all"])


def test_variants_have_the_parameters_of_lora():
    """Equal layers and parameters: what is compared on toybox's own table of layers."""
    from diffusekrona_train.adapters.inject import inject
    from diffusekrona_train.config import make_config
    from diffusekrona_train.models import open_model

    unet = open_model("toybox").load("denoiser")["denoiser"]
    counts = {}
    for series in load_studies(["stage-1"])["stage-1"].series:
        tree = {**load_base("toybox").config, "subject": {"images": "x", "class": "c"}, "output": "runs/x"}
        config = make_config(tree, [f"{key}={json.dumps(value)}" for key, value in series.set.items()])
        injection = inject(unet, config.adapter)
        counts[series.label] = injection.count
        injection.eject()
    assert counts["LoRA"] == 125_952
    for label, count in counts.items():
        stated = re.search(r"\(([0-9]+),([0-9]+)\)$", label)  # a baseline that cannot have LoRA's number says its own
        wanted = int(stated[1] + stated[2]) if stated else count
        assert count == wanted and (stated or 0.98 * 125_952 <= count <= 125_952), (label, count)
