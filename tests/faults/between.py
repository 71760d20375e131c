"""More cases of the area runs: missing rights, things in the way, and damage between two runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import adapter_files
from tests.faults.doors import Seen, fork
from tests.faults.harness import Case
from tests.faults.runs import FINAL, TRAIN, as_base, base, finished, fresh, training_case
from tests.faults.sandbox import Sandbox, torn


def cases() -> list[Case]:
    return _rights() + _resuming() + _caches()


def _rights() -> list[Case]:
    """What a user without rights, or with something else in the way, is told."""

    def closed(name: str, mode: int, make: Callable[[Sandbox], list[str]] = fresh) -> Callable[[Sandbox], list[str]]:
        def build(box: Sandbox) -> list[str]:
            arguments = make(box)
            place = box.folder / name
            if place.suffix == "":
                place.mkdir(parents=True, exist_ok=True)
            place.chmod(mode)
            return arguments

        return build

    def in_the_way(name: str, changes: dict[str, Any]) -> Callable[[Sandbox], list[str]]:
        def build(box: Sandbox) -> list[str]:
            arguments = fresh(box, changes, cache=False)
            box.write(name, "a file")
            return arguments

        return build

    def uncached(box: Sandbox) -> list[str]:
        return fresh(box, {"data.cache_dir": "cache"}, cache=False)

    def go_on(box: Sandbox) -> list[str]:
        return [*finished(box, {"train.steps": 5}), "--resume"]

    unprivileged: dict[str, Any] = {"limits": {"unprivileged": 1}}
    denied = r"[Pp]ermission denied"
    all_ = ("*",)
    files = "one sentence for a file in the way of a folder"
    return [
        training_case("output folder not writable", closed("runs", 0o555), 2, r"runs/dog.*" + denied, **unprivileged),
        training_case(
            "cache folder not writable",
            closed("cache", 0o555, uncached),
            2,
            r"cache.*" + denied,
            "right",
            **unprivileged,
        ),
        training_case(
            "checkpoints not writable",
            closed("runs/dog/checkpoints", 0o555, go_on),
            1,
            r"checkpoint of step 5.*" + denied,
            **unprivileged,
        ),
        training_case("metrics not writable", closed("runs/dog/metrics.jsonl", 0o444, go_on), 0, r"\S", **unprivileged),
        training_case(
            "config not readable", closed("dog.yaml", 0, fresh), 2, r"dog\.yaml.*(denied|readable)", **unprivileged
        ),
        training_case("output is a file", in_the_way("runs/dog", {}), 2, r"output: runs/dog is a file"),
        training_case("output in a file", in_the_way("runs", {"data.cache_dir": "cache"}), 2, r"runs", files),
        training_case("cache is a file", in_the_way("cache", {"data.cache_dir": "cache"}), 2, r"cache", files),
        training_case(
            "output named as no file system can",
            lambda box: fresh(box, {"output": "runs/" + "d" * 300}),
            2,
            r"output: its last part has 300 bytes",
        ),
        training_case("two runs in one folder", _locked, 2, r"is being written by another run"),
        training_case("output removed under the run", _removed, 0, r"\S", exists=(FINAL,)),
        training_case("SIGINT twice in a run", _signalled_twice, 130, r"once more to stop at once", absent=(FINAL,)),
        training_case(
            "a class image cut", _class_image_cut, 0, r"\S", may_write=("class/*",), then=_two_whole, replaced=all_
        ),
        training_case(
            "SIGKILL at a class image",
            _class_images,
            137,
            "",
            may_write=("class/*",),
            then=_made_then_two,
            env={"KRONA_FAULT": "cache:0:SIGKILL"},
        ),
        training_case(
            "photos removed under the run", _photos_removed, 0, r"\S", exists=(FINAL,), may_write=("photos/*",)
        ),
    ]


def _locked(box: Sandbox) -> list[str]:
    arguments = fresh(box)
    lock = box.path("runs/dog/.lock").open("w")  # noqa: SIM115 - held while the case runs, as another run would
    fcntl.flock(lock, fcntl.LOCK_EX)
    _HELD.append(lock)
    return arguments


_HELD: list[Any] = []


def _when(condition: Callable[[], bool], act: Callable[[], Any]) -> None:
    """Does `act` once `condition` holds, while the run is on."""

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if condition():
                act()
                return
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()


def _removed(box: Sandbox) -> list[str]:
    arguments = fresh(box, {"train.steps": 12, "validation.every": 0})
    place = box.folder / "runs" / "dog"
    _when(
        (place / "resume" / "step-000002" / "state.safetensors").exists,
        lambda: shutil.rmtree(place, ignore_errors=True),
    )
    return arguments


def _signalled_twice(box: Sandbox) -> list[str]:
    arguments = fresh(box, {"train.steps": 500, "train.checkpoint_every": 500, "validation.every": 0})
    place = box.folder / "runs" / "dog"

    def twice() -> None:
        child = int((place / ".lock").read_text())
        os.kill(child, signal.SIGINT)
        time.sleep(0.02)
        os.kill(child, signal.SIGINT)

    _when((place / "metrics.jsonl").exists, twice)
    return arguments


def _class_images(box: Sandbox) -> list[str]:
    settings = {"prior.kind": "images", "prior.images": "class", "prior.count": 2}
    return fresh(box, {**settings, "train.steps": 1, "validation.every": 0, "validation.steps": 1})


def _class_image_cut(box: Sandbox) -> list[str]:
    arguments = _class_images(box)
    seen = fork(arguments, box.folder, {}, {}, 180)
    assert seen.status == 0, f"the run with class images ends with {seen.status}: {seen.err[-500:]}"
    image = box.find("class/*.png")[0]
    image.write_bytes(image.read_bytes()[:100])
    return [*arguments, "--overwrite"]


def _two_whole(box: Sandbox, seen: Seen) -> None:
    found = box.find("class/*.png")
    assert len(found) == 2 and not any(map(torn, found)), f"{len(found)} class images, not all whole"


def _made_then_two(box: Sandbox, seen: Seen) -> None:
    again = fork([*TRAIN, "--resume"], box.folder, {}, {}, 180)
    assert again.status == 0, f"--resume ends with {again.status}: {again.err[-500:]}"
    _two_whole(box, again)


def _photos_removed(box: Sandbox) -> list[str]:
    arguments = fresh(box)
    _when((box.folder / "runs/dog/metrics.jsonl").exists, lambda: shutil.rmtree(box.folder / "photos"))
    return arguments


def _resuming() -> list[Case]:
    """What --resume, --resume-from and --overwrite refuse, and what they forgive."""

    def again(*more: str, **changes: Any) -> Callable[[Sandbox], list[str]]:
        return lambda box: [*finished(box, {key.replace("__", "."): value for key, value in changes.items()}), *more]

    def hurt(
        damage: Callable[[Path], Any], *more: str, states: tuple[str, ...] = ("4",)
    ) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            arguments = [*finished(box), *(more or ("--resume",))]
            for step in states:
                damage(box.folder / f"runs/dog/resume/step-00000{step}/state.safetensors")
            (box.folder / FINAL).unlink()
            return arguments

        return make

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:1000])

    def evil(path: Path) -> None:
        adapter_files.pickled(path, path.parents[4] / "CANARY")

    def other_photos(change: Callable[[Path], Any]) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            arguments = [*finished(box, {"train.steps": 5}), "--resume"]
            change(box.folder / "photos")
            return arguments

        return make

    def renamed(box: Sandbox) -> list[str]:
        arguments = hurt(lambda path: shutil.rmtree(path.parent))(box)  # step 4 is trained again, on photos renamed
        for index, path in enumerate(sorted((box.folder / "photos").glob("*.png"), reverse=True)):
            path.rename(path.with_name(f"again-{index}.png"))
        return arguments

    both = ("3", "4")
    one_state = ("--resume-from", "runs/dog/resume/step-000004")
    last, lost = ("*step-000004*",), "a state that is gone and one that is damaged are equally lost"
    cannot = "both are states that cannot be read"
    return [
        training_case(
            "a run stands there", again(), 2, r"runs/dog already holds a run; continue it with --resume", then=_unharmed
        ),
        training_case(
            "--resume and --overwrite", again("--resume", "--overwrite"), 2, r"--resume and --overwrite", then=_unharmed
        ),
        training_case("--overwrite", again("--overwrite"), 0, r"\S", replaced=("*",), then=as_base),
        training_case(
            "--resume with another rate", again("--resume", train__learning_rate=0.1), 2, r"train\.learning_rate \(was"
        ),
        training_case("--resume with another seed", again("--resume", train__seed=9), 2, r"train\.seed \(was"),
        training_case("--resume with other factors", again("--resume", adapter__a1=2), 2, r"adapter\.a1 \(was"),
        training_case(
            "--resume with another photo",
            other_photos(lambda photos: shutil.copy(photos / "01.png", photos / "00.png")),
            2,
            r"photos are not those .*00\.png is another image now",
            may_write=("photos/*",),
        ),
        training_case(
            "--resume with another caption",
            other_photos(lambda photos: (photos / "00.txt").write_text("[V] asleep")),
            2,
            r"the caption of 00\.png was '.*' and is 'sks asleep'",
            may_write=("photos/*",),
        ),
        training_case("--resume of renamed photos", renamed, 0, r"resuming after step 3", then=as_base, replaced=last),
        training_case("--resume with fewer steps", again("--resume", train__steps=3), 2, r"train\.steps: 3"),
        training_case("--resume of a finished run", again("--resume"), 0, r"\S", then=as_base),
        training_case("--resume-from nowhere", again("--resume-from", "runs/cat"), 2, r"no resume state at runs/cat"),
        training_case(
            "--resume-from an adapter", again("--resume-from", FINAL), 2, r"resume state .*dog\.safetensors", cannot
        ),
        training_case(
            "the newest state cut", hurt(cut), 0, r"resuming after step 3.*step-000004", then=as_base, replaced=last
        ),
        training_case("a cut state by name", hurt(cut, *one_state), 2, r"step-000004.*cannot be read", cannot),
        training_case("a pickle as state", hurt(evil), 0, r"resuming after step 3", then=as_base, replaced=last),
        training_case("every state cut", hurt(cut, states=both), 2, r"no resume state that can be read", lost),
        training_case(
            "no state to resume from",
            hurt(lambda path: shutil.rmtree(path.parent), states=both),
            2,
            r"no resume state",
            lost,
        ),
        training_case("init_from a pickle", _init_from(adapter_files.pickled), 2, r"is a pickle"),
        training_case(
            "init_from another model",
            _init_from(_sdxl),
            2,
            r"is for family 'sdxl'",
            "one check wherever a file is read",
        ),
    ]


def _unharmed(box: Sandbox, seen: Seen) -> None:
    for path in (base(box.shared) / "runs" / "dog").rglob("*"):
        if path.is_file():
            here = box.folder / path.relative_to(base(box.shared))
            assert here.read_bytes() == path.read_bytes(), f"{here.name} was changed"


def _sdxl(path: Path, canary: Path) -> None:
    adapter_files.native(path, "sdxl", a2=4)


def _init_from(make_file: Callable[[Path, Path], Any]) -> Callable[[Sandbox], list[str]]:
    def make(box: Sandbox) -> list[str]:
        arguments = fresh(box, {"train.init_from": "old.safetensors"})
        make_file(box.path("old.safetensors"), box.canary())
        return arguments

    return make


def _caches() -> list[Case]:
    def hurt(damage: Callable[[Path], Any]) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            arguments = fresh(box)
            for entry in box.find("runs/cache/*/*/*.safetensors"):
                damage(entry)
            return arguments

        return make

    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 64
        path.write_bytes(raw)

    def evil(path: Path) -> None:
        adapter_files.pickled(path, path.parents[4] / "CANARY")

    def empty(path: Path) -> None:
        path.write_bytes(b"")

    damages = {
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "with a flipped bit": flip,
        "empty": empty,
        "pickles": evil,
    }
    return [
        training_case(f"cache entries {name}", hurt(damage), 0, r"made in", then=as_base)
        for name, damage in damages.items()
    ]
