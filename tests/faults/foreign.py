"""More cases of the area adapters: descriptions that lie, files of other models and tools, paths that are no file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.faults import adapter_files as files
from tests.faults.adapters import TO_LORA, adapter_case, dog
from tests.faults.doors import Seen
from tests.faults.harness import Case
from tests.faults.sandbox import Sandbox


def cases() -> list[Case]:
    return _own_json() + _others() + _paths()


def _own_json() -> list[Case]:
    """The project's own JSON, missing, broken, hostile."""

    def own(edit: Callable[[dict], Any]) -> Callable[[Sandbox], None]:
        return lambda box: files.edit_json(dog(box), edit)

    def text(content: str) -> Callable[[Sandbox], None]:
        return lambda box: files.edit_metadata(dog(box), lambda metadata: metadata.update({files.OWN_KEY: content}))

    def hostile(prompt: str, **more: Any) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            files.edit_json(dog(box), lambda info: info.update({"prompt": prompt, "token": prompt, "class": prompt}))
            return ["inspect", "factors", "dog.safetensors", "--output", "out"]

        return make

    def first_options(info: dict, value: Any) -> None:
        info["options"][info["layers"][0]] = value

    damaged = "each is damage in the same JSON, named in brackets"
    return [
        adapter_case("own JSON broken", text("{"), r"JSON under 'diffusekrona' is damaged", damaged),
        adapter_case("own JSON a list", text("[]"), r"JSON under 'diffusekrona' is damaged", damaged),
        adapter_case("own JSON nested deep", text("[" * 100_000), r"JSON under 'diffusekrona' is damaged", damaged),
        adapter_case(
            "own JSON without an adapter", own(lambda info: info.pop("adapter")), r"is damaged .*adapter", damaged
        ),
        adapter_case(
            "adapter of another version", own(lambda info: info["adapter"].update(news=1)), r"damaged.*news", damaged
        ),
        adapter_case("layers not as many as widths", own(lambda info: info["widths"].pop()), r"is damaged", damaged),
        adapter_case(
            "widths in words",
            own(lambda info: info.update(widths=[["a", "b"]] * len(info["widths"]))),
            r"is damaged",
            damaged,
        ),
        adapter_case(
            "options of a layer missing", own(lambda info: info.update(options={})), r"no options for layer", damaged
        ),
        adapter_case("options a number", own(lambda info: first_options(info, 7)), r"is damaged", damaged),
        adapter_case("options without a1", own(lambda info: first_options(info, {})), r"is damaged", damaged),
        adapter_case(
            "a1 of 0 in the options", own(lambda info: first_options(info, {"a1": 0, "a2": 4})), r"is damaged", damaged
        ),
        adapter_case("family a list", own(lambda info: info.update(family=["sdxl"])), r"is damaged", damaged),
        adapter_case(
            "a family nobody knows",
            own(lambda info: info.update(family="flux9")),
            r"is for family 'flux9'; this version knows",
        ),
        adapter_case(
            "markup in the prompt", hostile("<script>alert(1)</script>"), "", status=0, exists=("out/*",), then=_escaped
        ),
        adapter_case(
            "terminal codes in the prompt", hostile("\x1b[31mred\x1b]0;x\x07"), "", status=0, exists=("out/*",)
        ),
        adapter_case("10 MB of prompt", hostile("sks " * 2_500_000), "", status=0, exists=("out/*",)),
        adapter_case(
            "a path as model", own(lambda info: info.update(model="../../etc")), "", status=0, exists=("out/*",)
        ),
    ]


def _escaped(box: Sandbox, seen: Seen) -> None:
    for page in box.find("out/**/*.html"):
        assert "<script>alert(1)" not in page.read_text("utf-8"), f"{page.name} holds the markup as it came"


def _others() -> list[Case]:
    """Files of other models and other tools."""

    def sdxl(box: Sandbox) -> list[str]:
        dog(box, alias="sdxl", blocks=["mid_block"], a2=64)
        return ["convert", "dog.safetensors", "out/model", "--to", "merged", "--model", "toybox"]

    def sd15(box: Sandbox) -> list[str]:
        dog(box, alias="sd15", blocks=["mid_block"])
        return ["convert", "dog.safetensors", "out/model", "--to", "merged", "--model", "toybox"]

    def no_metadata(box: Sandbox) -> None:
        path = dog(box)
        header, data = files.header_and_data(path)
        header.pop("__metadata__")
        files.with_header(path, header, data)

    def somebodys_lora(box: Sandbox) -> list[str]:
        no_metadata_lora(box)
        return [*TO_LORA[:-1], "lokr", "--model", "toybox"]

    def no_metadata_lora(box: Sandbox) -> None:
        path = dog(box, type="lora", a1=4)
        files.edit_metadata(path, lambda metadata: metadata.clear())

    def authors(*arguments: str, half: bool = False) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            files.authors(box.path("dog.safetensors"), half=half)
            return ["convert", "dog.safetensors", "out/dog.safetensors", *arguments]

        return make

    importing = ("--from", "diffusekrona", "--model", "toybox")
    return [
        adapter_case("an SDXL file for the toybox", sdxl, r"is for family 'sdxl'.*(no layer|there)"),
        adapter_case("an SD 1.5 file for the toybox", sd15, r"is for family 'sd' .*this model is of family 'sdxl'"),
        adapter_case("no metadata and no model", no_metadata, r"--model"),
        adapter_case("somebody's LoRA as LoKr", somebodys_lora, r"LoKr|lokr|LoRA|lora"),
        adapter_case("the authors' file, unannounced", authors("--to", "lora"), r"--from diffusekrona"),
        adapter_case(
            "the authors' file, half a pair", authors("--to", "native", *importing, half=True), r"tensor up is missing"
        ),
        adapter_case("the authors' file as plain LoKr", authors("--to", "lokr", *importing), r"row|LoRA"),
        adapter_case(
            "the authors' file", authors("--to", "native", *importing), "", status=0, exists=("out/dog.safetensors",)
        ),
        adapter_case("our own as the authors'", _ours_as_theirs, r"is extra: the authors' keys read"),
        adapter_case("a pipeline as adapter", _pipeline_weights, r"is extra: not part of a LoKr"),
    ]


def _ours_as_theirs(box: Sandbox) -> list[str]:
    dog(box)
    return [
        "convert",
        "dog.safetensors",
        "out/x.safetensors",
        "--to",
        "native",
        "--from",
        "diffusekrona",
        "--model",
        "toybox",
    ]


def _pipeline_weights(box: Sandbox) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"conv_in.weight": torch.ones(4, 4)}, box.path("dog.safetensors"))


def _paths() -> list[Case]:
    """What stands where the file, or the output, should be."""

    def folder(box: Sandbox) -> None:
        box.path("dog.safetensors/x")

    def link(box: Sandbox) -> None:
        dog(box).rename(box.path("real.safetensors"))
        box.path("dog.safetensors").symlink_to("real.safetensors")

    def circle(box: Sandbox) -> None:
        box.path("dog.safetensors").symlink_to("dog.safetensors")

    def pipe(box: Sandbox) -> None:
        os.mkfifo(box.path("dog.safetensors"))

    def onto_folder(box: Sandbox) -> None:
        dog(box)
        box.write("out/dog.safetensors/keep.txt", "mine")

    def onto_file(box: Sandbox) -> None:
        dog(box)
        box.write("out", "a file where the folder should be")

    def onto_itself(box: Sandbox) -> list[str]:
        dog(box)
        return ["convert", "dog.safetensors", "dog.safetensors", "--to", "lora"]

    def arguments(*more: str) -> Callable[[Sandbox], list[str]]:
        return lambda box: dog(box) and ["convert", "dog.safetensors", "out/dog.safetensors", *more]

    def closed(box: Sandbox) -> None:
        dog(box).chmod(0)

    return [
        adapter_case("a folder", folder, r"is a folder; give the \.safetensors file|dog\.safetensors"),
        adapter_case("no such file", lambda box: None, r"dog\.safetensors: no such file"),
        adapter_case("a link to a good file", link, "", status=0, exists=("out/dog.safetensors",)),
        adapter_case("a link to itself", circle, r"dog\.safetensors", "a link in a circle leads to no file"),
        adapter_case("a named pipe", pipe, r"dog\.safetensors.*not a regular file"),
        adapter_case(
            "no permission",
            closed,
            r"dog\.safetensors.*(ermission|not readable)",
            how="fork",
            limits={"unprivileged": 1},
        ),
        adapter_case("output is a folder", onto_folder, r"out/dog\.safetensors", absent=()),
        adapter_case("output's folder is a file", onto_file, r"out", absent=(), may_write=()),
        adapter_case("output is the input", onto_itself, r"dog\.safetensors"),
        adapter_case("unknown format", arguments("--to", "lara"), r"lara.*lora"),
        adapter_case("rank 0", arguments("--to", "lora", "--rank", "0"), r"rank"),
        adapter_case("rank in words", arguments("--to", "lora", "--rank", "four"), r"--rank.*integer"),
        adapter_case("unknown precision", arguments("--to", "lora", "--dtype", "fp8"), r"fp8.*fp16"),
        adapter_case("too large for fp16", _too_large, r"too large for fp16"),
        adapter_case(
            "no room on the disk",
            lambda box: dog(box) and None,
            r"out/dog\.safetensors: File too large",
            "a full disk is one sentence with the name of the file",
            status=1,
            how="fork",
            limits={"file_size": 3000},
        ),
    ]


def _too_large(box: Sandbox) -> list[str]:
    def grow(tensors: dict) -> None:
        for name in tensors:
            if name.endswith("lokr_w2"):
                tensors[name] *= 1e9

    files.edit_tensors(dog(box), grow)
    return ["convert", "dog.safetensors", "out/dog.safetensors", "--to", "native", "--dtype", "fp16"]
