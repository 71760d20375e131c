"""Cases of the area adapters: files that are broken, hostile, or somebody else's, at the doors that read them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import adapter_files as files
from tests.faults.harness import Case
from tests.faults.sandbox import Sandbox

TO_LORA = ("convert", "dog.safetensors", "out/dog.safetensors", "--to", "lora")
REFUSED_PICKLE = "the same refusal under every suffix"
BROKEN = r"is truncated, damaged or not a safetensors file \(.+\)"
DAMAGED = "the words in brackets are the library's"
OUT = ("out/*",)


def cases() -> list[Case]:
    return _pickles() + _headers() + _tensors()


def adapter_case(name: str, make: Callable[[Sandbox], Any], says: str, same_as: str = "", **more: Any) -> Case:
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
            table.append(
                adapter_case(name, pickle_named(f"dog{suffix}", kind), r"is a pickle, which runs code", REFUSED_PICKLE)
            )
    door = ("inspect", "factors", "dog.bin", "--output", "out")
    make = pickle_named("dog.bin", "zip")
    table.append(adapter_case("a pickle to look into", lambda box: make(box) and door, r"is a pickle", REFUSED_PICKLE))

    def authors_bin(box: Sandbox) -> list[str]:
        files.pickled(box.path("pytorch_lora_weights.bin"), box.canary(), "zip")
        source = ["--from", "diffusekrona", "--model", "toybox"]
        return ["convert", "pytorch_lora_weights.bin", "out/dog.safetensors", "--to", "native", *source]

    return [*table, adapter_case("the authors' .bin", authors_bin, r"is a pickle", REFUSED_PICKLE)]


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

    return [
        adapter_case("empty file", cut(lambda size: 0), BROKEN, DAMAGED),
        adapter_case("5 bytes", cut(lambda size: 5), BROKEN, DAMAGED),
        adapter_case("cut in the header", cut(lambda size: 200), BROKEN, DAMAGED),
        adapter_case("cut in the data", cut(lambda size: size - 1), BROKEN, DAMAGED),
        adapter_case("half of it", cut(lambda size: size // 2), BROKEN, DAMAGED),
        adapter_case("bytes after the end", longer, BROKEN, DAMAGED),
        adapter_case("header of 2^63 bytes", raw(struct.pack("<Q", 2**63) + b"{}"), BROKEN, DAMAGED),
        adapter_case("header of 2^64 - 1 bytes", raw(b"\xff" * 8 + b"{}"), BROKEN, DAMAGED),
        adapter_case("header of nothing", raw(b"\0" * 8), BROKEN, DAMAGED),
        adapter_case("header of broken JSON", header(lambda head, data: b'{"a": {"dty'), BROKEN, DAMAGED),
        adapter_case("header a list", header(lambda head, data: [1, 2]), BROKEN, DAMAGED),
        adapter_case("header not UTF-8", header(lambda head, data: b'{"\xff\xfe": 1}'), BROKEN, DAMAGED),
        adapter_case("header nested 100,000 deep", header(lambda head, data: b"[" * 100_000), BROKEN, DAMAGED),
        adapter_case("no tensors", raw(struct.pack("<Q", 2) + b"{}"), r"holds no tensors"),
        adapter_case(
            "offsets that overlap", header(lambda head, data: first(head, data_offsets=[0, 4])), r"safetensors"
        ),
        adapter_case(
            "offsets that go back",
            header(lambda head, data: first(head, data_offsets=[64, 0])),
            r"safetensors",
            "offsets",
        ),
        adapter_case("offset words", header(lambda head, data: first(head, data_offsets=["a", "b"])), BROKEN, DAMAGED),
        adapter_case("shape of 2^62", header(lambda head, data: first(head, shape=[2**31, 2**31])), r"safetensors"),
        adapter_case("negative shape", header(lambda head, data: first(head, shape=[-4, -4])), r"safetensors"),
        adapter_case("unknown type of number", header(lambda head, data: first(head, dtype="F7")), r"safetensors"),
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
        adapter_case("NaN", edited(poison(float("nan"))), r"lokr_w1 holds NaN or infinity", "not finite"),
        adapter_case("infinity", edited(poison(float("-inf"))), r"lokr_w1 holds NaN or infinity", "not finite"),
        adapter_case(
            "whole numbers", edited(lambda t: retype("int64")(t)), r"has type int64; an adapter holds fp32", "type"
        ),
        adapter_case("booleans", edited(lambda t: retype("bool")(t)), r"has type bool", "a wrong type"),
        adapter_case("8-bit floats", edited(lambda t: retype("float8_e4m3fn")(t)), r"has type float8", "a wrong type"),
        adapter_case("a factor missing", edited(lambda t: t.pop(key(t, "lokr_w2"))), r"tensor lokr_w2 is missing"),
        adapter_case("a layer missing", edited(drop_layer), r"layer \S+ is missing \(1 of \d+"),
        adapter_case("a tensor of nothing known", edited(add("something.else")), r"something\.else is extra"),
        adapter_case("a layer of a text encoder", edited(add("lora_te1_x.lokr_w1")), r"adapts a text encoder"),
        adapter_case("a layer too many", edited(_another_layer), r"is extra: its own description"),
        adapter_case("a factor of another shape", edited(reshape), r"lokr_w1 has shape \(128, 2\), not \(64, 4\)"),
        adapter_case(
            "a flat factor", edited(flatten), r"lokr_w1 has shape \(256,\), not", "a shape that is not the layer's"
        ),
        adapter_case("kinds mixed", edited(_mixed), r"mixes|is extra"),
    ]


def _another_layer(tensors: dict) -> None:
    import torch

    for suffix, shape in (("lokr_w1", (4, 4)), ("lokr_w2", (16, 16)), ("alpha", ())):
        tensors[f"lora_unet_input_blocks_99_1_to_q.{suffix}"] = torch.ones(shape)


def _mixed(tensors: dict) -> None:
    import torch

    tensors["lora_unet_x.lora_up.weight"] = torch.ones(8, 2)
    tensors["lora_unet_x.lora_down.weight"] = torch.ones(2, 8)


def fuzz_header(folder: Path, content: bytes) -> str:
    """'' where any bytes as an adapter file either load or are refused in one line; else what went wrong."""
    from diffusekrona_train.adapters.formats import read_adapter

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
