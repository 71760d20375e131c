"""Cases of the area runs: death by signal in each phase, memory that ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.doors import Seen, fork
from tests.faults.harness import Case
from tests.faults.sandbox import Sandbox

FINAL = "runs/dog/dog.safetensors"
TRAIN = ["train", "--config", "dog.yaml"]
EXIT = {"SIGKILL": 137, "SIGTERM": 143, "SIGINT": 130}

# phase, step of the seam, newest state after a kill, what stands and what not when the child was killed there
PHASES: list[tuple[str, int, int, tuple[str, ...], tuple[str, ...]]] = [
    ("setup", 0, 0, (), ("runs/dog/config.yaml", "runs/cache/*")),
    ("cache", 1, 0, ("runs/cache/*/*/*.safetensors",), ("runs/dog/config.yaml",)),
    ("step", 2, 2, ("runs/dog/checkpoints/step-000002/*",), ("runs/dog/checkpoints/step-000003/*",)),
    ("adapter", 2, 1, ("runs/dog/samples/step-000000/*.png",), ("runs/dog/checkpoints/step-000002/*.safetensors",)),
    ("state", 2, 1, ("runs/dog/checkpoints/step-000002/*",), ("runs/dog/resume/step-000002/state.safetensors",)),
    ("rotation", 2, 2, ("runs/dog/resume/step-000002/*",), ("runs/dog/checkpoints/step-000003/*",)),
    ("validation", 4, 4, ("runs/dog/checkpoints/step-000004/*",), ("runs/dog/samples/step-000004/*",)),
    ("end", 4, 4, ("runs/dog/checkpoints/step-000004/*", "runs/dog/samples/step-000004/*"), (FINAL,)),
]


def cases() -> list[Case]:
    return _signals() + _memory()


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


def training_case(
    name: str, make: Callable[[Sandbox], Any], status: int, says: str, same_as: str = "", **more: Any
) -> Case:
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
                training_case(
                    f"{signal_name} in {phase} {step}",
                    lambda box, phase=phase: fresh(box, cache=phase not in ("setup", "cache")),
                    status,
                    says,
                    env={"KRONA_FAULT": f"{phase}:{step}:{signal_name}"},
                    then=then,
                )
            )
    return table


def as_base(box: Sandbox, seen: Seen) -> None:
    equal_to_base(box)


def _memory() -> list[Case]:
    def fault(at: str) -> dict[str, Any]:
        return {"env": {"KRONA_FAULT": f"{at}:oom"}}

    plain = {"train.memory": "plain"}
    same = "one sentence names the settings, wherever memory ends"
    return [
        training_case(
            "out of memory in the first step",
            fresh,
            0,
            r"out of memory.*continuing with checkpointing",
            **fault("step:0"),
        ),
        training_case(
            "out of memory, plain asked for",
            lambda box: fresh(box, plain),
            0,
            r"out of memory.*continuing without keeping keys and values",
            **fault("step:0"),
        ),
        training_case(
            "out of memory late",
            fresh,
            0,
            r"out of memory.*continuing with checkpointing",
            **fault("step:3"),
        ),
        training_case(
            "out of memory late, checkpointing asked for",
            lambda box: fresh(box, {"train.memory": "checkpointing"}),
            0,
            r"out of memory.*continuing without keeping keys and values",
            **fault("step:3"),
        ),
        training_case(
            "out of memory in the cache",
            lambda box: fresh(box, cache=False),
            1,
            r"out of device memory while.*data\.resolution",
            same,
            **fault("cache:0"),
        ),
        training_case(
            "out of memory in a validation", fresh, 0, r"the run continues", then=as_base, **fault("validation:4")
        ),
        training_case(
            "numbers that overflow",
            lambda box: fresh(box, {"adapter.scale": 1e38}),
            1,
            r"not finite.*train\.learning_rate",
            absent=(FINAL,),
        ),
    ]
