"""The models that the package knows by name: their configs, counted without weights, against counts taken elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from diffusekrona_train.cli.inspect import app
from diffusekrona_train.config import MODEL_DEFAULTS, AdapterConfig, make_config
from diffusekrona_train.config.known import config_file, known_model, known_models
from diffusekrona_train.models import open_model
from diffusekrona_train.models.layers import select_layers

COUNTS = {
    "z-image": (6.15e9, 136, 7.87e6),
    "klein-4b": (3.88e9, 80, 11.08e6),
    "klein-9b": (9.08e9, 112, 24.67e6),
    "flux2-dev": (32.22e9, 160, 101.5e6),
    "qwen-image": (20.43e9, 478, 17.74e6),
    "krea-2": (12.82e9, 112, 10.35e6),
    "flux1-dev": (11.90e9, 266, 9.87e6),
    "flux1-schnell": (11.89e9, 266, 9.87e6),
    "chroma1": (8.90e9, 266, 9.87e6),
    "sd3.5-medium": (2.24e9, 242, 2.29e6),
    "sd3.5-large": (8.06e9, 302, 7.06e6),
    "anima": (1.96e9, 224, 3.27e6),
}
"""Alias -> parameters of the denoiser, attention layers, parameters of KronA (4, 64) in them: counted by hand from the
real classes. Models that are `like` another have its counts."""


def counted(alias):
    model = known_models()[alias]
    return COUNTS[alias] if model.like is None or alias in COUNTS else counted(model.like)


def test_every_known_model_is_counted_here():
    assert all(counted(alias) for alias in known_models())


@pytest.mark.parametrize("alias", known_models())
def test_a_known_model_opens_without_weights_and_has_the_layers_of_its_class(alias):
    model = known_models()[alias]
    source = open_model(alias)
    assert source.identity == model.hub and source.alias == alias and known_model(model.hub) == model
    source.check()
    base, count, trainable = counted(alias)
    assert source.base_parameters() == pytest.approx(base, rel=2e-3)
    layers = select_layers(source.layers(), AdapterConfig(a1=4, a2=64))
    assert len(layers) == count
    sizes = [256 + layer.in_features * layer.out_features // 256 for layer in layers]
    assert sum(sizes) == pytest.approx(trainable, rel=2e-3)
    # what comes first is what is left to download beside the denoiser: the encoders are never nothing
    assert model.download_gb > 2 * base / 1e9
    assert source.default_resolution % source.family.side_multiple == 0


@pytest.mark.parametrize("alias", known_models())
def test_defaults_of_a_known_model_make_a_run_and_its_default_factors_divide(alias):
    config = make_config({"model": alias, "subject": {"images": "x", "class": "dog"}, "output": "runs/x"})
    assert MODEL_DEFAULTS[alias] == known_models()[alias].defaults
    done = CliRunner().invoke(app, ["params", "--model", alias, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["adapter"]["a1"], found["adapter"]["a2"]) == (config.adapter.a1, config.adapter.a2)
    for row in found["rows"]:  # thin: A has rank a1, B the rank of its shorter side
        b2, b1 = row["out"] // config.adapter.a2, row["in"] // config.adapter.a1
        assert row["lora_rank"] == min(config.adapter.a1, config.adapter.a2) * min(b1, b2)


@pytest.mark.parametrize("alias", known_models())
def test_what_a_model_shares_with_another_is_said(alias):
    model = known_models()[alias]
    for other in filter(None, (model.like, model.train_instead)):
        assert other in known_models() and other != alias
    assert config_file(alias, "vae/config.json").is_file()
    assert model.licence and model.hub.count("/") == 1


@pytest.mark.full
def test_the_download_is_all_parts_in_16_bits():
    found = {}
    for alias in known_models():
        source = open_model(alias)
        parts = source.family.parts
        sizes = [source.parameters_of(part) for part in (parts.denoiser, parts.vae, *parts.text_encoders)]
        found[alias] = 2 * sum(sizes) / 1e9
    assert found == {alias: pytest.approx(model.download_gb, rel=0.1) for alias, model in known_models().items()}


def test_models_are_listed_with_licence_and_download():
    listed = CliRunner().invoke(app, ["models"]).stdout.splitlines()
    for alias, model in known_models().items():
        (line,) = [line for line in listed if line.split()[0] == alias]
        assert model.hub in line and model.licence in line and (", gated" in line) == model.gated


def test_a_distilled_model_is_not_recommended_for_training(tmp_path):
    from diffusekrona_train.training.check import model_lines

    told = {}
    for alias in ("z-image", "z-image-turbo"):
        config = make_config({"model": alias, "subject": {"images": "x", "class": "dog"}, "output": str(tmp_path)})
        told[alias] = "\n".join(model_lines(config, open_model(alias)))
    assert "licence: Apache-2.0" in told["z-image"] and "20.5 GB are downloaded" in told["z-image"]
    assert "train z-image" in told["z-image-turbo"] and "train z-image" not in told["z-image"]


def test_packaged_parts_have_no_weights_when_built():
    source = open_model("z-image")
    assert all(
        value.device == torch.device("meta") for value in source._meta_model(source.family.parts.vae).parameters()
    )


Z_STREAMS = [(None, 136), (["image", "text"], 136), (["image"], 128), (["text"], 128)]
"""30 layers see both, two refiners each see the picture's noise or the caption: 4 projections each."""


@pytest.mark.parametrize(("streams", "count"), Z_STREAMS)
def test_streams_choose_whose_tokens_the_adapted_layers_see(streams, count):
    layers = select_layers(open_model("z-image").layers(), AdapterConfig(streams=streams))
    assert len(layers) == count
    assert {layer.name.split(".")[0] for layer in layers} >= {"layers"}


def test_streams_blocks_and_ffn_combine():
    layers = open_model("z-image").layers()
    spec = AdapterConfig(streams=["text"], blocks=["context_refiner"], ffn=True, targets=["o"])
    chosen = [layer.name for layer in select_layers(layers, spec)]
    wanted = ("attention.to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert sorted(chosen) == sorted(f"context_refiner.{i}.{end}" for i in range(2) for end in wanted)
    with pytest.raises(ValueError, match=r"adapter.blocks: 'noise_refiner' matches no layer"):
        select_layers(layers, AdapterConfig(streams=["text"], blocks=["noise_refiner"]))


def test_a_stream_is_named_once():
    for wrong in ([], ["image", "image"]):
        with pytest.raises(ValueError, match="streams: .* should name at least one of image, text"):
            AdapterConfig.model_validate({"streams": wrong})
    with pytest.raises(ValueError, match="streams: .*text.* matches no layer; those of this model see: image"):
        select_layers(open_model("sdxl").layers(), AdapterConfig(streams=["text"]))
