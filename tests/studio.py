"""A studio for tests: the real command on a free port, runs made by hand, and a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona_train.config import dump_config, make_config
from diffusekrona_train.data import TOYBOX_SUBJECTS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POODLES = sorted((TOYBOX_SUBJECTS / "poodle").glob("*.png"))[:3]
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}


class Server:
    """krona-studio in a process of its own, which may be killed and started again at the same port."""

    def __init__(self, runs: Path):
        runs.parent.mkdir(parents=True, exist_ok=True)
        self.runs, self.port = runs, 0
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "diffusekrona_train.cli.studio", str(self.runs), "--no-open"]
        root = str(Path(__file__).resolve().parents[1])
        env = {**os.environ, "PYTHONPATH": root}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], stdout=subprocess.PIPE, text=True, env=env, cwd=self.runs.parent
        )
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", self.process.stdout.readline())
        assert found, "it prints its address"
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def end(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def running(runs: Path) -> Iterator[Server]:
    """A studio over `runs`, which is ended however the block ends."""
    server = Server(runs)
    try:
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def browsing(**options: Any) -> Iterator[Any]:
    """A page of a headless Chromium; what it complains of on its console is an error at the end."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=180_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(**options)
        page, said = context.new_page(), []
        page.set_default_timeout(180_000)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        yield page
        browser.close()
        lost = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "status of 40")
        assert not [
            text for text in said if not any(word in text for word in lost)
        ]  # a refusal, or the server was down


def drop(page: Any, files: list[Path]) -> None:
    """Drop files on the page as a hand does."""
    import base64

    given = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in files]
    script = """files => { const data = new DataTransfer();
        for (const [name, text] of files) data.items.add(
            new File([Uint8Array.from(atob(text), letter => letter.charCodeAt(0))], name, {type: 'image/png'}));
        return data; }"""
    page.wait_for_selector("#drop")
    page.wait_for_load_state()  # the page's script listens by then
    data = page.evaluate_handle(script, given)
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})


def violations(page: Any) -> list[str]:
    """What axe finds on the page that is serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    rows = [
        (one["id"], [node["html"] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    return [f"{name}: {nodes[:3]}" for name, nodes in rows]


def overflow(page: Any) -> int:
    """How many pixels the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def make_run(
    folder: Path, *, steps: int = 20, samples: tuple[int, ...] = (0, 10), ended: str = "", **train: Any
) -> Path:
    """A run folder as `train` leaves it after the last of `samples`, without an adapter."""
    tree = {
        "model": "toybox",
        "subject": {"images": "toybox:poodle", "class": "dog"},
        "train": {"steps": steps, **train},
        "validation": {"prompts": ["A [V] dog on the beach", "A [V] dog"], "every": 10},
        "output": str(folder),
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(make_config(tree)))
    for step in samples:
        add_sample(folder, step)
    now = time.time()
    phases = [("prepare", {}), ("train", {"start": 0, "steps": steps}), *([(ended, {})] if ended else [])]
    add_events(folder, *({"time": now, "event": "phase", "name": name, **more} for name, more in phases))
    lines = [{"step": step, "loss": 0.2, "lr": 1e-3, "images_per_s": 2.5, "time": step} for step in samples if step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def add_sample(folder: Path, step: int) -> None:
    place = folder / "samples" / f"step-{step:06d}"
    place.mkdir(parents=True)
    for number in (0, 1):
        Image.new("RGB", (64, 64), (10 * step % 255, 80, 90 * number)).save(place / f"{number:02d}-0.png")


def add_events(folder: Path, *events: dict[str, Any]) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))
