"""Cases of the area adapters: files that are broken, hostile, or somebody else's, at the doors that read them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults import adapter_files as files
from scripts.faults.doors import Seen
from scripts.faults.harness import Case
from scripts.faults.sandbox import Sandbox

TO_LORA = ("convert", "dog.safetensors", "out/dog.safetensors", "--to", "lora")
REFUSED_PICKLE = "the same refusal under every suffix"
LENGTHS = "a cut in the header or in the data"
OUT = ("out/*",)


def cases() -> list[Case]:
    return _pickles() + _headers() + _tensors() + _own_json() + _others() + _paths()


def _case(name: str, make: Callable[[Sandbox], Any], says: str, same_as: str = "", **more: Any) -> Case:
    """A case on dog.safetensors (as `make` leaves it), which krona-convert is asked to write as LoRA."""
    door = more.pop("door", TO_LORA)
    status = more.pop("status", 2)

    def arguments(box: Sandbox) -> list[str]:
        return list(make(box) or door)

    settings = {"absent": ("out/*",) if status else (), "fast": True, "may_write": OUT, "seconds": 60, **more}
    return Case("adapters", name, arguments, status, says, same_as, **settings)


def dog(box: Sandbox, **more: Any) -> Path:
    """A good adapter file of the toybox at dog.safetensors."""
    if more:
        return files.native(box.path("dog.safetensors"), **more)
    made = box.shared.build("toybox-adapter", lambda folder: files.native(folder / "dog.safetensors"))
    return box.take(made / "dog.safetensors", "dog.safetensors")


def _pickles() -> list[Case]:
    def pickle_named(name: str, kind: str) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            files.pickled(box.path(name), box.canary(), kind)
            return ["convert", name, "out/dog.safetensors", "--to", "lora"]

        return make

    table = []
    for kind in ("plain", "zip"):
        for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ""):
            if kind == "zip" and suffix not in (".bin", ".safetensors", ""):
                continue
            name = f"a {'pickle' if kind == 'plain' else 'torch archive'} as dog{suffix}"
            table.append(_case(name, pickle_named(f"dog{suffix}", kind), r"is a pickle, which runs code", REFUSED_PICKLE))
    door = ("inspect", "factors", "dog.bin", "--output", "out")
    make = pickle_named("dog.bin", "zip")
    table.append(_case("a pickle to look into", lambda box: make(box) and door, r"is a pickle", REFUSED_PICKLE))

    def authors_bin(box: Sandbox) -> list[str]:
        files.pickled(box.path("pytorch_lora_weights.bin"), box.canary(), "zip")
        source = ["--from", "diffusekrona", "--model", "toybox"]
        return ["convert", "pytorch_lora_weights.bin", "out/dog.safetensors", "--to", "native", *source]

    return [*table, _case("the authors' .bin", authors_bin, r"is a pickle", REFUSED_PICKLE)]


def _headers() -> list[Case]:
    """The frame of a safetensors file: lengths, JSON, offsets."""

    def cut(length: Callable[[int], int]) -> Callable[[Sandbox], None]:
        def make(box: Sandbox) -> None:
            path = dog(box)
            raw = path.read_bytes()
            path.write_bytes(raw[: length(len(raw))])

        return make

    def raw(content: bytes) -> Callable[[Sandbox], None]:
        return lambda box: box.write("dog.safetensors", content) and None

    def header(edit: Callable[[dict, bytes], Any]) -> Callable[[Sandbox], None]:
        def make(box: Sandbox) -> None:
            path = dog(box)
            head, data = files.header_and_data(path)
            files.with_header(path, edit(head, data), data)

        return make

    def first(head: dict, **change: Any) -> dict:
        name = next(name for name in head if name.endswith("lokr_w1"))
        return {**head, name: {**head[name], **change}}

    def longer(box: Sandbox) -> None:
        path = dog(box)
        path.write_bytes(path.read_bytes() + b"more")

    not_json = "all are headers that are no JSON object of tensors"
    return [
        _case("empty file", cut(lambda size: 0), r"is truncated: 0 bytes", LENGTHS),
        _case("5 bytes", cut(lambda size: 5), r"is truncated: 5 bytes", LENGTHS),
        _case("cut in the header", cut(lambda size: 200), r"truncated or no safetensors file: a header of", LENGTHS),
        _case("cut in the data", cut(lambda size: size - 1), r"is truncated: the header promises"),
        _case("half of it", cut(lambda size: size // 2), r"truncated", LENGTHS),
        _case("bytes after the end", longer, r"has bytes after its end"),
        _case("header of 2^63 bytes", raw(struct.pack("<Q", 2**63) + b"{}"), r"a header of 9223372036854775808", LENGTHS),
        _case("header of 2^64 - 1 bytes", raw(b"\xff" * 8 + b"{}"), r"a header of 18446744073709551615", LENGTHS),
        _case("header of nothing", raw(b"\0" * 8), r"header is not the JSON", not_json),
        _case("header of broken JSON", header(lambda head, data: b'{"a": {"dty'), r"header is not the JSON", not_json),
        _case("header a list", header(lambda head, data: [1, 2]), r"header is not the JSON", not_json),
        _case("header not UTF-8", header(lambda head, data: b'{"\xff\xfe": 1}'), r"header is not the JSON", not_json),
        _case("header nested 100,000 deep", header(lambda head, data: b"[" * 100_000), r"header is not the JSON", not_json),
        _case("no tensors", raw(struct.pack("<Q", 2) + b"{}"), r"holds no tensors"),
        _case("offsets that overlap", header(lambda head, data: first(head, data_offsets=[0, 4])), r"safetensors"),
        _case("offsets that go back", header(lambda head, data: first(head, data_offsets=[64, 0])), r"safetensors", "offsets"),
        _case("offset words", header(lambda head, data: first(head, data_offsets=["a", "b"])), r"not the JSON", not_json),
        _case("shape of 2^62", header(lambda head, data: first(head, shape=[2**31, 2**31])), r"safetensors"),
        _case("negative shape", header(lambda head, data: first(head, shape=[-4, -4])), r"safetensors"),
        _case("unknown type of number", header(lambda head, data: first(head, dtype="F7")), r"safetensors"),
    ]


def _tensors() -> list[Case]:
    """Sound files whose tensors are wrong."""

    def edited(edit: Callable[[dict], Any]) -> Callable[[Sandbox], None]:
        return lambda box: files.edit_tensors(dog(box), edit)

    def key(tensors: dict, suffix: str = "lokr_w1") -> str:
        return next(name for name in sorted(tensors) if name.endswith(suffix))

    def poison(value: float) -> Callable[[dict], None]:
        def edit(tensors: dict) -> None:
            tensors[key(tensors)][0, 0] = value

        return edit

    def drop_layer(tensors: dict) -> None:
        prefix = key(tensors).rsplit(".", 1)[0]
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    def add(name: str) -> Callable[[dict], None]:
        return lambda tensors: tensors.update({name: tensors[key(tensors)].clone()})

    def retype(kind: str) -> Callable[[dict], None]:
        import torch

        return lambda tensors: tensors.update({key(tensors): tensors[key(tensors)].to(getattr(torch, kind))})

    def reshape(tensors: dict) -> None:
        tensors[key(tensors)] = tensors[key(tensors)].reshape(-1, 2).contiguous()

    def flatten(tensors: dict) -> None:
        tensors[key(tensors)] = tensors[key(tensors)].flatten()

    return [
        _case("NaN", edited(poison(float("nan"))), r"lokr_w1 holds NaN or infinity", "not finite"),
        _case("infinity", edited(poison(float("-inf"))), r"lokr_w1 holds NaN or infinity", "not finite"),
        _case("whole numbers", edited(lambda t: retype("int64")(t)), r"has type int64; an adapter holds fp32", "type"),
        _case("booleans", edited(lambda t: retype("bool")(t)), r"has type bool", "a wrong type"),
        _case("8-bit floats", edited(lambda t: retype("float8_e4m3fn")(t)), r"has type float8", "a wrong type"),
        _case("a factor missing", edited(lambda t: t.pop(key(t, "lokr_w2"))), r"tensor lokr_w2 is missing"),
        _case("a layer missing", edited(drop_layer), r"layer \S+ is missing \(1 of \d+"),
        _case("a tensor of nothing known", edited(add("something.else")), r"something\.else is extra"),
        _case("a layer of a text encoder", edited(add("lora_te1_x.lokr_w1")), r"adapts a text encoder"),
        _case("a layer too many", edited(_another_layer), r"is extra: its own description"),
        _case("a factor of another shape", edited(reshape), r"lokr_w1 has shape \(128, 2\), not \(64, 4\)"),
        _case("a flat factor", edited(flatten), r"lokr_w1 has shape \(256,\), not", "a shape that is not the layer's"),
        _case("kinds mixed", edited(_mixed), r"mixes|is extra"),
    ]


def _another_layer(tensors: dict) -> None:
    import torch

    for suffix, shape in (("lokr_w1", (4, 4)), ("lokr_w2", (16, 16)), ("alpha", ())):
        tensors[f"lora_unet_input_blocks_99_1_to_q.{suffix}"] = torch.ones(shape)


def _mixed(tensors: dict) -> None:
    import torch

    tensors["lora_unet_x.lora_up.weight"] = torch.ones(8, 2)
    tensors["lora_unet_x.lora_down.weight"] = torch.ones(2, 8)


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
        _case("own JSON broken", text("{"), r"JSON under 'diffusekrona' is damaged", damaged),
        _case("own JSON a list", text("[]"), r"JSON under 'diffusekrona' is damaged", damaged),
        _case("own JSON nested deep", text("[" * 100_000), r"JSON under 'diffusekrona' is damaged", damaged),
        _case("own JSON without an adapter", own(lambda info: info.pop("adapter")), r"is damaged .*adapter", damaged),
        _case("adapter of another version", own(lambda info: info["adapter"].update(news=1)), r"damaged.*news", damaged),
        _case("layers not as many as widths", own(lambda info: info["widths"].pop()), r"is damaged", damaged),
        _case("widths in words", own(lambda info: info.update(widths=[["a", "b"]] * len(info["widths"]))), r"\w", damaged),
        _case("options of a layer missing", own(lambda info: info.update(options={})), r"no options for layer", damaged),
        _case("options a number", own(lambda info: first_options(info, 7)), r"\w", damaged),
        _case("options without a1", own(lambda info: first_options(info, {})), r"\w", damaged),
        _case("a1 of 0 in the options", own(lambda info: first_options(info, {"a1": 0, "a2": 4})), r"\w", damaged),
        _case("family a list", own(lambda info: info.update(family=["sdxl"])), r"\w", damaged),
        _case("a family nobody knows", own(lambda info: info.update(family="flux9")), r"\w"),
        _case("markup in the prompt", hostile("<script>alert(1)</script>"), "", status=0, exists=("out/*",), then=_escaped),
        _case("terminal codes in the prompt", hostile("\x1b[31mred\x1b]0;x\x07"), "", status=0, exists=("out/*",)),
        _case("10 MB of prompt", hostile("sks " * 2_500_000), "", status=0, exists=("out/*",)),
        _case("a path as model", own(lambda info: info.update(model="../../etc")), "", status=0, exists=("out/*",)),
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
        _case("an SDXL file for the toybox", sdxl, r"is for family 'sdxl'.*(no layer|there)"),
        _case("an SD 1.5 file for the toybox", sd15, r"is for family 'sd' .*this model is of family 'sdxl'"),
        _case("no metadata and no model", no_metadata, r"--model"),
        _case("somebody's LoRA as LoKr", somebodys_lora, r"LoKr|lokr|LoRA|lora"),
        _case("the authors' file, unannounced", authors("--to", "lora"), r"--from diffusekrona"),
        _case("the authors' file, half a pair", authors("--to", "native", *importing, half=True), r"tensor up is missing"),
        _case("the authors' file as plain LoKr", authors("--to", "lokr", *importing), r"row|LoRA"),
        _case("the authors' file", authors("--to", "native", *importing), "", status=0, exists=("out/dog.safetensors",)),
        _case("our own as the authors'", _ours_as_theirs, r"is extra: the authors' keys read"),
        _case("a pipeline as adapter", _pipeline_weights, r"is extra: no part of a LoKr"),
    ]


def _ours_as_theirs(box: Sandbox) -> list[str]:
    dog(box)
    return ["convert", "dog.safetensors", "out/x.safetensors", "--to", "native", "--from", "diffusekrona", "--model", "toybox"]


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
        _case("a folder", folder, r"is a folder; give the \.safetensors file|dog\.safetensors"),
        _case("no such file", lambda box: None, r"dog\.safetensors: no such file"),
        _case("a link to a good file", link, "", status=0, exists=("out/dog.safetensors",)),
        _case("a link to itself", circle, r"dog\.safetensors", "a link in a circle leads to no file"),
        _case("a named pipe", pipe, r"dog\.safetensors.*no regular file"),
        _case("no permission", closed, r"dog\.safetensors.*(ermission|not readable)", how="fork", limits={"unprivileged": 1}),
        _case("output is a folder", onto_folder, r"out/dog\.safetensors", absent=()),
        _case("output's folder is a file", onto_file, r"out", absent=(), may_write=()),
        _case("output is the input", onto_itself, r"dog\.safetensors"),
        _case("unknown format", arguments("--to", "lara"), r"lara.*lora"),
        _case("rank 0", arguments("--to", "lora", "--rank", "0"), r"rank"),
        _case("rank in words", arguments("--to", "lora", "--rank", "four"), r"--rank.*integer"),
        _case("unknown precision", arguments("--to", "lora", "--dtype", "fp8"), r"fp8.*fp16"),
        _case("too large for fp16", _too_large, r"too large for fp16"),
        _case("no room on the disk", lambda box: dog(box) and None, r"File too large|space|disk|limit", status=1,
              how="fork", limits={"file_size": 3000}),
    ]  # fmt: skip


def _too_large(box: Sandbox) -> list[str]:
    def grow(tensors: dict) -> None:
        for name in tensors:
            if name.endswith("lokr_w2"):
                tensors[name] *= 1e9

    files.edit_tensors(dog(box), grow)
    return ["convert", "dog.safetensors", "out/dog.safetensors", "--to", "native", "--dtype", "fp16"]


def fuzz_header(folder: Path, content: bytes) -> str:
    """'' where any bytes under the name of an adapter file either load or are refused in one line; else what went wrong."""
    from diffusekrona_train.weights import read_adapter

    path = folder / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        read_adapter(path)
    except ValueError as error:
        text = str(error)
        return "" if "\n" not in text and text.startswith(str(path)) and len(text) < 1500 else f"said {text[:300]!r}"
    return ""


def fuzz_json(folder: Path, good: Path, change: dict[str, Any]) -> str:
    """The same for a good file whose own JSON is changed by the tree `change`."""
    header, data = files.header_and_data(good)
    own = json.loads(header["__metadata__"][files.OWN_KEY])
    header["__metadata__"][files.OWN_KEY] = json.dumps({**own, **change})
    text = json.dumps(header).encode()
    return fuzz_header(folder, struct.pack("<Q", len(text)) + text + data)
