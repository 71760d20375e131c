"""Two actors of Ray on this machine's CPUs, one of them killed in the middle, against one process."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from diffusekrona_train.common.progress import Progress
from diffusekrona_train.fleet.jobs import common_tree
from tests import fleets
from tests.runs import factors, make_world


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_actors_and_one_killed_give_the_adapters_of_one_process(tmp_path):
    pytest.importorskip("ray")  # an extra
    from diffusekrona_train.fleet import train_all
    from diffusekrona_train.fleet.call import Call
    from diffusekrona_train.fleet.service import Rows

    world = make_world(tmp_path / "world")
    tree = fleets.common(world, train={"steps": 8, "checkpoint_every": 2})
    jobs = [{**job, "steps": 8, "id": f"j{i}"} for i, job in enumerate(fleets.jobs_of(world, 4))]
    jobs.append({"id": "bad", "images": str(world / "nowhere"), "class": "dog"})
    pids: dict[str, int] = {}
    lost: list[str] = []

    def watch(event: str, fields: dict) -> None:
        if event == "message" and "process" in fields["text"]:
            pids[fields["text"].split(":")[0].removeprefix("actor ")] = int(fields["text"].split()[-1])
        if event == "warning" and "was lost" in fields["text"]:
            lost.append(fields["text"])
        rows = fields.get("running", ()) if event == "pack" else ()
        if not lost and pids and any(2 <= row["step"] < 8 for row in rows) and (pid := pids.pop(fields["on"], None)):
            pids.clear()  # only one of them
            os.kill(pid, signal.SIGKILL)

    call = Call(common_tree(None, tree, ()), str(tmp_path / "ray"), pack=2, on="ray", workers=2)
    ends = {done.id: done for done in train_all(call, Rows(iter(jobs)), Progress(watch))}
    assert len(lost) == 1, "nobody was killed, so nothing was shown"
    assert {name: done.end for name, done in ends.items()} == {
        **{f"j{i}": "trained" for i in range(4)},
        "bad": "failed",
    }
    fleets.trained(jobs[:4], tmp_path / "one", world, config=tree)
    for job in jobs[:4]:
        a, b = (factors(tmp_path / name / job["id"]) for name in ("ray", "one"))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_the_queue_gives_the_jobs_of_a_lost_actor_to_others():
    from diffusekrona_train.fleet.service import Done
    from diffusekrona_train.fleet.spread import Queue

    queue = Queue()
    for number in (1, 2, 3):
        queue.put((number, {"id": str(number)}))
    queue.close()
    assert [queue.take("a")[0], queue.take("b")[0]] == [1, 2]  # type: ignore[index]
    queue.end(2, Done("2", "trained"))
    assert queue.lost("a") == 1
    assert [queue.take("b")[0], queue.take("b")[0]] == [1, 3]  # type: ignore[index]
    assert queue.take("b") is None, "jobs are running that may come back"
    queue.end(1, Done("1", "trained"))
    queue.end(3, Done("3", "failed"))
    queue.end(1, Done("1", "trained"))  # the lost one was not quite dead
    assert queue.take("b") is False
    ended, _, left = queue.news()
    assert [(number, done.end) for number, done in ended] == [(2, "trained"), (1, "trained"), (3, "failed")]
    assert left == 0
