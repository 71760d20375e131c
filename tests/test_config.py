"""The config: strict YAML, one line for each mistake, defaults of models, overrides, the round trip."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusekrona_train.config import (
    MODEL_ALIASES,
    MODEL_DEFAULTS,
    RunConfig,
    dump_config,
    load_config,
    make_config,
    parse_count,
    parse_yaml,
    schema,
)
from diffusekrona_train.config.strict_yaml import MAX_BYTES

MINIMAL = "subject: {images: photos/dog, class: dog}\noutput: runs/dog\n"


def tree(**more):
    return {"subject": {"images": "photos/dog", "class": "dog"}, "output": "runs/dog"} | more


def refusal(text, tmp_path):
    path = tmp_path / "a config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and "a config.yaml" in str(caught.value)
    return str(caught.value)


def test_three_lines_are_enough_and_the_rest_is_the_papers(tmp_path):
    path = tmp_path / "dog.yaml"
    path.write_text(MINIMAL)
    config = load_config(path)
    assert config.model == "sdxl" and config.name == "dog" and config.data.resolution == 1024
    adapter, train = config.adapter, config.train
    assert (adapter.type, adapter.a1, adapter.a2, adapter.targets) == ("krona", 4, 64, ["q", "k", "v", "o"])
    assert (adapter.init_a, adapter.init_b) == ("normal", "zero")
    assert (train.learning_rate, train.schedule, train.optimizer, train.steps, train.batch_size) == (
        5e-4,
        "constant",
        "adamw",
        500,
        1,
    )
    assert config.subject.fill(config.subject.prompt) == "A sks dog" and len(config.validation.prompts) == 2


def test_the_issue_of_yaml_1_1():
    read = parse_yaml("{a: 1e-4, b: no, c: 12:30, d: 010, e: 2024-01-01, f: on, g: ~, h: -.5, i: .inf, j: 1E3, k: '1'}")
    assert read == {
        "a": 1e-4,
        "b": "no",
        "c": "12:30",
        "d": 10,
        "e": "2024-01-01",
        "f": "on",
        "g": None,
        "h": -0.5,
        "i": math.inf,
        "j": 1000.0,
        "k": "1",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("just words", "holds a str"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (MINIMAL + "\tmodel: sdxl", "a tab in the indentation"),
        ("subject:\n\timages: a\n", "a tab in the indentation"),
        (MINIMAL + "output: runs/cat", "duplicate key 'output'"),
        ("a: &a [x]\nb: [*a, *a]", "the alias *a is not taken"),
        ("a: !!python/object/apply:os.system ['true']", "python/object/apply:os.system"),
        ("a: !!binary aGk=", "the tag"),
        ("a: !!int dog", "a tag does not fit"),
        ("? [a]\n: b", "a key must be a plain word"),
        ("a: [", "line 1, column 5"),
        ("--- {}\n--- {}", "another document"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000, "more than 100 digits"),
        (b"a: \x00", "special characters are not allowed"),
        (b"#" * (MAX_BYTES + 1), "too many for a config"),
    ],
)
def test_files_that_are_no_config_are_one_line(text, said, tmp_path):
    assert said in refusal(text, tmp_path)


def test_ten_levels_of_anchors_do_not_explode(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert "the alias" in refusal("\n".join(levels), tmp_path)


def test_directory_missing_file_and_near_miss(tmp_path):
    (tmp_path / "dog.yaml").write_text(MINIMAL)
    with pytest.raises(ValueError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"no such file; there is .*dog\.yaml"):
        load_config(tmp_path / "dgo.yaml")


def test_strange_paths_are_taken(tmp_path):
    folder = tmp_path / "a 'quoted' \"folder\" 🐕" / ".." / "ünïcode dir"
    folder.mkdir(parents=True)
    (folder / "my dog.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config(folder / "my dog.yaml").output == "runs/dog"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("trian: {steps: 3}", "trian is not a known key; did you mean train?"),
        ("train: {stepz: 3}", "train.stepz is not a known key; did you mean steps?"),
        ("learning_rate: 1", "learning_rate is not a known key; did you mean train.learning_rate?"),
        ("zzz: 1", "zzz is not a known key; known are model, revision"),
        ("train: {steps: 0}", "train.steps: 0 should be greater than or equal to 1"),
        ("train: {steps: -5}", "train.steps: -5"),
        ("train: {steps: 1000000000}", "train.steps: 1000000000 should be less than"),
        ("train: {steps: 1.5}", "train.steps: 1.5 should be a valid integer"),
        ("train: {steps: true}", "train.steps: True should be a valid integer"),
        ("train: {steps: '10'}", "train.steps: '10' should be a valid integer"),
        ("train: {learning_rate: 0}", "train.learning_rate: 0 should be greater than 0"),
        ("train: {learning_rate: .nan}", "train.learning_rate: nan should be a finite number"),
        ("train: {learning_rate: fast}", "train.learning_rate: 'fast' should be a valid number"),
        ("train: {betas: [0.9]}", "train.betas"),
        ("train: {betas: [0.9, 1.0]}", "train.betas[1]: 1.0 should be less than 1"),
        ("train: {optimizer: adam}", "did you mean adamw?"),
        ("train: {warmup_steps: 600}", "train.warmup_steps: 600 is more than steps: 500"),
        ("train: {memory: nf4, quantize: int8}", "train.memory: nf4 and quantize: int8"),
        ("train: {trackers: [wandbb]}", "did you mean wandb?"),
        ("train: 5", "train: 5 is not a section"),
        ("data: {resolution: 100}", "data.resolution: 100 should be a multiple of 8"),
        ("data: {flip: yes}", "data.flip: 'yes' should be a valid boolean"),
        ("data: {flip: true}", "data.flip: true with variants: 1"),
        ("data: {crop: random}", "data.crop: random with variants: 1"),
        ("data: {variants: 4}", "data.variants: 4 would keep equal copies"),
        ("adapter: {type: kronna}", "did you mean krona?"),
        ("adapter: {a1: 0}", "adapter.a1: 0"),
        ("adapter: {a1: 3}", "adapter.a1: 3 does not divide the input width 640"),
        ("adapter: {a2: 7}", "adapter.a2: 7 does not divide the output width 640"),
        ("adapter: {factors: {q: [4]}}", "adapter.factors.q"),
        ("adapter: {factors: {x: [4, 4]}}", "adapter.factors.x"),
        ("adapter: {params: 4M, match_lora_rank: 4}", "adapter.params and match_lora_rank are both given"),
        ("adapter: {params: lots}", "adapter.params: 'lots' is not a number of parameters"),
        ("adapter: {type: lora, params: 4M}", "adapter.params is for type: krona"),
        ("adapter: {type: lora, full_matrix: true}", "adapter.full_matrix is for type: lokr"),
        ("adapter: {type: lokr, factor: 0}", "adapter.factor: 0"),
        ("adapter: {targets: all}", "adapter.targets: all is for type: full"),
        ("adapter: {targets: []}", "adapter.targets: [] should name at least one"),
        ("adapter: {targets: [q, q]}", "each once"),
        ("adapter: {blocks: []}", "adapter.blocks is an empty list"),
        ("adapter: {scale: .inf}", "adapter.scale: inf"),
        ("{adapter: {type: full}, train: {quantize: nf4}}", "adapter.type: full"),
        ("prior: {images: photos/dogs}", "prior.images is for kind: images"),
        ("prior: {prompt: 'A [V] dog'}", "prior.prompt: 'A [V] dog' is the prompt of the class"),
        ("prior: {weight: -1}", "prior.weight: -1"),
        ("validation: {prompts: ['']}", "validation.prompts[0] is empty"),
        ("validation: {prompts: ['A {clas}']}", "holds {clas}"),
        ("validation: {prompts: ['A [V2] dog']}", "holds [V2]"),
        ("validation: {seeds: []}", "validation.seeds is empty"),
        ("validation: {seeds: [-1]}", "validation.seeds[0]: -1"),
        ("model: 5", "model: 5 should be a valid string"),
        ("model: ''", "model: '' is not a name"),
        ("output: ..", "output: '..' should end in the name of the run"),
        ("output: null", "output: None should be a valid string"),
        ("subject: null", "subject is missing"),
        ("subject: {class: dog}", "subject.images is missing"),
        ("subject: {images: a}", "subject.class is missing: What the subject is"),
        ("subject: {images: a, class: ''}", "subject.class"),
        ("subject: {images: a, class: 5}", "subject.class: 5 should be a valid string"),
        ("subject: {images: a, class: dog, limit: 0}", "subject.limit: 0"),
        ("subject: {images: a, class: dog, token: ' '}", "subject.token: ' '"),
        ("subject: {images: 'toybox:owl', class: owl, files: [a]}", "subject.files"),
        ("1: 2", "1"),
    ],
)
def test_mistakes_name_field_value_and_remedy(more, said):
    with pytest.raises(ValueError) as caught:
        make_config({**tree(), **parse_yaml(more)})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_several_mistakes_are_still_one_line():
    with pytest.raises(ValueError, match=r"train.steps.*; train.eps.* \(and 1 more\)$"):
        make_config(tree(train={"steps": 0, "seed": -1, "eps": 0}))


def test_a_section_with_all_lines_commented_out_is_no_mistake():
    assert make_config(tree(train=None)) == make_config(tree())


@pytest.mark.parametrize("alias", MODEL_ALIASES)
def test_model_defaults_stand_under_the_users_values(alias):
    for name in (alias, MODEL_ALIASES[alias]):
        config = make_config(tree(model=name))
        for section, values in MODEL_DEFAULTS.get(alias, {}).items():
            for key, value in values.items():
                assert getattr(getattr(config, section), key) == value
    assert make_config(tree(model=alias, data={"resolution": 256})).data.resolution == 256


def test_a_local_folder_brings_its_own_resolution(tmp_path):
    for part, text in (("unet", '{"sample_size": 96}'), ("vae", '{"block_out_channels": [1, 2, 3, 4]}')):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(text)
    assert make_config(tree(model=str(tmp_path))).data.resolution == 768
    (tmp_path / "vae" / "config.json").write_text("{broken")
    assert make_config(tree(model=str(tmp_path))).data.resolution == 1024


def test_overrides():
    config = make_config(
        tree(train={"steps": 5}),
        ["train.steps=300", "train.learning_rate=1e-4", "adapter.factors.q=[8, 64]", "output=runs/x", "revision=null"],
    )
    assert (config.train.steps, config.train.learning_rate, config.output) == (300, 1e-4, "runs/x")
    assert config.adapter.factors == {"q": [8, 64]}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "should read key=value"),
        ("=3", "should read key=value"),
        ("train..steps=3", "should read key=value"),
        ("output.x=3", "holds a value and not a section"),
        ("train.steps=[", "line 1"),
        ("train.stepz=3", "did you mean steps?"),
        ("trian.steps=3", "did you mean train?"),
    ],
)
def test_wrong_overrides(override, said):
    with pytest.raises(ValueError) as caught:
        make_config(tree(), [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_do_not_change_what_was_given():
    given_tree = tree(train={"steps": 5})
    make_config(given_tree, ["train.steps=7"])
    assert given_tree["train"] == {"steps": 5}


@pytest.mark.parametrize("model", MODEL_ALIASES)
def test_dump_reads_back_equal_and_says_all(model, tmp_path):
    config = make_config(
        tree(model=model, train={"mixed_precision": "no", "eps": 1e-12}, subject=dict(tree()["subject"], token="日本"))
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert set(yaml.safe_load(dump_config(config))) == set(RunConfig.model_fields)


def test_every_field_has_one_line_of_documentation():
    def fields(model):
        for name, field in model.model_fields.items():
            yield name, field
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from fields(field.annotation)

    for name, field in fields(RunConfig):
        assert field.description and "\n" not in field.description, name


def test_schema_has_the_names_of_the_yaml():
    found = schema()
    assert "class" in found["$defs"]["SubjectConfig"]["properties"]
    assert found["$defs"]["TrainConfig"]["properties"]["steps"]["description"]
    assert found["additionalProperties"] is False


@pytest.mark.parametrize(("text", "count"), [("4M", 4_000_000), ("500k", 500_000), ("1.5m", 1_500_000), ("12", 12)])
def test_parse_count(text, count):
    assert parse_count(text) == count


def test_config_needs_neither_torch_nor_diffusers():
    heavy = "{'torch', 'diffusers', 'numpy', 'PIL'}"
    code = f"import sys, diffusekrona_train.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


KEYS = st.sampled_from([*RunConfig.model_fields, "class", "images", "steps", "a1", "type", "prompts", "zzz"]) | st.text(
    max_size=4
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["krona", "toybox"])
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_any_tree_validates_or_gives_one_line(more):
    try:
        config = make_config({**tree(), **more})
    except ValueError as error:
        assert "\n" not in str(error) and str(error)
    else:
        assert make_config(parse_yaml(dump_config(config))) == config


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_give_one_line(content):
    try:
        parse_yaml(content.decode("utf-8", "replace"))
    except ValueError as error:
        assert "\n" not in str(error) and str(error)


def test_half_of_a_pair_says_what_the_other_half_is():
    with pytest.raises(ValueError, match=r"train\.betas: \[0\.9\] lacks value 2; it is: AdamW's betas\."):
        make_config({"subject": {"images": "x", "class": "dog"}, "output": "x", "train": {"betas": [0.9]}})


def test_what_is_a_word_or_a_switch_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="^train.cuda_graph: 'maybe' should be 'auto', True or False$"):
        make_config({"subject": {"images": "x", "class": "dog"}, "output": "runs/x", "train": {"cuda_graph": "maybe"}})
