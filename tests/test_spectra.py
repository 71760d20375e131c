"""Closed forms against the dense matrix, for every adapter; pictures that are really there."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from diffusekrona_train.adapters import ADAPTERS, plan, spectra
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import Layer
from diffusekrona_train.report import factors

LAYER = Layer("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 24, 36, "q", "self")
SPECS = [
    AdapterConfig(a1=4, a2=6, scale=0.5),
    AdapterConfig(a1=24, a2=1, scale=-2.0),
    AdapterConfig(a1=1, a2=36),
    AdapterConfig(type="lora", rank=3, alpha=5.0, scale=0.5),
    AdapterConfig(type="lora", rank=30),
    AdapterConfig(type="lokr", rank=1, alpha=0.5),
    AdapterConfig(type="lokr", rank=1, factor=6, decompose_both=True),
    AdapterConfig(type="lokr", factor=2, full_matrix=True, alpha=3.0),
    AdapterConfig(type="loha", rank=2, alpha=1.0),
    AdapterConfig(type="full", scale=0.5),
]


def made(spec, layer=LAYER):
    adapter = ADAPTERS[spec.type](layer, plan(spec, [layer])[layer.name], spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapter.file_tensors(), adapter.delta().double()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.type)
def test_norm_and_singular_values_are_the_dense_ones(spec):
    tensors, dense = made(spec)
    assert spectra.norm(tensors) == pytest.approx(float(dense.norm()), rel=1e-5)
    values, expected = spectra.singular_values(tensors), torch.linalg.svdvals(dense)
    padded = torch.zeros_like(expected)
    padded[: len(values)] = values[: len(padded)]
    assert torch.allclose(padded, expected, rtol=1e-5, atol=1e-5 * float(expected[0]))
    assert float(values[len(padded) :].sum()) < 1e-5


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.type)
def test_the_exact_lora_pair(spec):
    tensors, dense = made(spec)
    pair = spectra.lora_pair(tensors)
    if pair is None:
        assert spec.type == "full"
        return
    assert torch.allclose((pair[0].double() @ pair[1].double()), dense, rtol=1e-4, atol=1e-5)


def test_unknown_tensors_are_named():
    with pytest.raises(ValueError, match="oft_diag"):
        spectra.terms({"oft_diag": torch.zeros(2)})


def layers(blocks=("down_blocks.0", "mid_block", "up_blocks.1")):
    kinds = [("attn1", "self"), ("attn2", "cross")]
    return [
        Layer(f"{block}.attentions.0.transformer_blocks.{i}.{attention}.to_{letter}", 24, 36, letter, kind)
        for block in blocks
        for i in range(2)
        for attention, kind in kinds
        for letter in "qkv"
    ] + [Layer("mid_block.attentions.0.transformer_blocks.0.ff.net.2", 24, 36, "ffn", "ffn")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.type)
def test_pictures_and_json(tmp_path, spec):
    rows = layers()
    groups = {layer.name: made(spec, layer)[0] for layer in rows}
    base = {layer.name: 10.0 for layer in rows}
    measured = spectra.measure(groups, rows, base)
    written = factors.write_pictures(measured, groups, tmp_path / "out")
    pictures = [path for path in written if path.suffix == ".png"]
    has_a = all("lokr_w1" in group for group in groups.values())
    assert [path.name for path in pictures] == ["norms.png", "singular_values.png"] + ["factors.png"] * has_a
    for path in pictures:
        with Image.open(path) as image:
            shades = image.convert("L").histogram()
        assert sum(count > 0 for count in shades) > 100
    summary = json.loads((tmp_path / "out" / "spectra.json").read_text())
    assert summary["norms"] == "relative" and len(summary["layers"]) == len(rows)
    first = summary["layers"][0]
    assert first["relative"] == pytest.approx(first["norm"] / 10)
    _, dense = made(spec, rows[0])
    energy = (torch.linalg.svdvals(dense) ** 2).cumsum(0)
    assert first["energy_rank_90"] == int((energy < 0.9 * energy[-1]).sum()) + 1


def test_without_the_base_norms_are_absolute_and_an_untrained_adapter_is_flat(tmp_path):
    spec = AdapterConfig(a1=4, a2=6)
    rows = layers()
    groups = {layer.name: ADAPTERS["krona"](layer, {"a1": 4, "a2": 6}, spec).file_tensors() for layer in rows}
    measured = spectra.measure(groups, rows)
    factors.write_pictures(measured, groups, tmp_path)
    assert factors.summary(measured)["norms"] == "absolute"
    assert all(row.norm == 0 and row.relative is None and row.energy_rank_90 == 0 for row in measured)
