"""The studio in a real browser: Debian's Chromium through Playwright."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from diffusekrona_train.adapters.formats import load_adapter, read_adapter
from diffusekrona_train.config import load_config, make_config
from diffusekrona_train.models import open_model
from tests import studio
from tests.studio import DESKTOP, PHONE, POODLES, Server, browsing, drop, overflow, running, violations

pytestmark = pytest.mark.skipif(studio.CHROMIUM is None, reason="Chromium is not installed; scripts/test.sh says so")
full = pytest.mark.full
LOOKS = [
    (DESKTOP, "light"),
    (PHONE, "dark"),
    pytest.param(DESKTOP, "dark", marks=full),
    pytest.param(PHONE, "light", marks=full),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    runs = tmp_path_factory.mktemp("studio") / "runs"
    studio.make_run(runs / "owl", ended="finished", samples=(0, 10, 20))
    studio.make_run(runs / "cat", ended="interrupted")
    with running(runs) as server:
        yield server


@pytest.mark.parametrize(("size", "scheme"), LOOKS, ids=["desktop-light", "phone-dark", "desktop-dark", "phone-light"])
def test_every_page_is_accessible_and_fits_its_window(server, size, scheme):
    with browsing(**size, color_scheme=scheme) as page:
        for path in ("/", "/new", "/runs/owl", "/runs/owl/use", "/compare", "/runs/none"):
            page.goto(server.url + path)
            page.wait_for_timeout(150)
            assert violations(page) == [], path
            assert overflow(page) <= 0, path
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, dark[4:-1].split(","))) < 150) == (scheme == "dark")


def test_a_new_sample_appears_by_itself_and_sliders_move_with_keys(server):
    from playwright.sync_api import expect

    folder = server.runs / "cat"
    with browsing(**DESKTOP) as page:
        page.goto(server.url + "/runs/cat")
        page.evaluate("window.same = true")
        image = page.locator(".sample img").first
        expect(image).to_have_attribute("src", re.compile("/samples/10/1/0"))
        studio.add_sample(folder, 20)
        expect(image).to_have_attribute("src", re.compile("/samples/20/1/0"))
        assert page.evaluate("window.same"), "the page was not loaded again"
        page.locator(".sample input").first.focus()
        page.keyboard.press("Home")
        sources = page.locator(".sample img").evaluate_all("all => all.map(one => one.src)")
        assert ["/samples/0/1/0" in sources[0], "/samples/0/1/1" in sources[1]] == [True, True], "all move together"
        assert page.locator(".sample input").first.get_attribute("aria-valuetext") == "step 0"
        studio.add_sample(folder, 30)
        page.wait_for_timeout(1500)
        assert "/samples/0/1/0" in image.get_attribute("src"), "who looks at an older step is left there"


def test_photos_are_dropped_described_and_removed(server):
    from playwright.sync_api import expect

    text = server.runs.parent / "notes.png"
    text.write_text("not an image")
    with browsing(**DESKTOP) as page:
        page.goto(server.url + "/new")
        drop(page, [*POODLES, text])
        expect(page.locator(".photos li")).to_have_count(3)
        expect(page.locator("#wrong")).to_contain_text("notes.png: is not a photo")
        page.fill("[name=class]", "dog")
        page.fill("[name='caption:00.png']", "A [V] dog on wood")
        page.locator(".more > summary").click()
        page.locator(".group > summary", has=page.get_by_text("train", exact=True)).click()
        page.fill("[name='set:train.steps']", "12")
        expect(page.locator("#yaml")).to_contain_text("steps: 12")
        made = make_config(yaml.safe_load(page.locator("#yaml").inner_text()))
        assert (made.model, made.train.steps, made.subject.class_noun) == ("toybox", 12, "dog")
        page.fill("[name='set:train.steps']", "none")
        expect(page.locator("#problem")).to_contain_text("train.steps: 'none'")
        page.fill("[name='set:train.steps']", "12")
        expect(page.locator("#problem")).to_be_empty()
        page.reload()
        expect(page.locator("[name='caption:00.png']")).to_have_value("A [V] dog on wood")
        expect(page.locator("[name=class]")).to_have_value("dog")
        page.locator(".remove").first.click()
        expect(page.locator(".photos li")).to_have_count(2)
        assert violations(page) == []
    photos = server.runs / ".studio" / "new" / "photos"
    assert sorted(path.name for path in photos.iterdir()) == ["01.png", "02.png"], "the caption went with its photo"
    assert (photos / "01.png").read_bytes() == POODLES[1].read_bytes()


# ---- from photos to an adapter -------------------------------------------------------------------------------------

FIELDS = {
    "train.steps": "20",
    "train.checkpoint_every": "10",
    "train.log_every": "2",
    "validation.every": "10",
    "validation.steps": "2",
    "validation.prompts": '["A [V] {class}"]',
}


def shot(page, name: str) -> None:
    """A screenshot for those who look: KRONA_SHOTS names a folder."""
    if folder := os.environ.get("KRONA_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_from_three_photos_to_an_adapter_through_a_killed_server(tmp_path):
    with running(tmp_path / "runs") as server:
        train_use_and_download(server, tmp_path)


def train_use_and_download(server: Server, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    folder = server.runs / "dog"
    with browsing(**DESKTOP, accept_downloads=True) as page:
        page.goto(server.url)
        shot(page, "empty")
        page.locator(".empty .button").click()
        drop(page, POODLES)
        expect(page.locator(".photos li")).to_have_count(3)
        page.fill("[name=class]", "dog")
        page.locator(".more > summary").click()
        for section in ("train", "validation"):
            page.locator(".group > summary", has=page.get_by_text(section, exact=True)).click()
        for name, value in FIELDS.items():
            page.fill(f"[name='set:{name}']", value)
        expect(page.locator("#plan")).to_contain_text("20 steps")
        shot(page, "new")
        page.click("#start")
        expect(page.locator("h1")).to_have_text("dog")
        expect(page.locator("#state")).to_contain_text("Training")
        page.evaluate("window.same = true")
        image = page.locator(".sample img").first
        expect(image).to_have_attribute("src", re.compile("/samples/10/1/0"))
        assert page.evaluate("window.same"), "a new sample appears without loading the page again"
        page.get_by_role("button", name="Stop").click()
        page.reload()
        expect(page.locator("#state")).to_contain_text("Stopped")
        shot(page, "stopped")
        stopped = next(json.loads(line) for line in reversed((folder / "events.jsonl").read_text().splitlines()))
        assert stopped["name"] == "stopped" and 10 <= stopped["step"] < 20

        children = psutil.Process(server.process.pid).children(recursive=True)
        page.evaluate("window.same = true")
        server.end(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, "the worker ends with the server"
        server.start()
        page.get_by_role("button", name="Resume").click()
        expect(page.locator("#state")).to_contain_text("Finished")
        assert load_config(folder / "config.yaml").train.steps == 20
        kinds = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        starts = [event["start"] for event in kinds if event.get("name") == "train"]
        assert starts == [0, stopped["step"]], "it went on where it stopped"
        shot(page, "finished")

        strength = page.get_by_label("Strength").first
        strength.focus()
        page.keyboard.press("ArrowRight")
        expect(image).to_have_attribute("src", re.compile("/samples/20/1.25/0"))
        assert violations(page) == []

        page.get_by_role("link", name="Use it").click()
        page.fill("[name=prompt]", "A [V] dog in the snow")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#gallery figure")).to_have_count(2)
        base, adapted = page.locator("#gallery img").evaluate_all("all => all.map(one => one.src)")
        assert page.request.get(base).body() != page.request.get(adapted).body()
        shot(page, "use")
        files = {}
        for kind in ("Download the adapter", "Download as LoRA"):
            with page.expect_download() as started:
                page.get_by_role("link", name=kind).click()
            files[kind] = tmp_path / started.value.suggested_filename
            started.value.save_as(files[kind])
        comfy = tmp_path / "ComfyUI" / "models" / "loras"
        comfy.mkdir(parents=True)
        page.fill("[name=folder]", str(tmp_path / "ComfyUI"))
        page.get_by_role("button", name="Copy it there").click()
        expect(page.locator("#toast")).to_contain_text("dog.safetensors is in")
        assert violations(page) == []
    adapter, lora = files.values()
    assert (adapter.name, lora.name) == ("dog.safetensors", "dog-lora.safetensors")
    assert adapter.read_bytes() == (comfy / "dog.safetensors").read_bytes()
    check_files(adapter, lora)


def check_files(adapter: Path, lora: Path) -> None:
    """Both load into toybox, change its output, and by the same matrix: W + A ⊗ B, written out."""
    unets = []
    for file in (None, adapter, lora):
        unet = open_model("toybox").load_denoiser(torch.float32, torch.device("cpu"))
        if file is not None:
            load_adapter(unet, file)
        unets.append(unet)
    layer = read_adapter(adapter).layers[0].name
    group = read_adapter(adapter).groups[layer]
    x = torch.randn(3, unets[0].get_submodule(layer).in_features)
    plain, krona, low = (unet.get_submodule(layer)(x) for unet in unets)
    delta = torch.kron(group["lokr_w1"].float(), group["lokr_w2"].float())
    assert delta.abs().max() > 0
    torch.testing.assert_close(krona, plain + x @ delta.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low, krona, rtol=1e-4, atol=1e-5)
