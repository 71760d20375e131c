"""The measurements' machinery, on the CPU: random pipelines, a point of measure.sh, rows that are taken up again."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona_train.models import family_named, open_model
from diffusekrona_train.training import memory, train
from scripts.bench import __main__ as first
from scripts.bench import peers, setting
from scripts.bench.__main__ import chosen
from scripts.bench.contender import Bench
from scripts.bench.kernels import Kernels
from scripts.bench.run import WATCHED, Watch, cap_memory, watching
from scripts.bench.setting import BEGIN, END, Broken, Rows, Setting, TimeIsUp, shown, write_markdown
from tests.runs import make_run
from tests.tiny import make_unet, real_part, write_pipeline
from tests.tiny.__main__ import make
from tests.tiny.photos import draw_photos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The pipeline that the script makes, in a folder with photos."""
    folder = tmp_path_factory.mktemp("small")
    make("small-sd15", folder / "model")
    draw_photos(folder / "photos")
    return folder


def test_a_random_pipeline_trains_and_every_phase_is_watched(small, tmp_path):
    run = {
        "train": {"steps": 2, "batch_size": 1},
        "validation": {"every": 2, "steps": 1},
        "adapter": {"a1": 4, "a2": 64},
    }
    with watching(time.perf_counter()) as watch:
        path = train(make_run(small, tmp_path / "run", **run)).file
    assert path.stat().st_size > 0
    phases = {phase for _, _, phase in WATCHED} | {"first step", "steps"}
    assert phases <= watch.summary()["seconds"].keys() and watch.level == "plain"
    assert all(watch.calls[phase] >= 1 for phase in phases)


def test_a_random_pipeline_is_diffusers_own(small):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(small / "model")
    assert pipe.safety_checker is None and pipe.unet.config.block_out_channels[0] == 64


def test_parts_of_real_size_are_made_in_the_type_asked_for(tmp_path):
    """With the published config cut to a narrow UNet, as the whole would take gigabytes."""
    narrow = {"block_out_channels": [32, 64, 64, 64]}
    parts = {
        "unet": lambda: real_part("sd15", "unet", **narrow),
        "tokenizer": lambda: real_part("sd15", "tokenizer"),
        "scheduler": lambda: real_part("sd15", "scheduler"),
    }
    write_pipeline("sd15", tmp_path, parts, dtype="bfloat16")
    source = open_model(str(tmp_path))
    unet = source.place.load_part("unet", type(parts["unet"]()), torch_dtype=torch.bfloat16)
    assert unet.dtype == torch.bfloat16 and all(parameter.isfinite().all() for parameter in unet.parameters())
    assert len(source.load("tokenizers")["tokenizers"][0]) == 49408
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.full
def test_measure_writes_rows_with_card_versions_and_date(tmp_path):
    command = [
        "bash", "scripts/gpu/measure.sh", "--size", "small", "--only", "1", "--out", str(tmp_path), "--minutes", "5"
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads((tmp_path / "results.json").read_text())
    assert set(data) == {"date", "card", "versions", "rows"} and data["versions"]["torch"] == torch.__version__
    names = {row["what"].split(": ")[1]: row for row in data["rows"]}
    for name in ("frozen layer", "LoRA rank 4", "KronA (4, 64)", "PEFT LoKr (factor 8)"):
        assert names[name]["values"]["ms"] > 0 and f"eager: {name}" in done.stdout
    assert names["frozen layer"]["values"]["x the frozen layer"] == 1.0
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert json.loads((tmp_path / "results.json").read_text()) == data, again.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("only", ["8", "layers", ""])
def test_unknown_points_are_refused(only, capsys):
    with pytest.raises(SystemExit) as refused:
        chosen(only)
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert told == f"error: --only: {only!r} should be some of 1, 2, 3, 4, 5, 6, 7, with commas\n"
    assert chosen("7, 1") == [7, 1]


# ---- the first minutes -----------------------------------------------------------------------------------------------


def asked(tmp_path: Path, minutes: float) -> argparse.Namespace:
    results = tmp_path / "results.json"
    return argparse.Namespace(size="small", out=tmp_path, results=results, minutes=minutes, diffusers_script=None)


def test_without_time_every_piece_is_named_and_none_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(first, "in_a_process", lambda *_: pytest.fail("begun"))
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert first.conduct_pieces(asked(tmp_path, 0.1)) == list(first.PIECES)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == len(first.PIECES) and all(row["error"].startswith("not begun: ") for row in rows)


def test_the_flow_model_is_trained_further_from_packed_sprites_alone(tmp_path, monkeypatch):
    """The command that flow.py gets; tests/test_toybox_flow.py trains with it."""
    rows, asked_for = Rows(tmp_path / "results.json", judging=False), []
    place = Setting("small", tmp_path, rows)
    monkeypatch.setattr(first, "SPRITES", tmp_path / "sprites.npz")
    first.further(place)
    assert rows.rows == [], "no sprites were packed"

    def told(command: list[str], result: Path) -> dict:
        asked_for.append(command)
        Path(command[2]).write_bytes(b"weights")
        return {"steps": 2, "s": 1.0, "loss before": 0.2, "loss after": 0.1}

    (tmp_path / "sprites.npz").write_bytes(b"")
    monkeypatch.setenv(setting.UNTIL, str(time.time() + 100))
    monkeypatch.setattr(first, "run_json", told)
    first.further(place)
    (command,) = asked_for
    given = dict(zip(command[3::2], command[4::2], strict=True))
    assert command[2] == str(tmp_path / "toybox-flow.safetensors") and given["--sprites"].endswith("sprites.npz")
    assert 80 < float(given["--seconds"]) < 91 and rows.rows[0]["values"]["ms a step"] == 500


@pytest.mark.parametrize(
    ("statuses", "done", "error"),
    [
        ([0], True, None),
        ([first.BROKEN, first.BROKEN, 0], True, None),
        ([first.OUT_OF_TIME], False, None),
        ([1], False, "exit status 1"),
        ([124], False, "stopped: the time is up"),
    ],
)
def test_a_piece_is_begun_again_only_after_an_error_of_the_device(statuses, done, error, tmp_path, monkeypatch):
    left = list(statuses)
    monkeypatch.setattr(first, "in_a_process", lambda *_: (left.pop(0), "what it said last"))
    assert first.finished("b", asked(tmp_path, 9), time.time() + 600) is done and not left
    rows = Rows(tmp_path / "results.json").rows
    assert [(row["error"], row["stderr"]) for row in rows] == ([(error, "what it said last")] if error else [])


def test_a_piece_that_hangs_is_ended_with_all_that_it_has_started(tmp_path):
    code = "import subprocess, sys; made = subprocess.Popen(['sleep', '300']);"
    code += "print(made.pid, file=sys.stderr, flush=True); made.wait()"
    status, said = first.in_a_process([sys.executable, "-c", code], tmp_path / "log", 1.5)
    assert status == 124
    state, deadline = Path(f"/proc/{said.strip()}/stat"), time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] != "Z":  # a busy machine takes a while to end it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_stand_in_for_torchvision_prepares_a_photo_as_diffusers_script_asks(monkeypatch):
    """Against slices of the pixels: a 21 x 12 photo, its shorter side to 10 pixels, the square in the middle."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peers.stand_in_for_torchvision()
    transforms, functional = (sys.modules[name] for name in names[1:])
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 21, 3), dtype=np.uint8))
    small = transforms.Resize(10, interpolation=transforms.InterpolationMode.LANCZOS)(photo)
    assert small.size == (17, 10)  # int(10 * 21 / 12)
    middle = transforms.CenterCrop(10)(small)
    wanted = np.asarray(photo.resize((17, 10), Image.Resampling.LANCZOS))[:, 4:14]  # round(3.5), to the even number
    assert np.array_equal(np.asarray(middle), wanted)
    tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(middle)
    assert np.allclose(tensor.numpy(), wanted.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    y, x, _, _ = transforms.RandomCrop(10).get_params(small, (10, 10))
    assert y == 0 and 0 <= x <= 7
    assert np.array_equal(np.asarray(functional.crop(small, 0, 2, 10, 10)), np.asarray(small)[:, 2:12])


# ---- rows ----------------------------------------------------------------------------------------------------------


def fail():
    raise ValueError("no such\nthing")


def test_rows_are_kept_at_once_and_only_what_failed_is_measured_again(tmp_path):
    rows = Rows(tmp_path / "results.json")
    assert rows.attempt(2, "a", lambda: {"ms": 1.25}, ("at most 1", lambda values: values["ms"] <= 1)) == {"ms": 1.25}
    assert rows.attempt(1, "b", fail) is None
    again = Rows(tmp_path / "results.json")
    assert [(row["point"], row["what"]) for row in again.rows] == [(1, "b"), (2, "a")]
    assert again.rows[0]["error"] == "no such" and again.rows[1]["met"] is False
    assert again.attempt(2, "a", fail) == {"ms": 1.25}
    assert again.attempt(1, "b", lambda: {"ms": 2}) == {"ms": 2} and len(again.rows) == 2


def test_no_row_is_begun_after_the_time(tmp_path):
    rows = Rows(tmp_path / "results.json", until=time.time() - 1)
    with pytest.raises(TimeIsUp):
        rows.attempt(1, "a", lambda: {"ms": 1})
    assert not (tmp_path / "results.json").exists()


def test_a_row_that_does_not_fit_the_time_left_is_not_begun(tmp_path):
    rows = Rows(tmp_path / "results.json", until=time.time() + 50)
    with pytest.raises(TimeIsUp):
        rows.attempt(1, "long", lambda: {"ms": 1}, needs=60)
    assert rows.attempt(1, "short", lambda: {"ms": 1}, needs=40) == {"ms": 1}


def test_after_an_error_of_the_device_the_process_gives_up_and_the_next_one_passes_the_row_over(tmp_path):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows = Rows(tmp_path / "results.json")
    with pytest.raises(Broken):
        rows.attempt(2, "a", broken)
    assert "illegal memory access" in rows.rows[0]["error"] and "in broken" in rows.rows[0]["stderr"]
    after = Rows(tmp_path / "results.json", again=False)
    assert after.attempt(2, "a", broken) is None and after.attempt(2, "b", lambda: {"ms": 1}) == {"ms": 1}


def test_a_dry_run_judges_nothing(tmp_path):
    rows = Rows(tmp_path / "results.json", judging=False)
    rows.conclude(1, "a", {"ms": 1}, ("at most 1", lambda values: True))
    assert "goal" not in rows.rows[0]


def test_values_are_shown_with_three_digits_and_hidden_ones_not_at_all():
    values = {"ms": 1234.567, "x": 0.98765, "level": "nf4", "GiB": None, "_norms": [1, 2]}
    assert shown({"values": values}) == "1,235 ms, 0.988 x, level: nf4"
    assert shown({"values": {}, "error": "no GPU"}) == "not measured: no GPU"


def test_the_table_lands_between_the_marks_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    about = {"card": "A card", "date": "today", "versions": {"torch": "2.11.0"}}
    row = {"point": 1, "what": "a | b", "values": {"ms": 1.5}, "goal": "at most 1 ms", "met": False}
    for _ in range(2):  # a second time takes the first one's place
        write_markdown(page, {**about, "rows": [row]}, {1: "Layers"})
    text = page.read_text(encoding="utf-8")
    assert "Not measured yet." not in text and text.count("### 1. Layers") == 1
    assert re.search(r"\| a \\\| b \| 1.5 ms \| at most 1 ms: NO \|", text)
    assert text.startswith("# Speed and memory") and text.count(BEGIN) == text.count(END) == 1
    page.write_text("nothing")
    with pytest.raises(ValueError, match="measured: begin"):
        write_markdown(page, {**about, "rows": []}, {})


def test_a_watch_gives_each_phase_its_own_time():
    now = [100.0]

    class Room:
        @staticmethod
        def outer():
            now[0] += 2
            Room.inner()
            now[0] += 3

        @staticmethod
        def inner():
            now[0] += 10

    watch = Watch(now[0] - 7, clock=lambda: now[0])
    watch.around(Room, "outer", "set-up")
    watch.around(Room, "inner", "load")
    watch.enter("other")
    Room.outer()
    now[0] += 1
    Room.inner()
    assert watch.summary()["seconds"] == {"import": 7, "set-up": 5, "load": 20, "other": 1}
    assert watch.calls["load"] == 2


def test_a_card_that_is_played_leaves_room_for_driver_and_desktop(monkeypatch):
    given: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", torch.cuda.mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * 2**30)
    cap_memory(8, blind=False)
    assert given == [pytest.approx(7.2 / 80)]
    assert torch.cuda.mem_get_info()[0] == pytest.approx(5.2 * 2**30)


def test_a_model_that_cannot_be_made_is_tried_once(tmp_path, monkeypatch):
    tried = []

    def fails(command):
        tried.append(command)
        raise setting.Failed("no space left on device")

    monkeypatch.setattr(setting, "run", fails)
    monkeypatch.setattr(setting, "BROKEN", {})
    place = SimpleNamespace(out=tmp_path, small=True, device="cpu")
    for _ in range(3):
        with pytest.raises(setting.Failed, match="no space"):
            setting.Setting.model(place, "sdxl")  # type: ignore[arg-type]
    assert len(tried) == 1 and not list((tmp_path / "models").glob("*-broken-*"))


def test_the_bare_pass_goes_back_as_far_as_the_adapters_do():
    convolutions = {}
    for adapter in (None, {"a1": 4, "a2": 4}):
        contender = Bench(make_unet("sdxl").requires_grad_(False), 64, 1).contender(adapter)
        with Kernels() as counted:
            contender.passes(*contender.objective.batches(0, 0))
        convolutions[adapter is None] = counted.found["convolution_backward"]
    whole = sum(type(module) is torch.nn.Conv2d for module in contender.objective.denoiser.modules())
    assert convolutions[True] == convolutions[False] < whole


# ---- what is carried -----------------------------------------------------------------------------------------------


def test_every_carried_wheel_has_a_tested_version():
    command = ["bash", "scripts/gpu/carry.sh", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**environment(), "WITHOUT": ""})
    assert done.returncode == 0, done.stderr
    listed = done.stdout.split()
    assert {"diffusers", "bitsandbytes", "transformers"} <= {line.split("==")[0] for line in listed}
    assert set(listed) <= set((ROOT / "constraints.txt").read_text().split())


# ---- memory counted without a GPU ----------------------------------------------------------------------------------


def test_living_tensors_are_counted_at_their_peak():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from scripts.bench.trace import Peak, storages

    with FakeTensorMode():
        layer = torch.nn.Linear(1024, 1024, bias=False)
        with Peak(storages(layer)) as peak, torch.no_grad():
            x = torch.empty(1024, 1024)
            for _ in range(5):
                x = layer(x)  # two at a time
    assert peak.most == 2 * 4 * 1024**2


def test_the_estimates_leave_room_over_what_is_counted(monkeypatch):
    """SD 1.5 at 512 needs a quarter of a megapixel's figure beside its weights."""
    from scripts.bench import trace

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", trace.fused_attention)
    monkeypatch.setattr(trace.Fp32Module, "_apply", trace.stay)
    base, more = trace.step_peak("sd15", 512, 1, checkpointing=True)
    assert base == pytest.approx(859_520_964 * 2 / memory.GIB, abs=0.01)
    assert 0.1 < more < family_named("sd").memory.checkpointing / 4


# ---- kernels counted without a GPU ----------------------------------------------------------------------------------


def few(kind: str, names: tuple[str, ...]) -> dict[str, int]:
    from scripts.bench.kernels import kernels

    found = {name: kernels(kind, name).total() for name in names}
    assert found["bare"] < found["krona_operator"] <= found["lora"]
    return found


def test_a_step_of_sdxl_launches_few_kernels():
    """Version 0.1 by the same count: 11,020 with LoRA, 13,820 with KronA."""
    sdxl = few("sdxl", ("bare", "lora", "krona", "krona_operator"))
    assert sdxl["lora"] <= sdxl["krona"] <= 5900 and sdxl["krona_operator"] <= 4700 and sdxl["lora"] <= 5700


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd15", "z-image"])
def test_a_step_of_other_models_launches_few_kernels(kind):
    found = few(kind, ("bare", "lora", "krona", "krona_operator"))
    assert found["lora"] <= found["krona"]
