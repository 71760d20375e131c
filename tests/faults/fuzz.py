"""Random input within a budget of time: configs, adapter files, image bytes. Each either works or is one line.

`run(seconds)` gives every fuzzer an equal share of the time; the tests call `try_out(name, examples)`.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.faults import adapter_files, adapters, config, images
from tests.faults.sandbox import SMALL_RUN, changed, picture


@dataclass
class Outcome:
    name: str
    tried: int
    problem: str

    @property
    def held(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        return f"{'held  ' if self.held else 'FAILED'} fuzz: {self.name} ({self.tried:,} examples) {self.problem}"


def run(seconds: float) -> list[Outcome]:
    """Every fuzzer for its share of `seconds`."""
    outcomes = []
    for name in FUZZERS:
        end, tried, round_, problem = time.monotonic() + seconds / len(FUZZERS), 0, 0, ""
        while time.monotonic() < end and not problem:
            outcome = try_out(name, 200, round_)
            tried, problem, round_ = tried + outcome.tried, outcome.problem, round_ + 1
        outcomes.append(Outcome(name, tried, problem))
    return outcomes


def try_out(name: str, examples: int, start: int = 0) -> Outcome:
    """One fuzzer on a number of examples that follow from `start`; the smallest failing one is in the problem."""
    strategy, probe = FUZZERS[name]
    tried = 0

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(strategy())
    def check(example: Any) -> None:
        nonlocal tried
        tried += 1
        problem = probe(example)
        assert not problem, f"{problem} on {example!r:.300}"

    try:
        check()
    except Exception as error:
        return Outcome(name, tried, f"{type(error).__name__}: {' '.join(str(error).split())[:600]}")
    return Outcome(name, tried, "")


# ---- config --------------------------------------------------------------------------------------------------------


def _values() -> st.SearchStrategy:
    """What YAML can hold, with a liking for numbers at the edges and words that mean something."""
    words = st.sampled_from(
        ["", " ", "auto", "none", "all", "krona", "q", "fp16", "1e-4", "[V]", "{class}", "toybox", "..", "4M"]
    )
    leaves = (
        st.none() | st.booleans() | st.integers() | st.sampled_from([0, -1, 2**63, 10**30, 1e308]) | st.floats() | words
    )
    leaves |= st.text(max_size=12)
    keys = words | st.text(max_size=8)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
    )


@cache
def _fields() -> list[str]:
    """Every dotted field of a config, and some that are none."""
    from pydantic import BaseModel

    from diffusekrona_train.config import RunConfig

    found = ["train", "x", "train.x", "x.y.z"]
    for name, field in RunConfig.model_fields.items():
        found.append(name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += [f"{name}.{inner.alias or key}" for key, inner in kind.model_fields.items()]
    return found


def _config_trees() -> st.SearchStrategy:
    changes = st.dictionaries(st.sampled_from(_fields()), _values(), min_size=1, max_size=3)
    return changes | st.dictionaries(st.text(max_size=6), _values(), max_size=4).map(lambda tree: {"": tree})


def _probe_config(changes: dict[str, Any]) -> str:
    if "" in changes:
        return config.fuzz_tree(changes[""], [])
    try:
        tree = changed(SMALL_RUN, dict(sorted(changes.items(), key=lambda item: item[0].count("."), reverse=True)))
    except (AttributeError, TypeError):  # a key within a value that is no section
        return ""
    return config.fuzz_tree(tree, [])


def _yaml_texts() -> st.SearchStrategy:
    pieces = [
        "model: toybox\n",
        "train: ",
        "{",
        "}",
        "[",
        "]",
        "- ",
        ": ",
        "&a ",
        "*a",
        "!!int ",
        "'",
        '"',
        "|\n",
        "\t",
        "# ",
        "\n",
        "  ",
        "steps",
        "? ",
        "---\n",
        "%YAML 1.2\n",
        "\0",
        "\ufeff",
        "1e-4",
        "2020-01-01",
        "0x1F",
        "<<: ",
        "~",
    ]
    return st.lists(st.sampled_from(pieces) | st.text(max_size=6), max_size=14).map("".join)


def _probe_yaml(text: str) -> str:
    from diffusekrona_train.config import parse_yaml

    try:
        parse_yaml(text)
    except ValueError as error:
        return "" if str(error) and "\n" not in str(error) else f"no single line: {error}"
    return ""


# ---- adapter files -------------------------------------------------------------------------------------------------


@cache
def _room() -> Path:
    return Path(tempfile.mkdtemp(prefix="krona-fuzz-"))


@cache
def _good_adapter() -> Path:
    return adapter_files.native(_room() / "good.safetensors")


def _json_values() -> st.SearchStrategy:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )


def _headers() -> st.SearchStrategy:
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64"]) | _json_values(),
            "shape": st.lists(st.integers(-2, 2**40), max_size=3) | _json_values(),
            "data_offsets": st.lists(st.integers(-1, 100), min_size=2, max_size=2) | _json_values(),
        }
    )
    names = st.sampled_from(["x.lokr_w1", "x.lokr_w2", "x.alpha", "y.lora_up.weight", "__metadata__"]) | st.text(
        max_size=8
    )
    body = st.dictionaries(names, entry | _json_values(), max_size=4).map(lambda tree: json.dumps(tree).encode())
    whole = st.tuples(body, st.binary(max_size=64)).map(
        lambda pair: struct.pack("<Q", len(pair[0])) + pair[0] + pair[1]
    )
    return whole | st.binary(max_size=200)


def _damaged(good: Callable[[], bytes]) -> st.SearchStrategy:
    """Good bytes with some changed, cut, or put in."""
    raw = good()
    places = st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), min_size=1, max_size=6)

    def spoil(changes: list[tuple[int, int]], length: int) -> bytes:
        bytes_ = bytearray(raw)
        for place, value in changes:
            bytes_[place] = value
        return bytes(bytes_[:length])

    return st.builds(spoil, places, st.sampled_from([len(raw), len(raw), len(raw) // 2]) | st.integers(0, len(raw)))


def _own_json() -> st.SearchStrategy:
    keys = [
        "version",
        "adapter",
        "family",
        "layers_per_block",
        "layers",
        "widths",
        "options",
        "token",
        "class",
        "prompt",
        "step",
    ]
    return st.dictionaries(st.sampled_from(keys), _json_values(), min_size=1, max_size=3)


# ---- images --------------------------------------------------------------------------------------------------------


@cache
def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture((40, 32), 1).save(buffer, kind)
    return buffer.getvalue()


def _image_bytes() -> st.SearchStrategy:
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
    return st.one_of([st.binary(max_size=100), *(_damaged(lambda kind=kind: _encoded(kind)) for kind in kinds)])


FUZZERS: dict[str, tuple[Callable[[], st.SearchStrategy], Callable[[Any], str]]] = {
    "config trees": (_config_trees, _probe_config),
    "YAML text": (_yaml_texts, _probe_yaml),
    "adapter headers": (_headers, lambda raw: adapters.fuzz_header(_room(), raw)),
    "adapter files with damage": (
        lambda: _damaged(lambda: _good_adapter().read_bytes()[:7000]),
        lambda raw: adapters.fuzz_header(_room(), raw + _good_adapter().read_bytes()[7000:]),
    ),
    "adapter descriptions": (_own_json, lambda change: adapters.fuzz_json(_room(), _good_adapter(), change)),
    "image bytes": (_image_bytes, images.fuzz_image),
}
"""Name -> (what is drawn, what it is tried on: '' or what went wrong)."""
