"""The studio without a browser: what a run folder says, the queue, the draft, who may look, and the address."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from starlette.testclient import TestClient

from diffusekrona_train.app import guard, jobs
from diffusekrona_train.app.draft import Draft
from diffusekrona_train.app.server import begin_demo, make_app
from diffusekrona_train.app.use import gallery_of, lora_folder
from diffusekrona_train.app.worker import export_lora
from diffusekrona_train.config import MODEL_ALIASES, RunConfig, load_config, make_config
from diffusekrona_train.config.fields import groups_of, overrides_of
from diffusekrona_train.data import crop_pixels
from diffusekrona_train.training import status
from diffusekrona_train.training.check import check_briefly, fits
from diffusekrona_train.training.check.fits import model_fits, quick_fits
from tests.studio import POODLES, add_events, make_run

APP = Path(guard.__file__).parent


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def client(root):
    """A browser's requests, with the token of its forms; the clock and the worker do not run."""
    app, _ = make_app(root)
    return TestClient(app, base_url="http://127.0.0.1:7860", headers={"x-csrf": app.state.studio.csrf})


def photos(draft: Draft) -> Draft:
    for path in POODLES:
        draft.add(path.name, path.read_bytes())
    return draft


# ---- what a run folder says ----------------------------------------------------------------------------------------


def test_the_state_is_read_from_the_events_and_from_who_is_alive(root, monkeypatch):
    wanted = {"finished": "finished", "stopped": "stopped", "failed": "failed", "": "interrupted"}
    for ended, state in wanted.items():
        found = status.status_of(make_run(root / f"run-{ended}", ended=ended))
        assert (found.state, found.active) == (state, False)
    folder = make_run(root / "alive")
    (folder / ".lock").write_text(str(os.getpid()))
    assert status.status_of(folder).state == "running"
    later = time.time() + 3  # the process is younger than what the events say, as after a resume
    monkeypatch.setattr("psutil.Process.create_time", lambda self: later)
    assert status.status_of(folder).state == "starting"


def test_a_run_at_work_has_a_pace_and_a_past_one_has_not(root, monkeypatch):
    folder = make_run(root / "dog", steps=100)
    (folder / ".lock").write_text(str(os.getpid()))
    now = time.time()
    monkeypatch.setattr("psutil.Process.create_time", lambda self: now - 100)
    (folder / "events.jsonl").unlink()
    add_events(
        folder,
        {"time": now - 40, "event": "phase", "name": "train", "start": 20, "steps": 100},
        {"time": now, "event": "step", "step": 40},
    )
    found = status.status_of(folder)
    assert (found.state, found.step, found.steps) == ("running", 40, 100)
    assert found.seconds_left == pytest.approx(60 * 2, abs=2), "20 steps took 40 s, and 60 are left"
    assert "GB" in found.memory and found.images_per_s == 2.5
    (folder / "stop").touch()
    assert status.status_of(folder).state == "stopping"
    monkeypatch.setattr("psutil.Process.create_time", lambda self: now + 100)  # the number belongs to another by now
    assert (status.status_of(folder).state, status.status_of(folder).seconds_left) == ("interrupted", None)


def test_what_a_start_that_was_refused_printed_is_the_reason(root):
    folder = make_run(root / "dog", ended="stopped")
    (folder / "train.log").write_text("warning: hm\nerror: subject.images: none is not there\n")
    os.utime(folder / "events.jsonl", (1, 1))
    found = status.status_of(folder)
    assert (found.state, found.error) == ("failed", "subject.images: none is not there")


def test_warnings_in_words(root):
    folder = make_run(root / "dog")
    add_events(folder, {"time": 1, "event": "phase", "name": "prepare"}, {"time": 2, "event": "warning", "text": "hot"})
    held = [{"step": step, "validation_loss": loss} for step, loss in ((0, 0.3), (10, 0.1), (20, 0.2), (30, 0.21))]
    rows = [*held, {"step": 30, "loss": None, "lr": 1.0, "images_per_s": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "lo')
    lines = status.warnings_of(folder)
    assert lines[0] == "hot" and any("not a number" in line for line in lines)
    assert any("risen since step 10" in line for line in lines)
    assert [label for label, svg in status.charts_of(folder)] == ["Held-out loss, lowest at step 10"]


def test_scores_mark_the_best_checkpoint(root, client):
    folder = make_run(root / "dog", ended="finished")
    rows = [{"step": step, "scores": {"dino": {"value": step / 100}, "clip_t": {"value": 0.3}}} for step in (10, 20)]
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "best.json").write_text(json.dumps({"chosen_step": 20, "checkpoints": rows}))
    assert status.scores_of(folder) == [("DINO", [10, 20], [0.1, 0.2]), ("CLIP-T", [10, 20], [0.3, 0.3])]
    text = client.get("/runs/dog").text
    assert "DINO by step; the best is 20" in text and "<dd>step 20</dd>" in text
    table = client.get("/compare").text
    assert "<td>20</td><td>0.200</td><td>0.300</td>" in table


# ---- the queue -----------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """What would be started; a started run is at work while its file holds this process' number."""
    found = []

    def spawn(arguments, log, pid, env):
        found.append((log.parent.name, arguments))
        pid.write_text(str(os.getpid()))

    monkeypatch.setattr(jobs, "spawn", spawn)
    return found


def test_the_queue_is_files_and_goes_on_after_a_restart(root, started):
    for name in ("one", "two", "three"):
        make_run(root / name, ended="stopped")
        jobs.enqueue(root, name)
    jobs.enqueue(root, "two")
    assert jobs.waiting(root) == ["one", "two", "three"]
    jobs.leave_queue(root, "three")
    jobs.tick(root)
    jobs.tick(root)  # as a new server would: it knows folders only
    assert [name for name, _ in started] == ["one"] and jobs.waiting(root) == ["two"]
    (root / "one" / "train.pid").unlink()  # it has ended
    jobs.tick(root)
    assert [name for name, _ in started] == ["one", "two"] and jobs.waiting(root) == []
    arguments = started[0][1]
    assert "--resume" in arguments and str(root / "one" / "config.yaml") in arguments
    assert f'output="{root / "one"}"' in arguments, "also where the folder was moved"


def test_a_run_that_cannot_start_does_not_block_the_others(root, started):
    broken = make_run(root / "broken")
    (broken / "config.yaml").write_text("model: [")
    make_run(root / "fine")
    for name in ("broken", "gone", "fine"):
        jobs.enqueue(root, name)
    with pytest.raises(ValueError):
        jobs.tick(root)
    jobs.tick(root)
    jobs.tick(root)
    assert [name for name, _ in started] == ["fine"]


def test_stop_before_the_first_step_is_passed_on(root, monkeypatch):
    folder = make_run(root / "dog")
    (folder / "train.pid").write_text(str(os.getpid()))
    later = time.time() + 3
    monkeypatch.setattr("psutil.Process.create_time", lambda self: later)
    jobs.stop(folder)  # the events are from before this process began: it is not in its loop
    jobs.tick(root)
    assert not (folder / "stop").exists()
    monkeypatch.setattr("psutil.Process.create_time", lambda self: 1.0)
    jobs.tick(root)
    assert (folder / "stop").exists() and not (folder / jobs.STOP_LATER).exists()
    with pytest.raises(ValueError, match="is training"):
        jobs.delete(root, folder)


def test_a_process_outlives_the_one_that_started_it(tmp_path):
    code = (
        "from pathlib import Path; from diffusekrona_train.app import jobs; import os\n"
        "jobs.spawn(['timeit', '-n', '1', '-r', '1', '-s', 'import time', 'time.sleep(1); open(\"done\", \"w\")'],"
        " Path('log'), Path('pid'), dict(os.environ)); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(APP.parents[1])})
    deadline = time.monotonic() + 60
    while not (tmp_path / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "done").exists(), (tmp_path / "log").read_text()


# ---- a new subject -------------------------------------------------------------------------------------------------


def test_the_draft_becomes_a_run_that_the_command_line_trains_alike(root):
    draft = photos(Draft(root))
    draft.write_caption("00.png", "  A [V] dog\non wood ")
    draft.write_fields({"class": "dog", "token": "qzx", "model": "toybox", "set:train.steps": "7", "set:data.flip": ""})
    shown = draft.yaml()
    assert draft.begin() == "dog" and not draft.names()
    config = load_config(root / "dog" / "run.yaml")
    assert make_config(yaml.safe_load(shown)) == config
    assert (config.train.steps, config.subject.token, config.output) == (7, "qzx", str(root / "dog"))
    assert (root / "dog" / "photos" / "00.txt").read_text() == "A [V] dog on wood\n"
    for number, path in enumerate(POODLES):
        assert (root / "dog" / "photos" / f"0{number}.png").read_bytes() == path.read_bytes()
    photos(draft).write_fields({"class": "dog"})
    assert draft.begin() == "dog-2", "an earlier run is never written over"


def test_the_crop_on_the_page_is_the_crop_that_is_trained(root):
    draft, wide = Draft(root), Image.effect_noise((160, 80), 90).convert("RGB")
    wide.save(root / "wide.png")
    draft.add("wide.png", (root / "wide.png").read_bytes())
    config = make_config(draft.here())
    (photo,) = draft.photos(config)
    assert photo.box == "left:25.00%;top:0.00%;width:50.00%;height:100.00%"
    assert photo.about == "160 × 80, trained at 64 × 64: 50% kept"
    from diffusekrona_train.data import collect, plan_crops
    from diffusekrona_train.report.page import picture

    crop = plan_crops(collect(config).pictures, config.data, config.train.seed)[0][0]
    assert photo.trained.uri == picture(Image.fromarray(crop_pixels(crop)), "wide.png", side=120).uri


def test_the_advice_of_check(root):
    draft = Draft(root)
    flat = Image.new("RGB", (300, 300), "grey")
    flat.save(root / "a.png")
    for name in ("a.png", "b.png"):
        draft.add(name, (root / "a.png").read_bytes())
    lines = check_briefly(make_config(draft.here()))
    said = " ".join(lines["advice"])
    assert "near-duplicates" in said and "few:" in said and "blurred" in said
    assert lines["identifier"] == ["'sks': 1 token in each text encoder"] and "300 steps" in lines["plan"][0]


def test_every_field_of_the_schema_is_on_the_page_with_its_docstring(client, root):
    text = client.get("/new").text
    asked = {"subject": {"images", "files", "class", "token"}}
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key, one in (inner or {}).items():
            key = one.alias or key
            if key not in asked.get(name, ()) and f"{name}.{key}" not in DATA_SETS:
                assert f'name="set:{name}.{key}"' in text, f"{name}.{key}"
        assert inner or name in ("model", "output") or f'name="set:{name}"' in text
    assert "Optimiser steps between checkpoints." in text


DATA_SETS = {"subject.limit", "subject.split", "subject.image_column", "subject.caption_column", "subject.caption_key"}


def test_fields_become_the_tree_that_yaml_gives(root):
    typed = {
        "set:train.betas": "[0.9, 0.99]",
        "set:adapter.factors": "{q: [8, 64]}",
        "set:revision": "main",
        "class": "x",
    }
    assert overrides_of(typed) == yaml.safe_load(
        "train: {betas: [0.9, 0.99]}\nadapter: {factors: {q: [8, 64]}}\nrevision: main"
    )
    with pytest.raises(ValueError, match="train.betas"):
        overrides_of({"set:train.betas": "[0.9"})
    config = make_config({"model": "toybox", "subject": {"images": "toybox:poodle", "class": "dog"}, "output": "x"})
    shown = {field.key: field.default for group in groups_of(config) for field in group.fields}
    assert (shown["data.resolution"], shown["train.batch_size"], shown["adapter.alpha"]) == ("64", "4", "")


def test_what_fits_comes_first_and_the_embedded_models_always(monkeypatch, client):
    assert [one.alias for one in quick_fits()][:2] == ["toybox", "toybox-flow"]
    known = ("sdxl", "sd15", "toybox")  # the others need diffusers to be counted
    monkeypatch.setattr(fits, "MODEL_ALIASES", {name: MODEL_ALIASES[name] for name in known})
    assert [(one.alias, one.fits) for one in model_fits(None)] == [("toybox", True), ("sdxl", False), ("sd15", False)]
    assert [(one.alias, one.fits) for one in model_fits(24.0)] == [("sdxl", True), ("sd15", True), ("toybox", True)]
    assert [(one.alias, one.fits) for one in model_fits(2.5)] == [("sd15", True), ("toybox", True), ("sdxl", False)]
    monkeypatch.undo()
    text = client.get("/new").text
    assert all(f'value="{name}"' in text for name in MODEL_ALIASES)
    before = text.split("more models</summary>")[0]
    assert 'value="toybox"' in before and 'value="toybox-flow"' in before and before.count('type="radio"') < 8


def test_the_demo_is_queued_once(root, started):
    assert begin_demo(root) == begin_demo(root) == "/runs/poodle"
    assert jobs.waiting(root) == ["poodle"] and load_config(root / "poodle" / "run.yaml").model == "toybox"


# ---- using it ------------------------------------------------------------------------------------------------------


def test_the_gallery_has_the_base_first_and_the_newest_prompt_on_top(root):
    place = make_run(root / "dog") / "pictures"
    place.mkdir()
    rows = [("old", 1.0), ("old", None), ("new", 0.5)]
    for number, (prompt, scale) in enumerate(rows):
        (place / f"{number}.png").write_bytes(b"x")
        os.utime(place / f"{number}.png", (number + 1, number + 1))
        used = [] if scale is None else [{"file": "dog.safetensors", "strength": 1.0}]
        row = {"file": f"{number}.png", "prompt": prompt, "seed": 0, "scale": scale, "adapters": used}
        with (place / "manifest.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    found = gallery_of(root / "dog")
    assert [group["prompt"] for group in found] == ["new", "old"]
    assert [image["label"] for image in found[1]["images"]] == ["base model", "strength 1"]
    assert found[0]["images"][0]["label"] == "strength 0.5"


def test_the_lora_of_the_page_is_exact(root):
    from diffusekrona_train.adapters.formats import open_adapter, read_adapter, save_adapter
    from diffusekrona_train.adapters.inject import inject
    from diffusekrona_train.models import open_model

    source = open_model("toybox")
    unet = source.load_denoiser(torch.float32, torch.device("cpu"))
    injection = inject(
        unet,
        make_config({"model": "toybox", "subject": {"images": "toybox:poodle", "class": "d"}, "output": "x"}).adapter,
    )
    for adapter in injection.adapters.values():
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
    save_adapter(root / "a.safetensors", injection, {"model": "toybox", "family": "sdxl"})
    export_lora(root / "a.safetensors", root / "b.safetensors")
    krona, lora = read_adapter(root / "a.safetensors"), open_adapter(root / "b.safetensors", "toybox")
    name = krona.layers[-1].name
    group = krona.groups[name]
    wanted = torch.kron(group["lokr_w1"], group["lokr_w2"])
    up, down, alpha = (lora.groups[name][key] for key in ("lora_up.weight", "lora_down.weight", "alpha"))
    torch.testing.assert_close(up @ down * alpha / up.shape[1], wanted, rtol=1e-4, atol=1e-4)


def test_adapters_are_copied_where_comfyui_and_forge_look(tmp_path):
    for inner in ("a/models/loras", "b/models/Lora", "c/Lora"):
        (tmp_path / inner).mkdir(parents=True)
    assert lora_folder(str(tmp_path / "a")) == tmp_path / "a/models/loras"
    assert lora_folder(str(tmp_path / "b")) == tmp_path / "b/models/Lora"
    assert lora_folder(str(tmp_path / "c" / "Lora")) == tmp_path / "c/Lora"
    for wrong in (tmp_path, Path("a"), tmp_path / "none", ""):
        with pytest.raises(ValueError, match="ComfyUI"):
            lora_folder(str(wrong))


def test_delete_asks_and_then_removes(root, client):
    folder = make_run(root / "dog", ended="finished")
    assert "Yes, delete dog" in client.get("/runs/dog").text
    assert client.post("/runs/dog/do/delete", data={"sure": "cat"}).status_code == 400 and folder.exists()
    assert client.post("/runs/dog/do/delete", data={"sure": "dog"}).json() == {"to": "/"}
    assert not folder.exists() and client.get("/runs/dog").status_code == 404


# ---- who may look --------------------------------------------------------------------------------------------------


def test_an_upload_touches_no_disk_before_it_was_looked_at(client, root, monkeypatch):
    """Every file that is opened to be written while a 3 MB upload that is no photo is refused."""
    written = []

    def hook(event, arguments):
        opens = event == "open" and isinstance(arguments[1], str) and set("wax") & set(arguments[1])
        if opens or event in ("tempfile.mkstemp", "tempfile.mkdtemp"):
            written.append(arguments[0])

    hooks = [hook]
    sys.addaudithook(lambda event, arguments: [one(event, arguments) for one in hooks])
    answer = client.post("/new/photos", files=[("photos", ("a.png", b"no photo" * 400_000))])
    hooks.clear()
    assert answer.status_code == 400 and "is not a photo" in answer.json()["error"]
    assert written == []


def test_tokens_are_compared_in_constant_time_and_kept_from_others(root, monkeypatch):
    app, token = make_app(root, "0.0.0.0")
    secret = root / ".studio" / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert token == hmac.new(secret.read_bytes(), b"access", hashlib.sha256).hexdigest()[:32]
    asked, compare = [], hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: asked.append((a, b)) or compare(a, b))
    client = TestClient(app, base_url="http://192.168.0.9:7860")
    assert client.get("/").status_code == 401 and client.get("/?token=no").status_code == 401
    assert {b"", b"no"} <= {given for given, _ in asked} and {wanted for _, wanted in asked} == {token.encode()}
    first = client.get(f"/?token={token}", follow_redirects=False)
    assert first.headers["location"] == "/", "the token leaves the address"
    assert "HttpOnly" in first.headers["set-cookie"] and "SameSite=strict" in first.headers["set-cookie"]
    assert client.get("/").status_code == 200
    assert make_app(root, "0.0.0.0")[1] == token, "a bookmark still works after a restart"
    assert make_app(root, "127.0.0.1")[1] is make_app(root, "::1")[1] is None


def test_pages_forbid_foreign_scripts_and_frames(client):
    for path in ("/", "/runs/none", "/static/studio.js"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_nothing_is_fetched_from_elsewhere():
    for path in APP.rglob("*.*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text()
            assert "//" not in text.replace("// ", "").replace("http://www.w3.org/", ""), path.name
            assert "@import" not in text and "innerHTML = answer" not in text


def test_names_and_captions_are_text_on_the_page(root, client):
    make_run(root / "<b>x", ended="finished")
    assert "<b>x" not in client.get("/").text and "&lt;b&gt;x" in client.get("/").text
    assert "<b>x" not in client.get("/runs/%3Cb%3Ex").text
    config = root / "<b>x" / "config.yaml"
    config.write_text(config.read_text().replace("A [V] dog\n", "A [V] </script><i>dog</i>\n"))
    text = client.get("/runs/%3Cb%3Ex").text
    assert "<i>" not in text
    inline = text.split('id="samples" data-live>')[1].split("</script>")[0]
    assert json.loads(inline)["prompts"][1]["prompt"] == "A sks </script><i>dog</i>"


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
        command = [sys.executable, "-m", "diffusekrona_train.cli.studio", "--no-open", "--port", port]
        env = {**os.environ, "PYTHONPATH": str(APP.parents[1])}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: --port {port} is in use; is a studio running already? Choose another with --port\n"
    assert list(tmp_path.iterdir()) == [], "nothing was made"
