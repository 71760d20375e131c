"""scripts/paper.py confirm: the default against LoRA on subjects in folders named subject-class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from scripts import paper
from scripts.studies import conduct, judge
from scripts.studies.study import load_base, load_studies, look_alikes, suite_to_confirm
from tests.test_paper import here

SPRITES = Path(__file__).resolve().parents[1] / "diffusekrona_train" / "assets" / "toybox" / "subjects"


def subject(folder: Path, name: str, sprite: str = "owl", count: int = 3) -> Path:
    (folder / name).mkdir(parents=True)
    for i in range(count):
        shutil.copyfile(SPRITES / sprite / f"0{i % 5}.png", folder / name / f"{i}.png")
    return folder


def test_a_folder_is_named_subject_class(tmp_path):
    subject(tmp_path, "rex-toy_dinosaur")
    subject(tmp_path, "my-old-dog", count=10)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("no subject")
    suite = suite_to_confirm(tmp_path, load_base("toybox"))
    assert [(row.name, row.class_noun) for row in suite.rows] == [
        ("my-old-dog", "dog"),
        ("rex-toy_dinosaur", "toy dinosaur"),
    ]
    assert suite.prompts_of(suite.rows[1])[0] == "a sks toy dinosaur on the beach"
    assert len(look_alikes()) == 12


MISTAKES = {
    "no photos": (None, "confirm needs --photos FOLDER"),
    "no folder": (lambda place: place.write_text("") and None, "is not a folder"),
    "an empty folder": (lambda place: place.mkdir(), "holds no folder of photos; name it subject-class"),
    "no class": (lambda place: subject(place, "rex"), "photos: rex: does not say what the subject is"),
    "an empty class": (lambda place: subject(place, "rex-"), "rex-: does not say what the subject is"),
    "no subject": (lambda place: subject(place, "-dog"), "-dog: does not say what the subject is"),
    "a space": (lambda place: subject(place, "my rex-dog"), "my rex-dog: does not say what the subject is"),
    "two photos": (lambda place: subject(place, "rex-dog", count=2), "rex-dog: holds 2 photos; give 3 to 10"),
    "eleven photos": (lambda place: subject(place, "rex-dog", count=11), "rex-dog: holds 11 photos; give 3 to 10"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path, capsys):
    make, told = MISTAKES[name]
    given = []
    if make:
        make(tmp_path / "photos")
        given = ["--photos", str(tmp_path / "photos")]
    assert paper.main(["confirm", *given, "--runs", str(tmp_path / "runs")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and told in printed
    assert not (tmp_path / "runs").exists()


def test_it_is_given_alone(tmp_path, capsys):
    assert paper.main(["confirm", "init", "--photos", str(subject(tmp_path, "rex-dog"))]) == 2
    assert "give it alone" in capsys.readouterr().err


def test_rates_are_fixed_beforehand_for_every_model():
    study = load_studies(["confirm"])["confirm"]
    assert [series.label for series in study.series] == ["default", "lora"]
    assert all(set(series.models) == {"toybox", "sdxl", "sd15"} for series in study.series)


def test_the_table_has_both_and_the_hypervolume(tmp_path, monkeypatch, capsys):
    """Two subjects, one prompt, two steps of training; what is printed is worked out again from the records."""
    photos = subject(subject(tmp_path / "photos", "tin_man-robot", "robot"), "hoot-owl", "owl", 4)
    base = load_base("toybox").model_dump(mode="json")
    base |= {"prompts": base["prompts"][:1], "sampling": {"steps": 1, "guidance": 0}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    monkeypatch.setitem(conduct.RUNNERS, "local", here)
    call = ["confirm", "--photos", str(photos), "--base", str(tmp_path / "base.yaml"), "--steps", "2", "--seeds", "1"]
    assert paper.main([*call, "--runs", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "records").glob("*.json")]
    assert len(found) == 2 * 2 * 3 and {record["subject"] for record in found} == {"hoot-owl", "tin_man-robot"}
    assert len({record["of"]["gallery"] for record in found}) == 2 and all(r["of"]["gallery"] for r in found)
    rates = {"krona": 5e-3, "lora": 1e-3}
    for label, kind in (("default", "krona"), ("lora", "lora")):
        own = [record for record in found if record["of"]["run"]["config"]["adapter"]["type"] == kind]
        assert {record["of"]["run"]["config"]["train"]["learning_rate"] for record in own} == {rates[kind]}
        volumes = [
            judge.hypervolume((r["scores"]["dino"], r["scores"]["clip_t"]) for r in own if r["subject"] == name)
            for name in ("hoot-owl", "tin_man-robot")
        ]
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {label} |")]
        assert line.split(" | ")[2] == f"{sum(volumes) / 2:.3f}"
    assert "| hypervolume | minus lora |" in printed and "hypervolume at least +0.030 over lora" in printed
    assert str(tmp_path) not in "".join(json.dumps(record) for record in found)
