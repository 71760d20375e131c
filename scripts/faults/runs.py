"""Cases of the area runs: death by signal in each phase, full disks, missing rights, damage between two runs."""

from __future__ import annotations

import fcntl
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults import adapter_files
from scripts.faults.doors import Seen, fork
from scripts.faults.harness import Case
from scripts.faults.sandbox import Sandbox

STEPS = 6
FINAL = "runs/dog/dog.safetensors"
TRAIN = ["train", "--config", "dog.yaml"]
EXIT = {"SIGKILL": 137, "SIGTERM": 143, "SIGINT": 130}

# phase, step of the seam, newest state after a kill, what stands and what not when the child was killed there
PHASES: list[tuple[str, int, int, tuple[str, ...], tuple[str, ...]]] = [
    ("setup", 0, 0, (), ("runs/dog/config.yaml", "runs/cache/*")),
    ("cache", 1, 0, ("runs/cache/*/*/*.safetensors",), ("runs/dog/config.yaml",)),
    ("step", 2, 2, ("runs/dog/checkpoints/step-000002/*",), ("runs/dog/samples/step-000003/*",)),
    ("validation", 3, 2, ("runs/dog/checkpoints/step-000002/*",), ("runs/dog/samples/step-000003/*",)),
    ("adapter", 4, 2, ("runs/dog/samples/step-000003/*.png",), ("runs/dog/checkpoints/step-000004/*.safetensors",)),
    ("state", 4, 2, ("runs/dog/checkpoints/step-000004/*",), ("runs/dog/resume/step-000004/state.safetensors",)),
    ("rotation", 4, 4, ("runs/dog/resume/step-000004/*",), ("runs/dog/checkpoints/step-000006/*",)),
    ("end", 6, 6, ("runs/dog/checkpoints/step-000006/*",), (FINAL,)),
]


def cases() -> list[Case]:
    return _signals() + _full_disks() + _memory() + _rights() + _resuming() + _caches() + _models() + _others()


def base(shared: Any) -> Path:
    """The folder of a finished run: photos, config, runs/dog, runs/cache."""

    def make(folder: Path) -> None:
        box = Sandbox(folder, shared)
        box.photos()
        box.config()
        seen = fork(TRAIN, folder, {}, {}, 300)
        assert seen.status == 0, f"the run without a fault ends with {seen.status}: {seen.err[-2000:]}"

    return shared.build("base", make)


def fresh(box: Sandbox, changes: dict[str, Any] | None = None, cache: bool = True) -> list[str]:
    """Photos, config and a filled cache; no run yet."""
    finished = base(box.shared)
    box.take(finished / "photos", "photos")
    if cache:
        box.take(finished / "runs" / "cache", "runs/cache")
    box.config(changes)
    return list(TRAIN)


def finished(box: Sandbox, changes: dict[str, Any] | None = None) -> list[str]:
    """The same with the finished run in place."""
    fresh(box, changes)
    box.take(base(box.shared) / "runs" / "dog", "runs/dog")
    return list(TRAIN)


def tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def equal_to_base(box: Sandbox) -> None:
    """The final adapter is bit for bit that of the run without a fault."""
    import torch

    wanted, got = tensors(base(box.shared) / FINAL), tensors(box.folder / FINAL)
    assert wanted.keys() == got.keys(), "the final adapter has other layers"
    different = [name for name in wanted if not torch.equal(wanted[name], got[name])]
    assert not different, f"the final adapter differs in {len(different)} tensors"


def resume_to_the_end(box: Sandbox, above: int) -> None:
    """--resume goes on, above step 0 where a state stood, and ends as the run without a fault."""
    seen = fork([*TRAIN, "--resume"], box.folder, {}, {}, 300)
    assert seen.status == 0, f"--resume ends with {seen.status}: {seen.err[-800:]}"
    said = f"resuming after step {above}" in seen.out
    assert said or above == 0, f"it did not resume after step {above}: {seen.out[:500]}"
    equal_to_base(box)
    # in the cache, which runs share, another process might be writing: there a dead temporary folder is left alone
    left = [str(path) for path in (box.folder / "runs" / "dog").rglob(".writing-*")]
    assert not left, f"--resume left {left[0]}"


def _case(name: str, make: Callable[[Sandbox], Any], status: int, says: str, same_as: str = "", **more: Any) -> Case:
    settings = {"how": "fork", "seconds": 180, **more}
    return Case("runs", name, make, status, says, same_as, **settings)


def _signals() -> list[Case]:
    table = []
    for phase, step, newest, stands, missing in PHASES:
        for signal_name, status in EXIT.items():
            killed = signal_name == "SIGKILL"

            def then(box: Sandbox, seen: Seen, killed=killed, newest=newest, stands=stands, missing=missing) -> None:
                assert not killed or seen.signal == 9, f"the child ended by signal {seen.signal}"
                if killed:
                    assert all(box.find(pattern) for pattern in stands), f"not all of {stands} stand: another phase?"
                    assert not any(box.find(pattern) for pattern in missing), f"one of {missing} stands: another phase?"
                states = [int(path.parent.name[5:]) for path in box.find("runs/dog/resume/*/state.safetensors")]
                above = max(states, default=0)
                assert not killed or above == newest, f"the newest state is of step {above} and not {newest}"
                resume_to_the_end(box, above)

            says = r"" if killed else r"(?i)stopped|--resume|finishing this step|starts again"
            table.append(
                _case(
                    f"{signal_name} in {phase} {step}",
                    lambda box, phase=phase: fresh(box, cache=phase not in ("setup", "cache")),
                    status,
                    says,
                    env={"KRONA_FAULT": f"{phase}:{step}:{signal_name}"},
                    then=then,
                )
            )
    return table


def _full_disks() -> list[Case]:
    """No space left, injected at each write, or by a limit on the size of a file."""

    def fault(at: str) -> dict[str, Any]:
        return {"env": {"KRONA_FAULT": f"{at}:full"}}

    def limit(size: int) -> dict[str, Any]:
        return {"limits": {"file_size": size}}

    def goes_on(above: int) -> Callable[[Sandbox, Seen], None]:
        return lambda box, seen: resume_to_the_end(box, above)

    space, checkpoint = r"[Nn]o space left", r"checkpoint of step {} cannot be written \(No space left on device\)"
    writes = "the same sentence for each file of a checkpoint"
    return [
        _case("disk full in the cache", lambda box: fresh(box, cache=False), 1, space, then=goes_on(0), **fault("cache:1")),
        _case("disk full at an adapter", fresh, 1, checkpoint.format(4), writes, then=goes_on(2), **fault("adapter:4")),
        _case("disk full at a state", fresh, 1, checkpoint.format(4), writes, then=goes_on(2), **fault("state:4")),
        _case("disk full at the first", fresh, 1, checkpoint.format(2), then=goes_on(0), **fault("adapter:2")),
        _case("disk full at a validation", fresh, 0, "training goes on", then=_as_base, **fault("validation:3")),
        _case("disk full at the end", fresh, 1, space, then=goes_on(6), **fault("end:6")),
        _case("no file above 2 kB", lambda box: fresh(box, cache=False), 1, r"File too large", absent=(FINAL,), **limit(2000)),
        _case("no file above 20 kB", fresh, 1, r"checkpoint of step 2 cannot be written \(File too", **limit(20_000)),
    ]  # fmt: skip


def _as_base(box: Sandbox, seen: Seen) -> None:
    equal_to_base(box)


def _memory() -> list[Case]:
    def fault(at: str) -> dict[str, Any]:
        return {"env": {"KRONA_FAULT": f"{at}:oom"}}

    three = r"train\.batch_size.*data\.resolution.*train\.memory"
    plain = {"train.memory": "plain"}
    same = "one sentence names the settings, wherever memory ends"
    return [
        _case("out of memory in the first step", fresh, 0, r"out of memory.*going on with checkpointing", **fault("step:0")),
        _case("out of memory, plain asked for", lambda box: fresh(box, plain), 1, three, same, **fault("step:0")),
        _case("out of memory late", fresh, 1, three, same, then=lambda box, seen: resume_to_the_end(box, 4),
              **fault("step:4")),
        _case("out of memory in the cache", lambda box: fresh(box, cache=False), 1, r"out of memory.*data\.resolution", same,
              **fault("cache:0")),
        _case("out of memory in a validation", fresh, 0, r"training goes on", then=_as_base, **fault("validation:3")),
        _case("numbers that overflow", lambda box: fresh(box, {"adapter.scale": 1e38}), 1,
              r"not finite.*train\.learning_rate", absent=(FINAL,)),
    ]  # fmt: skip


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
        return [*finished(box, {"train.steps": 8}), "--resume"]

    unprivileged: dict[str, Any] = {"limits": {"unprivileged": 1}}
    denied = r"[Pp]ermission denied"
    files = "one sentence for a file in the way of a folder"
    return [
        _case("output folder not writable", closed("runs", 0o555), 2, r"runs/dog.*" + denied, **unprivileged),
        _case("cache folder not writable", closed("cache", 0o555, uncached), 2, r"cache.*" + denied, "right", **unprivileged),
        _case("checkpoints not writable", closed("runs/dog/checkpoints", 0o555, go_on), 1, r"checkpoint of step 8.*" + denied,
              **unprivileged),
        _case("metrics not writable", closed("runs/dog/metrics.jsonl", 0o444, go_on), 0, r"\S", **unprivileged),
        _case("config not readable", closed("dog.yaml", 0, fresh), 2, r"dog\.yaml.*(denied|readable)", **unprivileged),
        _case("output is a file", in_the_way("runs/dog", {}), 2, r"output: runs/dog is a file"),
        _case("output in a file", in_the_way("runs", {"data.cache_dir": "cache"}), 2, r"runs", files),
        _case("cache is a file", in_the_way("cache", {"data.cache_dir": "cache"}), 2, r"cache", files),
        _case("output named as no file system can", lambda box: fresh(box, {"output": "runs/" + "d" * 300}), 2, r"name too long"),
        _case("two runs in one folder", _locked, 2, r"is being written by another run"),
        _case("output removed under the run", _removed, 0, r"\S", exists=(FINAL,)),
        _case("photos removed under the run", _photos_removed, 0, r"\S", exists=(FINAL,), may_write=("photos/*",)),
    ]  # fmt: skip


def _locked(box: Sandbox) -> list[str]:
    arguments = fresh(box)
    lock = open(box.path("runs/dog/.lock"), "w")  # noqa: SIM115 - held while the case runs, as another run would
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
    _when((place / "resume" / "step-000002" / "state.safetensors").exists, lambda: shutil.rmtree(place, ignore_errors=True))
    return arguments


def _photos_removed(box: Sandbox) -> list[str]:
    arguments = fresh(box)
    _when((box.folder / "runs/dog/metrics.jsonl").exists, lambda: shutil.rmtree(box.folder / "photos"))
    return arguments


def _resuming() -> list[Case]:
    """What --resume, --resume-from and --overwrite refuse, and what they forgive."""

    def again(*more: str, **changes: Any) -> Callable[[Sandbox], list[str]]:
        return lambda box: [*finished(box, {key.replace("__", "."): value for key, value in changes.items()}), *more]

    def hurt(damage: Callable[[Path], Any], *more: str, states: tuple[str, ...] = ("6",)) -> Callable[[Sandbox], list[str]]:
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

    both = ("4", "6")
    one_state = ("--resume-from", "runs/dog/resume/step-000006")
    cannot = "both are states that cannot be read"
    return [
        _case("a run stands there", again(), 2, r"runs/dog already holds a run; continue it with --resume", then=_unharmed),
        _case("--resume and --overwrite", again("--resume", "--overwrite"), 2, r"--resume and --overwrite", then=_unharmed),
        _case("--overwrite", again("--overwrite"), 0, r"\S", may_write=("*",), then=_as_base),
        _case("--resume with another rate", again("--resume", train__learning_rate=0.1), 2, r"train\.learning_rate \(was"),
        _case("--resume with another seed", again("--resume", train__seed=9), 2, r"train\.seed \(was"),
        _case("--resume with other factors", again("--resume", adapter__a1=2), 2, r"adapter\.a1 \(was"),
        _case("--resume with fewer steps", again("--resume", train__steps=3), 2, r"train\.steps: 3"),
        _case("--resume of a finished run", again("--resume"), 0, r"\S", then=_as_base),
        _case("--resume-from nowhere", again("--resume-from", "runs/cat"), 2, r"no resume state at runs/cat"),
        _case("--resume-from an adapter", again("--resume-from", FINAL), 2, r"resume state .*dog\.safetensors", cannot),
        _case("the newest state cut", hurt(cut), 0, r"step-000006.*resuming after step 4", then=_as_base),
        _case("a cut state by name", hurt(cut, *one_state), 2, r"step-000006.*cannot be read", cannot),
        _case("a pickle as state", hurt(evil), 0, r"resuming after step 4", then=_as_base),
        _case("every state cut", hurt(cut, states=both), 2, r"resume"),
        _case("no state to resume from", hurt(lambda path: shutil.rmtree(path.parent), states=both), 2, r"resume"),
        _case("init_from a pickle", _init_from(adapter_files.pickled), 2, r"is a pickle"),
        _case("init_from another model", _init_from(_sdxl), 2, r"is for family|no layer|there and"),
    ]


def _unharmed(box: Sandbox, seen: Seen) -> None:
    for path in (base(box.shared) / "runs" / "dog").rglob("*"):
        if path.is_file():
            here = box.folder / path.relative_to(base(box.shared))
            assert here.read_bytes() == path.read_bytes(), f"{here.name} was changed"


def _sdxl(path: Path, canary: Path) -> None:
    adapter_files.native(path, "sdxl")


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

    damages = {"cut": lambda path: path.write_bytes(path.read_bytes()[:-9]), "with a flipped bit": flip, "empty": empty,
               "pickles": evil}  # fmt: skip
    return [_case(f"cache entries {name}", hurt(damage), 0, r"made in", then=_as_base) for name, damage in damages.items()]


def _models() -> list[Case]:
    """A model folder that lacks a part, or holds something else in its place."""

    def without(part: str, damage: Callable[[Path, Path], Any] | None = None) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            from diffusekrona_train.families.source import ASSETS

            arguments = fresh(box, {"model": "model", "data.resolution": 64, "adapter.a1": 4, "adapter.a2": 4}, cache=False)
            shutil.copytree(ASSETS / "toybox" / "pipe", box.folder / "model")
            place = box.folder / "model" / part
            if damage is not None:
                damage(place, box.canary())
            elif place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
            return arguments

        return make

    def cut(path: Path, canary: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def pickle_instead(path: Path, canary: Path) -> None:
        path.unlink()
        adapter_files.pickled(path.with_suffix(".bin"), canary, "zip")

    def junk(path: Path, canary: Path) -> None:
        path.write_text("{")

    unet = "unet/diffusion_pytorch_model.safetensors"
    part = "one sentence for a missing part, told apart by its name"
    return [
        *(
            _case(f"a model without {name}", without(name), 2, name.split("/")[0], part)
            for name in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler", unet, "unet/config.json")
        ),
        _case("a model whose weights are cut", without(unet, cut), 2, r"unet|denoiser"),
        _case("a model of pickles", without(unet, pickle_instead), 2, r"unet|pickle|safetensors"),
        _case("a model with a broken config", without("unet/config.json", junk), 2, r"config|unet"),
    ]


def _others() -> list[Case]:
    """More processes than one."""
    two = r"""
    port=$((20000 + RANDOM % 20000))
    export MASTER_ADDR=127.0.0.1 MASTER_PORT=$port WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 ACCELERATE_USE_CPU=true
    run() { "$PYTHON" -m diffusekrona_train --config dog.yaml; }
    RANK=0 LOCAL_RANK=0 run & other=$!
    RANK=1 LOCAL_RANK=1 KRONA_FAULT=step:2:SIGKILL run 2>/dev/null & one=$!
    wait $one; echo "one ended with $?"; SECONDS=0
    wait $other; status=$?; echo "the other after $SECONDS s"
    exit $status
    """

    def pair(box: Sandbox) -> list[str]:
        fresh(box, {"train.steps": 50, "validation.every": 0})
        return ["command:", "bash", "-c", two]

    def within_a_minute(box: Sandbox, seen: Seen) -> None:
        assert "one ended with 137" in seen.out, f"the one was not killed: {seen.out[-300:]}"
        seconds = int(seen.out.split("the other after ")[1].split(" s")[0])
        assert seconds < 60, f"the other went on for {seconds} s"

    launched = {"WORLD_SIZE": "2", "RANK": "0"}
    return [
        _case("one of two processes killed", pair, 1, r"\S", how="spawn", then=within_a_minute, seconds=300),
        _case("a launcher that started one process for two", fresh, 2, r"WORLD_SIZE.*--multi_gpu", env=launched),
    ]
