"""Cases of the area runs: a disk that is full at each file that a run, and the other doors, write.

Three ways to be full: the seam KRONA_FAULT at a moment, no space when a named file would take its name, and a limit on
the size of any file, which ends a write in its middle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.faults.adapters import dog
from tests.faults.doors import Seen, fork
from tests.faults.harness import Case
from tests.faults.runs import FINAL, TRAIN, as_base, fresh, resume_to_the_end, training_case
from tests.faults.sandbox import Sandbox

SPACE = r"[Nn]o space left"
CHECKPOINT = r"checkpoint of step {} cannot be written \(No space left on device\)"
ONE_FILE = "one sentence for each file, with its name"


def cases() -> list[Case]:
    return _moments() + _ends() + _goes_on() + _other_doors()


def goes_on(above: int) -> Callable[[Sandbox, Seen], None]:
    """--resume continues after step `above`, once there is room again, and ends as a run on a good disk."""
    return lambda box, seen: resume_to_the_end(box, above)


def full_at(pattern: str) -> dict[str, Any]:
    return {"limits": {"full_at": pattern}}


def _moments() -> list[Case]:
    """The seam, and files that may not grow."""

    def fault(at: str) -> dict[str, Any]:
        return {"env": {"KRONA_FAULT": f"{at}:full"}}

    def limit(size: int) -> dict[str, Any]:
        return {"limits": {"file_size": size}}

    def uncached(box: Sandbox) -> list[str]:
        return fresh(box, cache=False)

    writes = "the same sentence for each file of a checkpoint"
    return [
        training_case("disk full in the cache", uncached, 1, SPACE, ONE_FILE, then=goes_on(0), **fault("cache:1")),
        training_case(
            "disk full at an adapter", fresh, 1, CHECKPOINT.format(3), writes, then=goes_on(2), **fault("adapter:3")
        ),
        training_case(
            "disk full at a state", fresh, 1, CHECKPOINT.format(3), writes, then=goes_on(2), **fault("state:3")
        ),
        training_case("disk full at the first", fresh, 1, CHECKPOINT.format(1), then=goes_on(0), **fault("adapter:1")),
        training_case(
            "disk full at a validation", fresh, 0, "the run continues", then=as_base, **fault("validation:4")
        ),
        training_case("disk full at the end", fresh, 1, SPACE, ONE_FILE, then=goes_on(4), **fault("end:4")),
        training_case(
            "no file above 2 kB", uncached, 1, r"File too large", absent=(FINAL,), then=goes_on(0), **limit(2000)
        ),
        training_case(
            "no file above 20 kB",
            fresh,
            1,
            r"checkpoint of step 1 cannot be written \(File too",
            then=goes_on(0),
            **limit(20_000),
        ),
        training_case(
            "no file above 100 kB",
            fresh,
            1,
            r"checkpoint of step 1 cannot be written \(File too",
            "a state is larger than an adapter",
            absent=("runs/dog/resume/*/*",),
            then=goes_on(0),
            **limit(100_000),
        ),
    ]


def _ends() -> list[Case]:
    """Files without which a run cannot go on: it ends with one line, and --resume continues."""

    def longer(box: Sandbox) -> list[str]:
        """A run of two steps that is to go on to four: its metrics are rewritten first."""
        fresh(box, {"train.steps": 2, "validation.every": 2})
        seen = fork(TRAIN, box.folder, {}, {}, 180)
        assert seen.status == 0, f"the first half ends with {seen.status}: {seen.err[-500:]}"
        box.config()
        return [*TRAIN, "--resume"]

    def class_images(box: Sandbox) -> list[str]:
        return fresh(box, {"prior.kind": "images", "prior.images": "class", "prior.count": 2, "validation.steps": 1})

    def ends(name: str, pattern: str, newest: int, says: str = SPACE, make: Any = fresh, why: str = ONE_FILE) -> Case:
        missing = () if make is longer else (FINAL,)  # a run that is to go on has its first adapter already
        return training_case(
            f"no space for {name}", make, 1, says, why, absent=missing, then=goes_on(newest), **full_at(pattern)
        )

    def uncached(box: Sandbox) -> list[str]:
        return fresh(box, cache=False)

    def again(box: Sandbox, seen: Seen) -> None:
        done = fork([*TRAIN, "--resume"], box.folder, {}, {}, 180)
        assert done.status == 0 and box.find("class/*.png"), f"--resume ends with {done.status}: {done.err[-500:]}"

    step = "one sentence for each step"
    return [
        ends("latents", "*/latents/*", 0, r"latents.*No space", uncached),
        ends("text embeddings", "*/text/*", 0, r"cache/text.*No space", uncached),
        ends("the config", "*config.yaml", 0, r"config\.yaml.*No space"),
        ends("the config of a resumed run", "*config.yaml", 2, r"config\.yaml.*No space", longer),
        ends("the metrics of a resumed run", "*metrics.jsonl", 2, r"metrics\.jsonl.*No space", longer),
        ends("a checkpoint", "*step-000003/adapter.safetensors", 2, CHECKPOINT.format(3), why=step),
        ends("a state", "*step-000002/state.safetensors", 1, CHECKPOINT.format(2), why=step),
        ends("the adapter", "*dog.safetensors", 4, r"dog\.safetensors cannot be written.*finish with --resume"),
        training_case(
            "no space for a class image",
            class_images,
            1,
            r"class/class-00000\.png.*No space",
            ONE_FILE,
            may_write=("class/*",),
            absent=("class/*.png", FINAL),
            then=again,
            **full_at("*class-0*.png"),
        ),
    ]


def _goes_on() -> list[Case]:
    """Files that only show what a run does: it says once that they are missing, and ends as it would have."""

    def once(box: Sandbox, seen: Seen) -> None:
        told = [line for line in seen.err.splitlines() + seen.out.splitlines() if "No space left" in line]
        assert len(told) == 1, f"told {len(told)} times: {told[:3]}"
        as_base(box, seen)

    def shown(name: str, pattern: str, says: str, **more: Any) -> Case:
        settings = {"then": once, **full_at(pattern), **more}
        return training_case(f"no space for {name}", fresh, 0, says, exists=(FINAL,), **settings)

    return [
        shown(
            "metrics",
            "*metrics.jsonl",
            r"metrics\.jsonl cannot be written.*No space",
            absent=("runs/dog/metrics.jsonl",),
        ),
        shown("samples", "*/samples/*", r"validation failed .*No space", absent=("runs/dog/samples/*/*.png",)),
        shown("the report", "*report.html", r"report\.html was not written .*No space", absent=("runs/dog/*.html",)),
        shown("the plot", "*loss.png", r"loss\.png was not written .*No space", absent=("runs/dog/loss.png",)),
        shown("the preview", "*dog.png", r"dog\.png was not written .*No space", absent=("runs/dog/dog.png",)),
    ]


def _other_doors() -> list[Case]:
    """The files of the other doors: one line with the file's name, and nothing under it."""

    def case(name: str, make: Any, pattern: str, says: str, **more: Any) -> Case:
        settings = {"how": "fork", "seconds": 180, "may_write": ("out/*",), **full_at(pattern), **more}
        return Case("sampling", f"no space for {name}", make, 1, says, ONE_FILE, **settings)

    def with_dog(*arguments: str) -> Callable[[Sandbox], list[str]]:
        return lambda box: dog(box) and list(arguments)

    def scores(box: Sandbox) -> list[str]:
        for folder in ("photos", "made"):
            box.photos(2, folder)
        lines = [f'{{"file": "{i:02d}.png", "prompt": "A sks dog", "seed": {i}}}\n' for i in range(2)]
        box.write("made/manifest.jsonl", "".join(lines))
        encoders = ["--clip", "toybox", "--dino", "toybox"]
        return ["eval", "images", "made", "--photos", "photos", *encoders, "--output", "out"]

    sample = with_dog("sample", "dog.safetensors", "A [V] dog", "--steps", "1", "--output", "out", "--sheet")
    convert = with_dog("convert", "dog.safetensors", "out/lora.safetensors", "--to", "lokr")
    factors = with_dog("inspect", "factors", "dog.safetensors", "--output", "out")
    init = with_photos("train", "init", "photos", "--class", "dog", "--config", "out.yaml")
    check = with_photos("train", "--config", "dog.yaml", "--check")
    return [
        case("a picture", sample, "*-seed0*.png", r"out/.*\.png: No space", absent=("out/*.png",)),
        case("the manifest", sample, "*manifest.jsonl", r"manifest\.jsonl: No space"),
        case("the sheet", sample, "*sheet*.png", r"sheet.*\.png: No space"),
        case("scores", scores, "*scores.json", r"scores\.json: No space", absent=("out/scores.json",)),
        case("a page of scores", scores, "*report.html", r"report\.html: No space", absent=("out/report.html",)),
        case("a converted file", convert, "*lora.safetensors", r"lora\.safetensors: No space", absent=("out/l*",)),
        case("spectra", factors, "*spectra.json", r"spectra\.json: No space", absent=("out/spectra.json",)),
        case("a first config", init, "*out.yaml", r"out\.yaml: No space", absent=("out.yaml",)),
        case("a sheet of crops", check, "*check.png", r"check\.png: No space", absent=("runs/dog/check.png",)),
    ]


def with_photos(*arguments: str) -> Callable[[Sandbox], list[str]]:
    def make(box: Sandbox) -> list[str]:
        box.photos()
        box.config()
        return list(arguments)

    return make
