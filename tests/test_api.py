"""docs/api.md does what it says: its code runs as it stands there, in order; and the example of two subjects."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from diffusekrona_train.common.run_folder import read_metrics
from tests.runs import newest_state

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.M | re.S)


def test_the_page_names_everything_public():
    import diffusekrona_train

    public = set(diffusekrona_train.__all__) - {"__version__"}
    assert {name for name in public if not re.search(rf"\b{name}\b", PAGE)} - {"Diverged"} == set()
    assert all(hasattr(diffusekrona_train, name) for name in public)


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ((_, config),) = [block for block in BLOCKS if block[0] == "yaml"]
    (tmp_path / "dog.yaml").write_text(config)
    names: dict[str, object] = {}
    blocks = [text for language, text in BLOCKS if language == "python"]
    for number, text in enumerate(blocks):
        exec(compile(text, f"docs/api.md, block {number}", "exec"), names)
    assert len(blocks) >= 7 and {language for language, _ in BLOCKS} == {"python", "yaml"}
    said = capsys.readouterr()
    assert "after step 3 of 5: runs/dog/checkpoints/step-000003/adapter.safetensors" in said.out
    assert {path.name for path in tmp_path.iterdir()} >= {"0.png", "1.png", "pictures", "scores"}


def test_two_subjects_after_one_another_without_a_terminal(tmp_path, capfd):
    script = ROOT / "examples" / "two_subjects.py"
    assert len(script.read_text().splitlines()) <= 25
    names = runpy.run_path(str(script))
    files = names["two_subjects"](tmp_path / "poodle", tmp_path / "teapot", steps=7)
    assert len(files) == 2 and all(file.is_file() for file in files)
    assert capfd.readouterr().out == "", "the library prints"
    for name in ("poodle", "teapot"):
        assert newest_state(tmp_path / name).step == 7
    assert '"name": "stopped", "step": 5' in (tmp_path / "teapot" / "events.jsonl").read_text()
    assert {line["step"] for line in read_metrics(tmp_path / "teapot" / "metrics.jsonl")} >= {5, 7}
