"""Cases of the area config: wrong values, wrong YAML, wrong files. All end before torch is imported, with status 2."""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.faults.doors import Seen
from tests.faults.harness import NOT_BEGUN, Case
from tests.faults.sandbox import REMOVE, Sandbox

GOOD = "model: toybox\nsubject: {images: photos, class: dog}\noutput: runs/dog\n"
TYPE = "one sentence of pydantic for a wrong type of this field"
BOUND = "the same bound of the same field"

# name, changes to a good config, what the line says, why another case may say the same
VALUES: list[tuple[str, dict[str, Any], str, str]] = [
    ("steps 0", {"train.steps": 0}, r"train\.steps: 0 .*greater than or equal to 1", BOUND),
    ("steps negative", {"train.steps": -5}, r"train\.steps: -5 .*greater than or equal to 1", BOUND),
    ("steps 1e9", {"train.steps": 10**9}, r"train\.steps: 1000000000 .*less than or equal to 1000000", ""),
    ("steps 2.5", {"train.steps": 2.5}, r"train\.steps: 2\.5 .*integer", TYPE),
    ("steps in words", {"train.steps": "many"}, r"train\.steps: 'many' .*integer", TYPE),
    ("steps true", {"train.steps": True}, r"train\.steps: True .*integer", TYPE),
    ("steps a list", {"train.steps": [1]}, r"train\.steps: \[1\] .*integer", TYPE),
    ("learning rate 0", {"train.learning_rate": 0}, r"train\.learning_rate: 0 .*greater than 0", ""),
    ("learning rate nan", {"train.learning_rate": float("nan")}, r"learning_rate: nan .*finite", "nan and inf alike"),
    ("learning rate inf", {"train.learning_rate": float("inf")}, r"learning_rate: inf .*finite", "nan and inf alike"),
    ("learning rate in words", {"train.learning_rate": "5e-4x"}, r"learning_rate: '5e-4x' .*number", ""),
    ("batch size 0", {"train.batch_size": 0}, r"train\.batch_size: 0 ", ""),
    ("a seed too large", {"train.seed": 2**63}, r"train\.seed: \d+ .*less than", ""),
    ("one beta", {"train.betas": [0.9]}, r"train\.betas: \[0\.9\] lacks value 2; it is: AdamW's betas", ""),
    ("beta of 1", {"train.betas": [0.9, 1.0]}, r"train\.betas\[1\]: 1\.0 .*less than 1", ""),
    ("warm-up longer than the run", {"train.warmup_steps": 1000}, r"warmup_steps: 1000 is more than steps: 4", ""),
    ("nf4 beside int8", {"train.memory": "nf4", "train.quantize": "int8"}, r"nf4 .* int8", ""),
    ("unknown optimizer", {"train.optimizer": "lion"}, r"train\.optimizer: 'lion' .*'adamw'", ""),
    ("unknown tracker", {"train.trackers": ["tensorbord"]}, r"did you mean tensorboard", ""),
    ("unknown precision", {"train.mixed_precision": "fp8"}, r"mixed_precision: 'fp8' .*'bf16'", ""),
    ("a1 of 0", {"adapter.a1": 0}, r"adapter\.a1: 0 ", ""),
    ("a1 that does not divide", {"adapter.a1": 7}, r"a1.*7.*128", ""),
    ("unknown adapter", {"adapter.type": "lorra"}, r"did you mean lora", ""),
    ("unknown projection", {"adapter.targets": ["q", "z"]}, r"adapter\.targets\[1\]: 'z'", ""),
    ("no projection", {"adapter.targets": []}, r"adapter\.targets: \[\] .*at least one", ""),
    ("targets all of krona", {"adapter.targets": "all"}, r"targets: all is for type: full", ""),
    ("budget in words", {"adapter.params": "lots"}, r"adapter\.params: 'lots' .*4M", ""),
    ("two budgets", {"adapter.params": "4M", "adapter.match_lora_rank": 4}, r"keep one budget", ""),
    ("budget for lora", {"adapter.type": "lora", "adapter.params": "4M"}, r"params is for type: krona", ""),
    (
        "full matrix of lora",
        {"adapter.type": "lora", "adapter.full_matrix": True},
        r"full_matrix is for type: lokr",
        "",
    ),
    ("factor of -3", {"adapter.type": "lokr", "adapter.factor": -3}, r"factor: -3", ""),
    ("one factor of a pair", {"adapter.factors": {"q": [8]}}, r"adapter\.factors\.q: \[8\]", ""),
    ("factors of projection w", {"adapter.factors": {"w": [8, 8]}}, r"adapter\.factors\.w: 'w' ", ""),
    ("blocks that match nothing", {"adapter.blocks": ["mid_blok"]}, r"mid_blok.*mid_block", ""),
    ("blocks empty", {"adapter.blocks": []}, r"adapter\.blocks is an empty list", ""),
    ("full of a quantised base", {"adapter.type": "full", "train.quantize": "nf4"}, r"full .*cannot be quantised", ""),
    ("resolution 100", {"data.resolution": 100}, r"data\.resolution: 100 .*multiple of 8", ""),
    ("resolution 8", {"data.resolution": 8}, r"data\.resolution: 8 .*greater", ""),
    ("variants without a draw", {"data.variants": 3}, r"data\.variants: 3 .*equal copies", ""),
    ("random crop without variants", {"data.crop": "random"}, r"crop: random with variants: 1", ""),
    ("flip without variants", {"data.flip": True}, r"flip: true with variants: 1", ""),
    ("class images, kind none", {"prior.images": "class"}, r"prior\.images is for kind: images", ""),
    ("class prompt with [V]", {"prior.prompt": "A [V] dog"}, r"prior\.prompt: .*must not hold \[V\]", ""),
    ("a second subject in a prompt", {"validation.prompts": ["A [V2] dog"]}, r"\[V2\].*one subject", ""),
    ("a placeholder nobody fills", {"subject.prompt": "A [V] {breed}"}, r"\{breed\}.*only \{class\}", ""),
    ("prompt empty", {"validation.prompts": [" "]}, r"validation\.prompts\[0\] is empty", ""),
    ("prompts as text", {"validation.prompts": "A dog"}, r"validation\.prompts: 'A dog' .*list", ""),
    ("no seeds", {"validation.seeds": []}, r"validation\.seeds is empty", ""),
    ("class empty", {"subject.class": ""}, r"subject\.class: ''", ""),
    ("class a placeholder", {"subject.class": "{x}"}, r"subject\.class: .*plain word", ""),
    ("token of two lines", {"subject.token": "a\nb"}, r"subject\.token: .*plain word", ""),
    ("class missing", {"subject.class": REMOVE}, r"subject\.class is missing", ""),
    ("images missing", {"subject.images": REMOVE}, r"subject\.images is missing", ""),
    ("output missing", {"output": REMOVE}, r"output is missing", ""),
    ("output empty", {"output": ""}, r"output: '' is not a name", ""),
    ("output ..", {"output": ".."}, r"output: '\.\.' should end in the name", ""),
    ("output a number", {"output": 7}, r"output: 7 .*string", ""),
    ("model empty", {"model": ""}, r"model: '' is not a name", ""),
    ("model a list", {"model": ["a"]}, r"model: \['a'\] .*string", ""),
    ("model misspelt", {"model": "toybix"}, r"'toybix'.*did you mean 'toybox'", ""),
    ("model folder missing", {"model": "models/none"}, r"models/none", ""),
    ("unknown section", {"tran": {}}, r"tran is not a known key; did you mean train", ""),
    ("unknown key of train", {"train.stepz": 3}, r"train\.stepz is not a known key; did you mean steps", ""),
    ("unknown key of subject", {"subject.imges": "x"}, r"subject\.imges .*did you mean images", ""),
    ("unknown key of validation", {"validation.prompt": []}, r"validation\.prompt .*did you mean prompts", ""),
    ("key of another section", {"steps": 3}, r"steps is not a known key; did you mean train\.steps", ""),
    ("a key like no other", {"data.zzzzqqq": 1}, r"data\.zzzzqqq is not a known key; known are resolution", ""),
    ("key of 100,000 letters", {"k" * 100_000: 1}, r"k…? is not a known key|k…", ""),
    ("section a word", {"train": "fast"}, r"train: 'fast' is not a section", ""),
    ("init_from missing", {"train.init_from": "no.safetensors"}, r"no\.safetensors", ""),
    ("output with a tab", {"output": "runs\train"}, r"output: .*holds a tab .*forward slashes", ""),
    ("images with a terminal escape", {"subject.images": "a\x1b[31m"}, r"control character .*forward slashes", ""),
    ("output under no variable", {"output": "$KRONA_NOWHERE/dog"}, r"\$KRONA_NOWHERE, which is not set here", ""),
    (
        "photos under no variable of Windows",
        {"subject.images": "%KRONA_NOWHERE%\\dog"},
        r"%KRONA_NOWHERE%, which is not set here",
        "one sentence for variables",
    ),
    ("photos of no user", {"subject.images": "~krona-no-such-user/x"}, r"no such user", ""),
    ("a column of a folder", {"subject.image_column": "x"}, r"image_column is for data sets", ""),
    ("a caption key without metadata", {"subject.caption_key": "x"}, r"holds neither metadata\.jsonl nor", ""),
]

# name, the file's content, what the line says
TEXTS: list[tuple[str, str | bytes, str]] = [
    ("empty file", "", r"is empty"),
    ("comments alone", "# nothing yet\n", r"is empty"),
    ("a list", "- model: toybox\n", r"holds a list and not"),
    ("one word", "toybox\n", r"holds a str and not"),
    ("a tab", GOOD + "train:\n\tsteps: 3\n", r"line 5: a tab in the indentation"),
    ("duplicate key", GOOD + "model: sdxl\n", r"line 4, column 1: duplicate key 'model'"),
    ("duplicate key of a section", "train: {steps: 1, steps: 2}\n" + GOOD, r"duplicate key 'steps'"),
    ("anchors that explode", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"alias \*a is not taken"),
    ("a python object", "model: !!python/object/apply:os.system ['touch CANARY']\n", r"tag .*python.* is not taken"),
    ("a python module", "model: !!python/name:os.system\nx: [", r"expected|tag"),
    ("a tag that does not fit", "train: {steps: !!int dog}\n" + GOOD, r"a tag does not fit"),
    ("bracket not closed", "train: [1, 2\n", r"line \d+, column \d+: .*expected"),
    ("nested 5,000 deep", "a: " + "[" * 5000 + "]" * 5000, r"nested too deeply"),
    ("10 MB", GOOD + "#" * 10_000_000, r"10,000,\d+ bytes are too many"),
    ("not UTF-8", GOOD.encode() + b"# caf\xe9\n", r"byte \d+ is not UTF-8"),
    ("half of a UTF-16", GOOD.encode("utf-16")[:-1], r"byte \d+ is not UTF-8"),
    ("a Windows path in double quotes", GOOD + 'vae: "C:\\Users\\me"\n', r"escape.*single quotes or forward slashes"),
    ("zero bytes inside", GOOD + "# \0\n", r"not allowed|special characters"),
    ("a number of 1,000 digits", GOOD + "train: {steps: " + "9" * 1000 + "}", r"more than 100 digits"),
    ("two documents", GOOD + "---\n" + GOOD, r"document"),
    ("a key that is a list", "[a, b]: 1\n", r"a key must be a plain word"),
]
SAME_TEXT = {
    "comments alone": "a file of comments is an empty one",
    "duplicate key of a section": "one rule for keys at each level",
    "half of a UTF-16": "both are bytes that are not UTF-8",
}


def cases() -> list[Case]:
    table = [_value_case(*row) for row in VALUES]
    table += [_text_case(name, content, says) for name, content, says in TEXTS]
    return table + _files() + _overrides() + _good_names()


def _config(name: str, make: Any, status: int, says: str, same_as: str = "", **more: Any) -> Case:
    absent = NOT_BEGUN if status else ()
    return Case("config", name, make, status, says, same_as, absent=absent, fast=True, seconds=60, **more)


def _check(box: Sandbox, name: str, *further: str) -> list[str]:
    box.photos(1)
    return ["train", "--config", name, "--check", *further]


def _value_case(name: str, changes: dict[str, Any], says: str, same_as: str) -> Case:
    return _config(name, lambda box: _check(box, box.config(changes)), 2, says, same_as)


def _text_case(name: str, content: str | bytes, says: str) -> Case:
    def make(box: Sandbox) -> list[str]:
        box.write("dog.yaml", content)
        return _check(box, "dog.yaml")

    return _config(name, make, 2, says, SAME_TEXT.get(name, ""))


def _files() -> list[Case]:
    """Paths that are no config."""

    def folder(box: Sandbox) -> list[str]:
        box.path("dog.yaml/x")
        return _check(box, "dog.yaml")

    def circle(box: Sandbox) -> list[str]:
        box.path("dog.yaml").symlink_to("dog.yaml")
        return _check(box, "dog.yaml")

    def pipe(box: Sandbox) -> list[str]:
        os.mkfifo(box.path("dog.yaml"))
        return _check(box, "dog.yaml")

    def near(box: Sandbox) -> list[str]:
        box.config()
        return _check(box, "dogg.yaml")

    return [
        _config("a folder as config", folder, 2, r"dog\.yaml: is a folder"),
        _config(
            "no such config",
            lambda box: _check(box, "none.yaml"),
            2,
            r"none\.yaml: no such file$",
            "a missing file reads the same everywhere",
        ),
        _config("a config's name misspelt", near, 2, r"no such file; there is dog\.yaml"),
        _config("a link to itself", circle, 2, r"dog\.yaml: .*link"),
        _config(
            "a mistake found before torch is imported",
            _light,
            2,
            r"steps: 0 .*memory: 'all'",
            how="spawn",
            then=_nothing_heavy,
        ),
        _config("a named pipe", pipe, 2, r"dog\.yaml: is no regular file"),
    ]


BEFORE_TORCH = """
import sys
from diffusekrona_train.cli.train import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "diffusers", "transformers", "numpy") if name in sys.modules]
    print("imported:", heavy)
"""


def _light(box: Sandbox) -> list[str]:
    box.config({"train.steps": 0, "train.memory": "all"})
    return ["command:", sys.executable, "-c", BEFORE_TORCH, "--config", "dog.yaml"]


def _nothing_heavy(box: Sandbox, seen: Seen) -> None:
    assert "imported: []" in seen.out, seen.out


def _overrides() -> list[Case]:
    """What `--set` may get wrong."""

    def with_set(text: str) -> Any:
        return lambda box: _check(box, box.config(), "--set", text)

    return [
        _config("--set without a value", with_set("train.steps"), 2, r"--set 'train\.steps' should read key=value"),
        _config("--set of a key in a value", with_set("model.x=1"), 2, r"--set .*holds a value and not a section"),
        _config("--set of half a list", with_set("adapter.targets=[q"), 2, r"--set 'adapter\.targets=\[q'"),
        _config("--set of a bad value", with_set("train.steps=-1"), 2, r"train\.steps: -1", BOUND),
        _config("an option that is none", lambda box: _check(box, box.config(), "--stepz", "3"), 2, r"--stepz"),
        _config("no config at all", lambda box: ["train", "--check"], 2, r"--config"),
    ]


def _good_names() -> list[Case]:
    """Names that must simply work: spaces, quotes, emoji, `..`."""
    table = []
    for name in ('my dog\'s "best".yaml', "собака 🐕.yaml", "sub/../dog.yaml", "%s {0} $HOME.yaml"):

        def make(box: Sandbox, name: str = name) -> list[str]:
            folder = name.removesuffix(".yaml").split("/")[-1]
            box.path("sub/x")
            box.photos(1, folder)
            box.config({"subject.images": folder, "output": f"runs/{folder}"}, name)
            return ["train", "--config", name, "--check"]

        table.append(_config(f"a config named {name}", make, 0, r"\b1 (image|photo|picture)|1 of 1"))
    table.append(_config("1e-4 is a number", _tiny_rate, 0, r"\S"))
    for encoding in ("utf-8-sig", "utf-16"):

        def marked(box: Sandbox, encoding: str = encoding) -> list[str]:
            box.write("dog.yaml", GOOD.encode(encoding))
            return _check(box, "dog.yaml")

        table.append(_config(f"a byte-order mark of {encoding}", marked, 0, r"\b1 from photos"))
    table.append(
        _config(
            "a tracker that is not installed",
            lambda box: _check(box, box.config({"train.trackers": ["wandb"]})),
            2,
            r"train\.trackers: wandb is not installed; pip install wandb",
            how="fork",
            limits={"without": "wandb"},
        )
    )
    return table


def _tiny_rate(box: Sandbox) -> list[str]:
    box.write("dog.yaml", GOOD + "train: {learning_rate: 1e-4}\n")
    return _check(box, "dog.yaml")


def fuzz_tree(tree: Any, overrides: list[str]) -> str:
    """'' where any tree either validates or is refused in one line; else what went wrong. See tests/test_faults.py."""
    from diffusekrona_train.config import RunConfig, dump_config, make_config, parse_yaml

    try:
        config = make_config(tree, overrides)
    except ValueError as error:
        text = str(error)
        return "" if text and "\n" not in text and len(text) < 1000 else f"no single line: {text[:300]!r}"
    again = RunConfig.model_validate(parse_yaml(dump_config(config)))
    return "" if again == config else "the written config reads back differently"
