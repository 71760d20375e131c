"""Every config in configs/ is valid, complete and says true numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from diffusekrona_train.adapters import count_parameters
from diffusekrona_train.config import dump_config, load_config, make_config, parse_yaml
from diffusekrona_train.config.known import known_models
from diffusekrona_train.models.layers import layer_table, select_layers
from diffusekrona_train.training.check import check_config
from tests.tiny.photos import draw_photos

FOLDER = Path(__file__).resolve().parents[1] / "configs"
LAUNCHERS = sorted(FOLDER.glob("*.accelerate.yaml"))
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(LAUNCHERS))
WANTED = """
toybox toybox-flow sdxl sdxl-12gb sdxl-8gb sd15 sd14 sd21 authors-release prior-images prior-teacher captions one-shot
multi-gpu
multi-node baseline-lora-as-counted baseline-lokr-as-counted baseline-loha-as-counted baseline-lora-same-layers
baseline-lokr-same-layers baseline-loha-same-layers
z-image z-image-12gb z-image-8gb klein-4b klein-9b flux2-dev qwen-image krea-2 flux1-dev chroma1 sd3.5-medium anima
""".split()


def test_all_ways_of_use_have_a_config():
    assert {path.stem for path in CONFIGS} == set(WANTED)
    assert [path.name for path in LAUNCHERS] == ["multi-gpu.accelerate.yaml", "multi-node.accelerate.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_valid_commented_and_survives_a_round_trip(path):
    config = load_config(path)
    assert path.read_text().startswith("# ")
    assert make_config(parse_yaml(dump_config(config))) == config


OF_KNOWN = [path for path in CONFIGS if load_config(path).model in known_models()]


@pytest.mark.parametrize("path", OF_KNOWN, ids=lambda path: path.stem)
def test_a_known_models_config_is_checked_without_a_network(path, tmp_path):
    """Licence, download, layers and memory, from the configs in the package."""
    photos = draw_photos(tmp_path / "photos", sizes=((1024, 1024),))
    changes = {"subject": {"images": str(photos), "class": "dog"}, "output": str(tmp_path / path.stem)}
    config = make_config({**parse_yaml(path.read_text()), **changes})
    told, model = "\n".join(line for _, lines in check_config(config) for line in lines), known_models()[config.model]
    assert f"licence: {model.licence}" in told and ("accept it" in told) == model.gated
    assert f"{model.download_gb:.1f} GB are downloaded first" in told and "GiB checkpointing" in told
    assert model.train_instead is None, "a config is for a model to train"
    if other := config.sample.model:
        assert f"generated with {known_models()[other].hub}" in told and "GB more are downloaded for it" in told


def test_outputs_are_distinct():
    outputs = [load_config(path).output for path in CONFIGS]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameter_counts_in_comments_are_true(path):
    claimed = {int(text.replace(",", "")) for text in re.findall(r"([\d,]{7,}) parameters", path.read_text())}
    config = load_config(path)
    if config.model == "sdxl" and claimed:
        layers = select_layers(layer_table("sdxl"), config.adapter)
        assert claimed == {count_parameters(config.adapter, layers)}


def test_baselines_claim_the_papers_counts():
    def counted(name):
        spec = load_config(FOLDER / f"baseline-{name}.yaml").adapter
        return count_parameters(spec, select_layers(layer_table("sdxl"), spec))

    assert counted("lora-as-counted") == counted("lora-same-layers") == 5_806_080
    assert (counted("lokr-as-counted"), counted("lokr-same-layers")) == (1_356_800, 904_640)
    assert (counted("loha-as-counted"), counted("loha-same-layers")) == (20_930_560, 11_612_160)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_files_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert set(yaml.safe_load(path.read_text())) <= set(ClusterConfig.__dataclass_fields__)


def test_readable_text_of_toybox_config():
    config = load_config(FOLDER / "toybox.yaml")
    assert (config.subject.images, config.subject.class_noun, config.output) == ("toybox:poodle", "dog", "runs/toybox")
    assert (config.train.steps, config.train.batch_size, config.data.resolution) == (300, 4, 64)
    assert (config.adapter.a1, config.adapter.a2, config.validation.guidance) == (4, 4, 4.0)
