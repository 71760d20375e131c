"""Photos from URLs and results at URLs: memory:// and a local S3 server."""

from __future__ import annotations

import json
import shutil

import fsspec
import pytest

from diffusekrona_train.fleet.outlet import RemoteOutlet, open_outlet
from tests import fleets
from tests.runs import factors, make_world, same_factors
from tests.tiny.photos import draw_photos

ADAPTER = {**fleets.KRONA, "blocks": ["mid_block*"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the local folder of a URL lies in runs/
    system = fsspec.filesystem("memory")
    yield system
    for path in system.ls("/", detail=False):
        system.rm(path, recursive=True)


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(port=0)
    running.start()
    yield f"http://127.0.0.1:{running.get_host_and_port()[1]}"
    running.stop()


@pytest.fixture
def s3(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)


def put_photos(system, tmp_path, place: str) -> None:
    for path in draw_photos(tmp_path / "local", 2).iterdir():
        system.pipe_file(f"{place}/{path.name}", path.read_bytes())


def check_jobs(system, scheme: str, world, tmp_path) -> None:
    put_photos(system, tmp_path, "bucket/photos/dog")
    tree = fleets.common(world, ADAPTER, train={"steps": 2, "checkpoint_every": 1})
    jobs = [{"id": "dog", "images": f"{scheme}://bucket/photos/dog", "class": "dog"}]
    output = f"{scheme}://bucket/out"
    bad = {"id": "bad", "images": f"{scheme}://bucket/photos/cat", "class": "cat"}
    ends = fleets.trained([*jobs, bad], output, world, config=tree)
    assert ends["bad"].end == "failed" and f"{scheme}://bucket/photos/cat" in ends["bad"].reason
    assert (ends["dog"].end, ends["dog"].adapter) == ("trained", f"{output}/dog/dog.safetensors")
    names = {path.split("bucket/out/")[1] for path in system.find("bucket/out")}
    assert {"dog/job.json", "dog/dog.safetensors", "dog/config.yaml", "failed.jsonl", "fleet.html"} <= names
    assert not [name for name in names if "resume" in name or "lease.json" in name or "photos/" in name]
    system.get_file("bucket/out/dog/dog.safetensors", str(tmp_path / "dog.safetensors"))
    local = [{**jobs[0], "images": str(tmp_path / "local")}]
    fleets.trained(local, tmp_path / "local-out", world, config=tree)
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "dog.safetensors", tmp_path / "there" / "there.safetensors")
    assert same_factors(factors(tmp_path / "there"), factors(tmp_path / "local-out" / "dog"))
    shutil.rmtree("runs")  # as on another machine
    assert fleets.trained(jobs, output, world, config=tree)["dog"].end == "skipped"


def test_jobs_on_memory(memory, world, tmp_path):
    check_jobs(memory, "memory", world, tmp_path)


def test_jobs_on_s3(s3, world, tmp_path):
    check_jobs(s3, "s3", world, tmp_path)


def test_another_machine_resumes_from_the_url(memory, world, tmp_path):
    from diffusekrona_train.common.progress import Progress

    tree = fleets.common(world, ADAPTER, train={"steps": 4, "checkpoint_every": 2})
    job = {"id": "dog", "images": str(world / "photos"), "class": "dog"}

    def stop(event, fields):
        if event == "saved" and fields["step"] == 2:
            progress.stop()

    progress = Progress(stop)
    ends = fleets.trained([job], "memory://bucket/out", world, config=tree, progress=progress)
    assert ends["dog"].end == "stopped"
    shutil.rmtree("runs")
    heard = []
    listen = Progress(lambda event, fields: heard.append(fields) if event == "job" else None)
    ends = fleets.trained([job], "memory://bucket/out", world, config=tree, progress=listen)
    assert ends["dog"].end == "trained" and heard[0]["state"] == "resumed" and heard[0]["step"] in (2, 3)


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_url_has_one_writer_at_a_time_and_a_lease_that_ran_out_one_heir(kind, request, tmp_path):
    system = request.getfixturevalue(kind)
    url = f"{kind}://bucket/leased"
    first = open_outlet(url)
    assert isinstance(first, RemoteOutlet)
    with pytest.raises(ValueError, match="writes there; wait for it, or if it is gone, [0-9]+ s") as raised:
        open_outlet(url)
    assert "\n" not in str(raised.value)
    first.close()
    second = open_outlet(url)
    lease = json.loads(system.cat_file("bucket/leased/lease.json"))
    system.pipe_file("bucket/leased/lease.json", json.dumps({**lease, "until": 0}).encode())
    heir = open_outlet(url)
    # whoever read the same old lease, and comes later, is not its heir too
    assert not heir._create(f".leases/{lease['token']}", {})
    second._renewed = -1e9  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="another process has taken over"):
        second.keep()
    heir.close()
    assert not system.exists("bucket/leased/lease.json")


def test_a_file_system_without_its_package_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="gcsfs") as raised:
        open_outlet("gs://bucket/x")
    assert "\n" not in str(raised.value)
