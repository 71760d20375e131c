"""Cases of the area sampling: what krona-sample, krona-eval and krona-inspect are given, and what is in their way."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.faults import adapter_files
from tests.faults.adapters import dog
from tests.faults.doors import Seen, fork
from tests.faults.harness import Case
from tests.faults.sandbox import Sandbox

OUT = ("out/*",)
SAMPLE = ("sample", "dog.safetensors", "A [V] dog", "--steps", "2", "--output", "out")
PICTURE = ("out/*.png",)


def cases() -> list[Case]:
    return _refused() + _inspect() + _drawn() + _evaluation()


def _case(name: str, make: Callable[[Sandbox], Any], status: int, says: str, same_as: str = "", **more: Any) -> Case:
    settings = {"fast": True, "may_write": OUT, "absent": PICTURE if status else (), "seconds": 90, **more}
    return Case("sampling", name, make, status, says, same_as, **settings)


def _with(*arguments: str) -> Callable[[Sandbox], list[str]]:
    """The door on a good adapter file."""
    return lambda box: dog(box) and list(arguments)


def _sample(*more: str) -> Callable[[Sandbox], list[str]]:
    return _with(*SAMPLE, *more)


def _refused() -> list[Case]:
    """Mistakes that end before a model is loaded."""

    def run_folder(*names: str) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            for name in names:
                box.take(dog(box), f"runs/dog/{name}")
            box.path("runs/dog/x")
            return ["sample", "runs/dog", "A [V] dog", "--output", "out"]

        return make

    def prompts(content: bytes) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            box.write("prompts.txt", content)
            return _with("sample", "dog.safetensors", "--prompts-file", "prompts.txt")(box)

        return make

    def nameless(box: Sandbox) -> list[str]:
        adapter_files.edit_json(dog(box), lambda info: info.pop("token"))
        return list(SAMPLE)

    def two_families(box: Sandbox) -> list[str]:
        dog(box)
        adapter_files.native(box.path("cat.safetensors"), "sd15")
        return ["sample", "--adapter", "dog.safetensors", "--adapter", "cat.safetensors:0.5", "A [V1] [V2]"]

    def evil(box: Sandbox) -> list[str]:
        adapter_files.pickled(box.path("dog.safetensors"), box.canary())
        return list(SAMPLE)

    number = "one rule for numbers of pixels"
    return [
        _case("no prompt", _with("sample", "dog.safetensors"), 2, r"no prompt is given"),
        _case("a prompt without a file", _with("sample", "A [V] dog"), 2, r"is a prompt; put a run folder"),
        _case("file missing", _with("sample", "dogg.safetensors", "A [V]"), 2, r"dogg\.safetensors.*did you mean"),
        _case("a pickle to draw with", evil, 2, r"is a pickle, which runs code", "the same reader at every door"),
        _case("a run folder without an adapter", run_folder(), 2, r"holds neither an adapter file nor checkpoints"),
        _case("a run folder with two files", run_folder("a.safetensors", "b.safetensors"), 2, r"holds 2 adapter files"),
        _case(
            "checkpoint that is not there",
            lambda box: [*run_folder("dog.safetensors")(box), "--checkpoint", "7"],
            2,
            r"--checkpoint 7: .*has checkpoints at steps none",
        ),
        _case("checkpoint of a file", _sample("--checkpoint", "7"), 2, r"--checkpoint 7 needs a run folder"),
        _case("steps 0 to draw", _sample("--steps", "0"), 2, r"steps is 0; give 1 or more"),
        _case("guidance -1", _sample("--guidance", "-1"), 2, r"guidance is -1"),
        _case("guidance nan", _sample("--guidance", "nan"), 2, r"guidance is nan", "the same rule"),
        _case("height 100", _sample("--height", "100"), 2, r"height is 100; give a multiple of 8"),
        _case("width -8", _sample("--width", "-8"), 2, r"width is -8; give a multiple of 8", number),
        _case("seed -1", _sample("--seed", "-1"), 2, r"--seed"),
        _case("no images asked for", _sample("--num-images", "0"), 2, r"--num-images", "one rule of the option parser"),
        _case("scheduler misspelt", _sample("--scheduler", "dimm"), 2, r"'dimm' is unknown: did you mean 'ddim'"),
        _case("sweep without values", _sample("--sweep", "guidance"), 2, r"--sweep 'guidance': write OPTION=v1,v2"),
        _case(
            "sweep of nothing known", _sample("--sweep", "colour=1"), 2, r"--sweep colour: unknown option; use one of"
        ),
        _case("sweep in words", _sample("--sweep", "steps=few"), 2, r"--sweep 'steps=few': a value is not of type int"),
        _case("sweep to 0 steps", _sample("--sweep", "steps=2,0"), 2, r"steps is 0", "the same rule in a sweep"),
        _case("dtype fp8", _sample("--dtype", "fp8"), 2, r"--dtype 'fp8': there are"),
        _case("offload to the moon", _sample("--offload", "moon"), 2, r"--offload 'moon': there are"),
        _case(
            "a second subject with one adapter",
            _with("sample", "dog.safetensors", "A [V2] dog"),
            2,
            r"\[V2\] has no adapter",
        ),
        _case("a file that names no identifier", nameless, 2, r"has no identifier token for \[V\]; give --token"),
        _case("adapters of two families", two_families, 2, r"adapters are for different families \(sd, sdxl\)"),
        _case(
            "model misspelt to draw",
            _sample("--model", "toybix"),
            2,
            r"did you mean 'toybox'",
            "one rule for model names at every door",
        ),
        _case("prompts file empty", prompts(b"# none\n"), 2, r"prompts\.txt' holds no prompt"),
        _case("prompts file not UTF-8", prompts(b"caf\xe9"), 2, r"prompts\.txt' is no UTF-8 text"),
        _case("prompts file missing", _with("sample", "dog.safetensors", "--prompts-file", "no.txt"), 2, r"no\.txt"),
        _case(
            "a strength in words",
            _with("sample", "--adapter", "dog.safetensors:much", "A [V]"),
            2,
            r"dog\.safetensors:much",
            "what is no strength is part of the name",
        ),
    ]


def _inspect() -> list[Case]:
    def params(*more: str) -> Callable[[Sandbox], list[str]]:
        return lambda box: ["inspect", "params", *more]

    return [
        _case(
            "counting a model misspelt",
            params("--model", "sdx"),
            2,
            r"'sdx'.*did you mean 'sdxl'",
            "one rule for model names at every door",
        ),
        _case("counting a1 of 7", params("--model", "sdxl", "--a1", "7"), 2, r"a1=7 does not divide"),
        _case("counting rank 0", params("--model", "sdxl", "--adapter", "lora", "--rank", "0"), 2, r"rank.*0"),
        _case("counting an unknown adapter", params("--model", "sdxl", "--adapter", "lara"), 2, r"lara"),
        _case("counting a1 of 2^70", params("--model", "sdxl", "--a1", str(2**70)), 2, r"a1"),
        _case(
            "picturing a folder",
            lambda box: box.path("d/x").parent and ["inspect", "factors", "d", "--output", "out"],
            2,
            r"^error: d: is a folder",
        ),
    ]


def _drawn() -> list[Case]:
    """Cases that draw pictures with the toybox, in forked children."""

    def slow(name: str, make: Any, status: int, says: str, same_as: str = "", **more: Any) -> Case:
        settings = {"how": "fork", "fast": False, "seconds": 180, "absent": (), **more}
        return _case(name, make, status, says, same_as, **settings)

    def there_already(box: Sandbox) -> list[str]:
        arguments = _sample("--num-images", "2")(box)
        seen = fork(arguments, box.folder, {}, {}, 180)
        assert seen.status == 0, f"drawing failed: {seen.err[-500:]}"
        box.find("out/*.png")[0].write_bytes(b"mine")
        return arguments

    def kept(box: Sandbox, seen: Seen) -> None:
        assert box.find("out/*.png")[0].read_bytes() == b"mine", "a picture that stood there was drawn over"

    def broken_manifest(box: Sandbox) -> list[str]:
        box.write("out/manifest.jsonl", '{"file": "x.png"}\n{"fi')
        return _sample()(box)

    def out_is_file(box: Sandbox) -> list[str]:
        box.write("out", "a file")
        return _sample()(box)

    def out_closed(box: Sandbox) -> list[str]:
        box.path("out/x").parent.chmod(0o555)
        return _sample()(box)

    def hostile(box: Sandbox) -> list[str]:
        dog(box)
        return ["sample", "dog.safetensors", "../../<b>\x1b[31m [V]\n" + "word " * 3000, *SAMPLE[3:]]

    def one_file_each(box: Sandbox, seen: Seen) -> None:
        lines = [json.loads(line) for line in box.folder.joinpath("out/manifest.jsonl").read_text().splitlines()]
        assert len(lines) == len(box.find("out/*.png")), "the manifest and the pictures do not agree"

    def killed_goes_on(box: Sandbox, seen: Seen) -> None:
        before = {path.name: path.read_bytes() for path in box.find("out/*.png")}
        again = fork(_many(box), box.folder, {}, {}, 180)
        assert again.status == 0, f"the second call ends with {again.status}: {again.err[-500:]}"
        assert len(box.find("out/*.png")) == 12, "not all pictures are there"
        assert all(box.folder.joinpath("out", name).read_bytes() == raw for name, raw in before.items()), "drawn twice"

    return [
        slow("a picture", _sample(), 0, r"1 images? in out", exists=PICTURE, then=one_file_each),
        slow("a prompt that is hostile", hostile, 0, r"\S", exists=PICTURE, then=one_file_each),
        slow("pictures that stand there", there_already, 0, r"were there already", then=kept, may_write=OUT),
        slow("a manifest cut by a kill", broken_manifest, 0, r"\S", exists=PICTURE),
        slow("pictures into a file", out_is_file, 2, r"out: File exists", "a file in the way", may_write=()),
        slow("pictures into a closed folder", out_closed, 2, r"out.*ermission", limits={"unprivileged": 1}),
        slow(
            "no room for pictures",
            _sample(),
            1,
            r"out/.*\.png: File too large",
            "a full disk is one sentence with the name of the file",
            limits={"file_size": 1500},
            absent=PICTURE,
        ),
        slow(
            "drawing ended by SIGTERM", _many, 143, r"", limits={"kill_after": 6, "kill_with": 15}, then=killed_goes_on
        ),
        slow("drawing ended by SIGINT", _many, 130, r"", limits={"kill_after": 6, "kill_with": 2}, then=killed_goes_on),
        slow("drawing ended by SIGKILL", _many, 137, r"", limits={"kill_after": 6}, then=killed_goes_on),
        slow(
            "merging ended by a full disk",
            _with("convert", "dog.safetensors", "out/model", "--to", "merged"),
            1,
            r"File too large|space",
            limits={"file_size": 100_000},
            absent=("out/model",),
        ),
    ]


def _many(box: Sandbox) -> list[str]:
    dog(box)
    return ["sample", "dog.safetensors", "A [V] dog", "--steps", "12", "--output", "out", "--num-images", "12"]


def _evaluation() -> list[Case]:
    """krona-eval: mistakes that end before an encoder is loaded, and an encoder that is none."""

    def evaluate(*arguments: str, pictures: int = 2) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            box.photos(2)
            box.path("made/x")
            if pictures:
                box.photos(pictures, "made")
                box.write("made/manifest.jsonl", "".join(_line(index) for index in range(pictures)))
            return ["eval", *arguments, "--output", "out"]

        return make

    def spoilt(content: bytes) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            arguments = evaluate(*TOYBOX)(box)
            box.write("made/01.png", content)
            return arguments

        return make

    def suite(text: str) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            box.write("suite.yaml", text)
            box.path("made/x")
            return ["eval", "suite", "suite.yaml", "--generated", "made", "--output", "out"]

        return make

    def no_prompt(box: Sandbox) -> list[str]:
        arguments = evaluate(*TOYBOX)(box)
        box.folder.joinpath("made/manifest.jsonl").unlink()
        return arguments

    def best(box: Sandbox) -> list[str]:
        box.path("runs/dog/x")
        return ["eval", "best", "runs/dog"]

    images = ("images", "made")
    return [
        _case("photos not named", evaluate(*images), 2, r"--photos is missing"),
        _case("photos not there", evaluate(*images, "--photos", "fotos"), 2, r"fotos is not there"),
        _case(
            "pictures not there",
            evaluate("images", "mode", "--photos", "photos"),
            2,
            r"mode is not a folder of images",
        ),
        _case("no pictures", evaluate(*TOYBOX, pictures=0), 2, r"made contains no image"),
        _case("a picture without a prompt", no_prompt, 2, r"00\.png: its prompt is not known"),
        _case("a picture of zero bytes", spoilt(b""), 2, r"01\.png: the file is empty", "the same reader of images"),
        _case("a picture that is text", spoilt(b"text"), 2, r"01\.png: is not an image", "the same reader of images"),
        _case("an encoder that is nowhere", evaluate(*TOYBOX[:4], "--clip", "no/clip"), 2, r"encoder 'no/clip' cannot"),
        _case(
            "a folder as encoder", evaluate(*TOYBOX[:4], "--clip", "photos"), 2, r"encoder 'photos' cannot", "encoder"
        ),
        _case(
            "a suite that is none", evaluate("suite", "dreambanch", "--generated", "made"), 2, r"dreambanch is neither"
        ),
        _case("a suite of runs and pictures", evaluate("suite", "toybox"), 2, r"either --runs .* or --generated"),
        _case("a suite of nothing known", suite("name: x\nrows: 7\nmore: 1\n"), 2, r"suite"),
        _case("a suite with a python tag", suite("name: !!python/name:os.system x\n"), 2, r"tag", "one YAML reader"),
        _case("best of no run", best, 2, r"runs/dog: no config\.yaml in it"),
        _case(
            "comparing by nothing known",
            lambda box: dog(box) and ["eval", "compare", "dog.safetensors", "--sort", "luck"],
            2,
            r"--sort 'luck' is not a metric",
        ),
    ]


TOYBOX = ("images", "made", "--photos", "photos", "--clip", "toybox", "--dino", "toybox")


def _line(index: int) -> str:
    return json.dumps({"file": f"{index:02d}.png", "prompt": "A sks dog", "seed": index}) + "\n"
