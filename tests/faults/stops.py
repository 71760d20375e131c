"""Cases of the area sampling: a signal while krona-sample, krona-eval or krona-convert writes a file; then once more.

The signal arrives when the file is written beside its target and would take its name. No half file stands, nothing of
what stood before is harmed, and the same command ends well when it is called again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.faults.adapters import dog
from tests.faults.doors import Seen, fork
from tests.faults.harness import Case
from tests.faults.runs import EXIT, base
from tests.faults.sandbox import Sandbox

ENCODERS = ("--clip", "toybox", "--dino", "toybox")


def cases() -> list[Case]:
    # door and what it writes; file whose name it is about to take; what must not stand then; what must at the end
    table: list[tuple[str, Callable[[Sandbox], list[str]], str, tuple[str, ...], tuple[str, ...]]] = [
        ("krona-sample at a picture", _sample, "*-seed0*.png", ("out/0*.png",), ("out/*.png",)),
        ("krona-sample at the manifest", _sample, "*manifest.jsonl", (), ("out/manifest.jsonl",)),
        ("krona-sample at the sheet", _sample, "*sheet*.png", ("out/*sheet*.png",), ("out/*sheet*.png",)),
        ("krona-eval at the scores", _scores, "*scores.json", ("out/scores.json",), ("out/scores.json",)),
        ("krona-eval at the page", _scores, "*report.html", ("out/report.html",), ("out/report.html",)),
        ("krona-eval best at a picture", _best, "*.png", (), ("runs/dog/evaluation/best.json",)),
        ("krona-convert at its file", _convert, "*lora.safetensors", ("out/lora.safetensors",), ("out/l*",)),
        ("krona-convert at a pipeline", _merged, "*out/model", ("out/model",), ("out/model/model_index.json",)),
    ]
    return [
        Case(
            "sampling",
            f"{name}: {what}",
            make,
            status,
            "" if name == "SIGKILL" else "stopped",
            may_write=("out/*",),
            absent=missing,
            how="fork",
            limits={"signal_at": (pattern, signal.Signals[name])},
            then=_again(make, wanted),
            seconds=240,
        )
        for what, make, pattern, missing, wanted in table
        for name, status in EXIT.items()
    ]


def _again(make: Callable[[Sandbox], list[str]], wanted: tuple[str, ...]) -> Callable[[Sandbox, Seen], None]:
    def then(box: Sandbox, seen: Seen) -> None:
        left = list(box.folder.rglob(".writing-*"))
        assert not left or seen.signal == signal.SIGKILL, f"{left[0]} was left"
        done = fork(make(box), box.folder, {}, {}, 240)
        assert done.status == 0, f"the same command ends with {done.status}: {done.err[-500:]}"
        for pattern in wanted:
            assert box.find(pattern), f"{pattern} is missing after the second call"

    return then


def _sample(box: Sandbox) -> list[str]:
    dog(box)
    return ["sample", "dog.safetensors", "A [V] dog", "--steps", "1", "--output", "out", "--sheet"]


def _convert(box: Sandbox) -> list[str]:
    dog(box)
    return ["convert", "dog.safetensors", "out/lora.safetensors", "--to", "lokr"]


def _merged(box: Sandbox) -> list[str]:
    dog(box)
    return ["convert", "dog.safetensors", "out/model", "--to", "merged"]


def _scores(box: Sandbox) -> list[str]:
    for folder in ("photos", "made"):
        box.photos(2, folder)
    lines = [f'{{"file": "{i:02d}.png", "prompt": "A sks dog", "seed": {i}}}\n' for i in range(2)]
    box.write("made/manifest.jsonl", "".join(lines))
    return ["eval", "images", "made", "--photos", "photos", *ENCODERS, "--output", "out"]


def _best(box: Sandbox) -> list[str]:
    if not (box.folder / "runs").exists():
        box.take(base(box.shared) / "photos", "photos")
        box.take(base(box.shared) / "runs" / "dog", "runs/dog")
    return ["eval", "best", "runs/dog", "--num-images", "1", "--prompt", "A [V] dog", *ENCODERS]
