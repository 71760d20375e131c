"""The page of a run and the contact sheet: complete, escaped, no request; shown by Chromium where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffusekrona_train.config import dump_config, make_config
from diffusekrona_train.report.charts import Line, bar_chart, heat_map, line_chart
from diffusekrona_train.report.sheet import contact_sheet
from diffusekrona_train.training.curves import write_loss_plot
from diffusekrona_train.training.page import write_run_report

EVIL = "A [V] {class} <script>document.title='broken'</script> & \"quotes\" <img src=https://example.org/x.png>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def picture(seed: int, side: int = 64) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def run(tmp_path):
    """A run folder after 20 of 40 steps, with hostile text in its prompt and in the name of a photo."""
    photos, folder = tmp_path / "photos", tmp_path / "dog <i>&"
    photos.mkdir()
    for i, name in enumerate(("<b>bold.png", "two.png")):
        picture(i, 90).save(photos / name)
    folder.mkdir()
    tree = {
        "model": "toybox",
        "subject": {"images": str(photos), "class": "dog"},
        "train": {"steps": 40, "checkpoint_every": 10},
        "validation": {"prompts": [EVIL, "A [V] {class}"], "seeds": [0, 7]},
        "output": str(folder),
    }
    (folder / "config.yaml").write_text(dump_config(make_config(tree)))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (10, 20):
            line = {"step": step, "loss": 1 / step, "lr": 5e-4, "grad_norm": 1.0, "images_per_s": 3.0, "time": step}
            file.write(json.dumps(line) + "\n" + json.dumps({"step": step, "validation_loss": 2 / step}) + "\n")
        file.write('{"step": 30, "lo')
    for step in (0, 10, 20):
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for number, seed in enumerate((0, 7, 0, 7)):
            picture(step + number).save(place / f"{number:02d}-{seed}.png")
    return folder


def score(value: float) -> dict:
    return {"value": value, "std": 0.1, "low": value - 0.1, "high": value + 0.1, "n": 4, "by_seed": {"0": value}}


def add_measurements(folder, chosen: int) -> None:
    names = ("clip_i", "clip_t", "dino", "class_drift", "copy")
    rows = [{"step": step, "scores": {name: score(step / 100) for name in names}} for step in (10, 20)]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "best.json").write_text(
        json.dumps({"chosen_step": chosen, "rule": "the <best>", "checkpoints": rows})
    )


class Reader(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_of_an_unfinished_run(run):
    page = Reader(write_run_report(run).read_text())
    assert "at step 20 of 40" in page.text
    for title in (
        "What was trained",
        "The subject",
        "Base model against adapter",
        "Samples by step",
        "Curves",
        "Use it",
    ):
        assert title in page.text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 * 2 + 4 * 2 + 4 * 3, "photos and crops, pairs, samples"
    assert any(attrs.get("http-equiv") == "refresh" for tag, attrs in page.tags)


def test_text_is_escaped_and_nothing_is_fetched(run):
    text = write_run_report(run).read_text()
    page = Reader(text)
    assert not any(tag in ("script", "b", "i") for tag, _ in page.tags)
    assert "<script>document.title='broken'</script>" in page.text
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attrs.get(name) or "data:").startswith(("data:", "#")), (tag, attrs)
    assert "url(http" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert str(run.parent) not in text, "a page that is shared tells no local path"


def test_the_page_of_a_finished_and_measured_run(run):
    add_measurements(run, chosen=10)
    (run / "dog <i>&.safetensors").write_bytes(b"")
    with pytest.raises(ValueError):  # a damaged adapter is told, not shown as an empty page
        write_run_report(run)
    (run / "dog <i>&.safetensors").unlink()
    text = write_run_report(run).read_text()
    page = Reader(text)
    assert "Chosen: step 10. the <best>" in page.text
    assert "step 10, chosen" in page.text and "checkpoints/step-000010/adapter.safetensors" in page.text
    assert "0.100 ± 0.100" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 5


def test_ids_of_charts_are_unique_in_a_page(run):
    add_measurements(run, chosen=20)
    ids = [attrs["id"] for _, attrs in Reader(write_run_report(run).read_text()).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_lost_photos_do_not_stop_the_page(run):
    shutil.rmtree(run.parent / "photos")
    assert "can no longer be read" in write_run_report(run).read_text()


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no config.yaml"):
        write_run_report(tmp_path)


@pytest.mark.parametrize(
    "chart",
    [
        lambda: line_chart("a & b", [Line("x", [1, 2], [3, 4]), Line("<y>", [1, 2], [1, 1], points=True)], mark_x=1),
        lambda: bar_chart("bars", ["a", "<b>"], [0.5, 0.7], [(0.1, 0.1), (0, 0.2)]),
        lambda: heat_map("heat", ["r"], ["c", "d"], [[1.0, float("nan")]]),
    ],
)
def test_charts_follow_the_page(chart):
    svg = chart()
    assert svg.startswith("<svg") and "currentColor" in svg and "<metadata" not in svg
    opening = svg[: svg.index(">")]
    assert "viewBox" in opening and not re.search(r'\s(width|height)="', opening)
    assert chart() == svg, "the same numbers give the same chart"


def test_contact_sheet_draws_every_picture_and_label(tmp_path):
    red, blue = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    path = contact_sheet(
        [("first", [red, blue]), ("zwölf Äpfel", [blue])], tmp_path / "sheet.png", cell=60, columns=["a"]
    )
    sheet = np.asarray(Image.open(path).convert("RGB"))
    assert (sheet == (255, 0, 0)).all(-1).sum() == 60 * 40
    assert (sheet == (0, 0, 255)).all(-1).sum() == 2 * 60 * 40
    plain = np.asarray(Image.open(contact_sheet([("", [red, blue]), ("", [blue])], tmp_path / "p.png", cell=60)))
    assert sheet.shape[0] > plain.shape[0], "labels take room"


def test_contact_sheet_of_nothing_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([("empty", [])], tmp_path / "sheet.png")


def screenshot(page, out, *options):
    """Chromium's picture of a page, and what it said on its console."""
    home = out.parent / f"{out.stem}-profile"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--user-data-dir={home}", f"--screenshot={out}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Image.open(out).convert("RGB"), console


if CHROMIUM:  # scripts/test.sh says so where it is missing

    def test_chromium_shows_the_page_light_dark_and_on_a_phone(run):
        add_measurements(run, chosen=20)
        page = run.parent / "page.html"
        shutil.copy(write_run_report(run), page)
        shots = {}
        for name, options in {
            "light": ["--window-size=1100,2400"],
            "dark": ["--window-size=1100,2400", "--blink-settings=preferredColorScheme=0"],
            "phone": ["--window-size=500,2400"],
        }.items():
            shot, console = screenshot(page, run.parent / f"{name}.png", *options)
            assert console == []
            shots[name] = np.asarray(shot).astype(int)
            assert len(np.unique(shots[name].reshape(-1, 3), axis=0)) > 1000, "pictures are drawn"
        assert shots["light"][5, 5].min() > 200 and shots["dark"][5, 5].max() < 60
        drawn = np.asarray(Image.open(run / "samples" / "step-000020" / "00-0.png").convert("RGB")).reshape(-1, 3)
        colours = {tuple(colour) for colour in shots["light"].reshape(-1, 3)}
        assert sum(tuple(int(v) for v in colour) in colours for colour in drawn[::37]) > 60, "a sample's own colours"


def test_the_plot_of_a_run_shows_loss_and_rate_and_leaves_matplotlib_alone(run):
    """Its pixels have the colours of the loss, the held-out loss and the rate; pyplot is never imported for it."""
    code = (
        "import sys, matplotlib; before = dict(matplotlib.rcParams);"
        "from diffusekrona_train.training.curves import write_loss_plot; write_loss_plot(sys.argv[1]);"
        "print(before == dict(matplotlib.rcParams), 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr
    with Image.open(run / "loss.png") as image:
        assert image.size == (960, 600)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height = []
    for colour in ((0x3B, 0x82, 0xF6), (0xE8, 0x83, 0x3A), (0x22, 0xA0, 0x6B)):
        rows = np.nonzero((abs(pixels - colour).sum(-1) < 12).sum(1))[0]
        assert len(rows), f"no line of colour {colour}"
        height.append(rows.mean())
    assert max(height[:2]) < height[2], "the learning rate is below the loss"
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": None, "lr": 1.0}))
    (run / "loss.png").unlink()
    assert write_loss_plot(run) is None and not (run / "loss.png").exists()
