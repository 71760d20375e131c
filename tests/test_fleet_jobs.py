"""What jobs may say, what is done once, and what one bad job costs: a line in failed.jsonl."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusekrona_train.common.progress import Progress
from diffusekrona_train.fleet import train_all
from diffusekrona_train.fleet.call import Call
from diffusekrona_train.fleet.jobs import JobError, common_tree, make_job
from diffusekrona_train.fleet.photos import fetch
from diffusekrona_train.fleet.seats import SharedSource
from diffusekrona_train.fleet.stream import Stream
from diffusekrona_train.models import open_model
from tests import fleets
from tests.runs import factors, finish, make_world, same_factors, start
from tests.tiny.photos import draw_photos

TINY = {"blocks": ["mid_block*"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def quick(world, **sections):
    """Return common settings under which a job takes two steps of a few layers."""
    tree = fleets.common(world, {**fleets.KRONA, **TINY}, **sections)
    return {**tree, "train": {**tree["train"], "steps": 2, "checkpoint_every": 1}}


def job(world, name: str, **more):
    return {"id": name, "images": str(world / "photos"), "class": "dog", **more}


def failed(output) -> dict[str, str]:
    path = output / "failed.jsonl"
    return {line["id"]: line["reason"] for line in map(json.loads, path.open())} if path.exists() else {}


BAD = [
    ({"id": "x/y"}, "x/y", "id: 'x/y' should be a file name"),
    ({"id": "CON.txt"}, "CON.txt", "should be a file name"),
    ({"id": ".hidden"}, ".hidden", "should be a file name"),
    ({"id": "cache"}, "cache", "should be a file name"),
    ({"id": 7}, "line 1", "id: 7 should be a text"),
    ({"id": None}, "line 1", "id is missing"),
    ({"model": "sdxl"}, "a", "model: is common to all jobs of a call; set it with --set or --config"),
    ({"adapter": {"a1": 8}}, "a", "adapter.a1: is common to all jobs"),
    ({"data.resolution": 128}, "a", "data.resolution: is common to all jobs"),
    ({"output": "elsewhere"}, "a", "output: is common to all jobs"),
    ({"steps": "many"}, "a", "train.steps: 'many' should be"),
    ({"train": {"stepz": 3}}, "a", "train.stepz is not a known key"),
    ({"stepz": 3}, "a", "'stepz' is not a field of a job; did you mean steps?"),
    ({"images": None}, "a", "images is missing"),
]


@pytest.mark.parametrize(("more", "name", "reason"), BAD)
def test_a_wrong_field_is_named(more, name, reason):
    row = {"id": "a", "images": "photos", "class": "dog", **more}
    with pytest.raises(JobError) as raised:
        make_job(row, common_tree("toybox", None, []), 1)
    assert raised.value.id == name
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_a_job_may_set_what_is_its_own():
    row = {"id": "a", "images": "p", "class": "cat", "token": "xyz", "steps": 7, "train.loss": "huber", "seed": 4}
    row |= {"prior": {"kind": "teacher"}, "subject": {"limit": 2}}
    made = make_job(row, common_tree("toybox", {"train": {"steps": 3, "batch_size": 2}}, ["adapter.a2=8"]), 1)
    config = made.config("runs/a")
    assert (config.subject.token, config.subject.limit, config.train.steps, config.train.loss) == ("xyz", 2, 7, "huber")
    assert (config.train.seed, config.train.batch_size, config.adapter.a2, config.prior.kind) == (4, 2, 8, "teacher")


def test_bad_jobs_cost_a_line_and_good_ones_go_on(world, tmp_path):
    jobs = [
        job(world, "good"),
        job(world, "nowhere", images=str(world / "nowhere")),
        job(world, "broken", images=str(tmp_path / "broken")),
        job(world, "good"),  # twice the same: trained once
        job(world, "GOOD"),
        job(world, "good", steps=3),  # twice the id, another job
        {"images": "x", "class": "dog"},
    ]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"not an image")
    heard = []
    progress = Progress(lambda event, fields: heard.append((event, fields)))
    output = tmp_path / "out"
    call = Call(common_tree(None, quick(world), ()), str(output), pack=2, dollars_an_hour=3.0)
    from diffusekrona_train.fleet.service import Rows

    ends = [(done.id, done.end) for done in train_all(call, Rows(iter(jobs)), progress)]
    assert sorted(ends) == [
        ("GOOD", "failed"), ("broken", "failed"), ("good", "failed"), ("good", "skipped"), ("good", "trained"),
        ("line 7", "failed"), ("nowhere", "failed"),
    ]  # fmt: skip
    reasons = failed(output)
    assert "nowhere is not there" in reasons["nowhere"]
    assert "0.png" in reasons["broken"]
    assert "differ in upper and lower case" in reasons["GOOD"]
    assert "good is used twice" in reasons["good"]
    assert (output / "good" / "good.safetensors").is_file() and not (output / "good" / "resume").exists()
    assert not (output / "nowhere" / "config.yaml").exists()
    started = [fields for event, fields in heard if event == "job" and fields["state"] == "started"]
    assert [fields["job"] for fields in started] == ["good"]
    page = (output / "fleet.html").read_text()
    assert "data:image/png" in page and "nowhere is not there" in page and "$0.0" in page
    lines = [json.loads(line) for line in (output / "events.jsonl").open()]
    assert {"job", "pack", "saved", "loss"} <= {line["event"] for line in lines}


def test_done_is_skipped_and_another_job_under_its_id_is_refused(world, tmp_path):
    output, one = tmp_path / "out", job(world, "one")
    tree = quick(world)
    fleets.trained([one], output, world, config=tree)
    first, mark = factors(output / "one"), (output / "one" / "one.safetensors").stat().st_mtime_ns
    moved = shutil.copytree(world / "photos", tmp_path / "moved")  # the same photos elsewhere, another pack, other logs
    other_place = {**one, "images": str(moved), "train.log_every": 5, "validation": {"every": 0, "guidance": 2.0}}
    ends = fleets.trained([other_place], output, world, config=tree, pack=3)
    assert ends["one"].end == "skipped" and str(ends["one"].adapter).endswith("one/one.safetensors")
    assert (output / "one" / "one.safetensors").stat().st_mtime_ns == mark
    (moved / "0.txt").write_text("a caption of its own")
    for changed in ({**one, "steps": 3}, {**one, "token": "other"}, {**one, "images": str(moved)}):
        ends = fleets.trained([changed], output, world, config=tree)
        assert ends["one"].end == "failed" and "other photos, captions, model or settings" in ends["one"].reason
        assert same_factors(first, factors(output / "one"))
    ends = fleets.trained([{**one, "seed": 9}], output, world, config=tree, overwrite=True)
    assert ends["one"].end == "trained" and not same_factors(first, factors(output / "one"))
    assert failed(output) == {}, "a job that succeeds has no line any more"


def test_a_job_is_cancelled_by_a_file_and_stays_so(world, tmp_path):
    output = tmp_path / "out"

    def cancel(event, fields):
        if event == "job" and fields.get("state") == "started" and fields["job"] == "b":
            (output / "b" / "cancel").touch()

    jobs = [job(world, "a"), job(world, "b", steps=30), job(world, "c")]
    ends = fleets.trained(jobs, output, world, config=quick(world), progress=Progress(cancel))
    assert [ends[name].end for name in "abc"] == ["trained", "cancelled", "trained"]
    assert "cancelled after step" in ends["b"].reason
    assert fleets.trained(jobs, output, world, config=quick(world))["b"].end == "cancelled"
    (output / "b" / "cancel").unlink()
    (again,) = fleets.trained([{**jobs[1]}], output, world, config=quick(world)).values()
    assert again.end == "trained" and again.steps == 30


def test_two_processes_share_an_output_and_train_nothing_twice(world, tmp_path):
    jobs = [job(world, f"j{i}", seed=i) for i in range(4)]
    output = tmp_path / "out"

    def work() -> None:
        for done in fleets.trained(jobs, output, world, config=quick(world), pack=1).values():
            print(done.id, done.end, flush=True)

    children = [start(work, tmp_path / f"log{i}") for i in range(2)]
    assert [finish(child, 240) for child in children] == [0, 0]
    told = [line.split() for i in range(2) for line in (tmp_path / f"log{i}").read_text().splitlines() if " " in line]
    ends = [(row[0], row[1]) for row in told if row[0].startswith("j")]
    assert sorted(ends) == sorted([(f"j{i}", end) for i in range(4) for end in ("trained", "skipped")])


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_photos_come_from_archives(tmp_path, kind):
    photos = draw_photos(tmp_path / "dog", 2)
    archive = tmp_path / f"dog.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in photos.iterdir():
                file.write(path, f"dog/{path.name}")
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(photos, "dog")
    found = fetch(str(archive), tmp_path / "here")
    assert sorted(path.read_bytes() for path in found.iterdir()) == sorted(p.read_bytes() for p in photos.iterdir())


def test_archives_that_are_no_photos_are_refused(tmp_path, monkeypatch):
    trap, evil = tmp_path / "trap.zip", tmp_path / "evil.tar"
    trap.write_bytes(b"PK nothing")
    with tarfile.open(evil, "w") as file:
        member = tarfile.TarInfo("../outside.png")
        member.size = 1
        file.addfile(member, io.BytesIO(b"x"))
    for archive, why in (
        (trap, "cannot be unpacked"),
        (evil, "cannot be unpacked"),
        (tmp_path / "no.zip", "not there"),
    ):
        with pytest.raises(ValueError, match=why) as raised:
            fetch(str(archive), tmp_path / "here")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "outside.png").exists() and not (tmp_path / "here").exists()
    monkeypatch.setattr("diffusekrona_train.fleet.photos.LARGEST", 10)
    with tarfile.open(tmp_path / "large.tar", "w") as file:
        file.add(draw_photos(tmp_path / "p", 1), "p")
    with pytest.raises(ValueError, match="at most 10000 of"):
        fetch(str(tmp_path / "large.tar"), tmp_path / "here")


def test_a_stream_is_read_while_jobs_run():
    lines = iter(['{"id": "a"}\n', "# no job\n", "\n", "{broken\n"])
    gate = threading.Event()

    def slowly():
        yield from lines
        gate.wait(5)
        yield '{"id": "late"}\n'

    stream = Stream(slowly())
    found = [stream.take(wait=True) for _ in range(2)]
    assert found[0] == (1, {"id": "a"}) and isinstance(found[1][1], JobError) and found[1][0] == 4
    assert stream.take(wait=False) is None, "nothing has come: who runs jobs must not wait"
    gate.set()
    while (row := stream.take(wait=True)) is None:
        time.sleep(0.01)
    assert row == (5, {"id": "late"})
    with pytest.raises(StopIteration):
        while stream.take(wait=True) is None:
            pass


class Hook(BaseHTTPRequestHandler):
    got: list[dict] = []
    refuse = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        refused, type(self).refuse = type(self).refuse > 0, type(self).refuse - 1
        if not refused:
            self.got.append(json.loads(body))
        self.send_response(503 if refused else 200)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def test_a_webhook_hears_of_each_end_and_one_that_is_away_costs_a_warning():
    from diffusekrona_train.fleet.hook import Webhook

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    warned: list[str] = []
    Hook.refuse = 1
    hook = Webhook(f"http://127.0.0.1:{server.server_port}/", warned.append, pause=0.01)
    hook.send({"job": "a", "state": "trained", "adapter": Path("x")})
    hook.close()
    assert Hook.got == [{"job": "a", "state": "trained", "adapter": "x"}] and warned == []
    server.shutdown()
    server.server_close()
    hook.send({"job": "b"})
    hook.close()
    assert len(warned) == 1 and "was not told of job b" in warned[0]


def many(*words: str):
    from diffusekrona_train.cli.train import app

    return CliRunner().invoke(app, ["many", *words])


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["no.jsonl", "--model", "toybox"], "no.jsonl: no such file"),
        (["jobs.jsonl", "--model", "nothing/here/at/all"], "nothing/here/at/all"),
        (["jobs.jsonl", "--model", "toybox", "--pack", "0"], "--pack 0: give a number of slots"),
        (["jobs.jsonl", "--model", "toybox", "--on", "moon"], "--on 'moon': there are here and ray"),
        (["jobs.jsonl", "--model", "toybox", "--workers", "2"], "--workers is for --on ray"),
        (["jobs.jsonl", "--model", "toybox", "--set", "adapter.type=full"], "adapter.type: full cannot be trained"),
        (["jobs.jsonl", "--model", "toybox", "--set", "adapter.a1=7"], "a1: 7 does not divide"),
        (["jobs.jsonl", "--model", "toybox", "--set", "train.steps=x"], "train.steps: 'x'"),
        (["jobs.jsonl", "--model", "toybox", "--set", "train.keep_best=true"], "train.keep_best: is for one run"),
        (["jobs.jsonl", "--model", "toybox", "--webhook", "ftp://x"], "--webhook 'ftp://x'"),
        (["jobs.jsonl", "--model", "toybox", "--dollars-an-hour", "-1"], "--dollars-an-hour"),
    ],
)
def test_what_is_wrong_for_all_jobs_is_one_line_before_any(tmp_path, monkeypatch, words, wrong):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.jsonl").write_text('{"id": "a", "images": "toybox:poodle", "class": "dog"}\n')
    done = many(*words)
    assert done.exit_code == 2, done.output
    assert wrong in done.output and done.output.count("\n") == 1 and "Traceback" not in done.output
    assert not (tmp_path / "runs").exists()


def test_by_command_the_exit_status_says_whether_a_job_failed(world, tmp_path):
    tree = quick(world)
    common = tmp_path / "common.yaml"
    common.write_text(json.dumps(tree))
    listed = tmp_path / "jobs.jsonl"
    listed.write_text(json.dumps(job(world, "a")) + "\n\n# a comment\n" + "{not json\n")
    words = [str(listed), "--config", str(common), "--output", str(tmp_path / "out"), "--pack", "2"]
    done = many(*words)
    assert done.exit_code == 1 and "1 trained, 1 failed" in done.output, done.output
    assert "line 4 is not JSON" in failed(tmp_path / "out")["line 4"]
    listed.write_text(json.dumps(job(world, "a")) + "\n")
    done = many(*words, "--json")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["state"] for line in lines if line["event"] == "job"] == ["skipped"]


def test_all_jobs_get_the_model_as_the_config_asks_for_it():
    source = open_model("z-image", text_precision="int8", prediction_type=None)
    shared = SharedSource.of(source)
    assert vars(shared) == {**vars(source), "_layers": [], "_whole": set()} and shared.text_precision == "int8"
