"""The embedded flow transformer: its files, its shared VAE, and that it opens with its own defaults."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from diffusekrona_train.common.files import ASSETS, sha256
from diffusekrona_train.config import load_config
from diffusekrona_train.models import open_model

FOLDER = ASSETS / "toybox-flow"


def test_every_file_has_its_sum_and_the_whole_is_small():
    sums = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    files = [path for path in (FOLDER / "pipe").rglob("*") if path.is_file()]
    assert sums == {path.relative_to(FOLDER).as_posix(): sha256(path) for path in files}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12 * 2**20


def test_it_is_a_flow_of_toyboxs_latents_with_toyboxs_own_vae():
    source = open_model("toybox-flow")
    assert (source.family.name, source.identity, source.prediction_type) == ("zimage", "toybox-flow", "flow")
    assert source.default_resolution == 64
    assert source.family.latent_shape(source.vae_config, 64, 64) == (8, 16, 16)
    attention = [layer for layer in source.layers() if layer.kind == "self"]
    assert len(attention) == 32 and sum(16 + 192 * 192 // 16 for _ in attention) == 74_240
    loaded = source.load("vae")["vae"].state_dict()
    theirs = load_file(ASSETS / "toybox" / "pipe" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(loaded[name], value.float()) for name, value in theirs.items())


def test_its_config_takes_its_defaults():
    config = load_config("configs/toybox-flow.yaml")
    assert (config.data.resolution, config.adapter.a1, config.adapter.a2) == (64, 4, 4)
    assert (config.validation.steps, config.validation.guidance, config.train.learning_rate) == (25, 4.0, 2e-3)
