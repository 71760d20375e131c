"""The layer tables against diffusers' real classes on the meta device, the file names against its own map."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from diffusekrona_train.models import layers as tables

ASSETS = tables.FOLDER.parent
CONFIGS = {
    "sdxl": ASSETS / "configs/sdxl/unet/config.json",
    "sd15": ASSETS / "configs/sd15/unet/config.json",
    "sd21": ASSETS / "configs/sd21/unet/config.json",
    "toybox": ASSETS / "toybox/pipe/unet/config.json",
}


@pytest.mark.parametrize("alias", CONFIGS)
def test_a_table_is_what_the_real_class_has(alias):
    from diffusers import UNet2DConditionModel

    from diffusekrona_train.models.layers import find_layers

    config = json.loads(CONFIGS[alias].read_text())
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    assert tables.layer_table(alias) == find_layers(unet, None)
    assert tables.base_parameters(alias) == sum(p.numel() for p in unet.parameters())
    assert tables.layers_per_block(alias) == config["layers_per_block"]


def test_sdxl_is_the_paper_s():
    attention = [layer for layer in tables.layer_table("sdxl") if layer.kind != "ffn"]
    assert len(attention) == 560 and len(tables.layer_table("sdxl")) == 700
    assert sum(layer.in_features * layer.out_features for layer in attention) == 955_187_200
    assert tables.layer_table("sd14") == tables.layer_table("sd15")


def test_sgm_names_lead_back_to_diffusers_by_diffusers_own_map():
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(CONFIGS["sdxl"].read_text()))
    names = [layer.name for layer in tables.layer_table("sdxl")]
    state = {}
    for name in names:
        file_name = tables.file_name("sdxl", name)
        state |= {f"{file_name}.lora_down.weight": torch.zeros(1, 2), f"{file_name}.lora_up.weight": torch.zeros(2, 1)}
    mapped = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    from diffusers.utils import convert_unet_state_dict_to_peft

    back = {key.split(".lora_")[0].removeprefix("unet.") for key in convert_unet_state_dict_to_peft(converted)}
    back = {name.replace(".processor", "") for name in back}
    assert back == set(names)


def test_names_are_those_of_the_other_tools():
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert tables.file_name("sd", name) == ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0")
    assert tables.file_name("sdxl", name) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    assert tables.file_name("flux", name).startswith("lycoris_down_blocks_1")
    assert "input_blocks_3_1" in tables.file_name("sdxl", name, layers_per_block=1)


@pytest.mark.parametrize("alias", tables.TABLES)
def test_every_name_of_a_layer_is_known_and_unique(alias):
    per_block = tables.layers_per_block(alias)
    names = [layer.name for layer in tables.layer_table(alias)]
    known = tables.known_names(names, per_block)
    for family in ("sd", "sdxl", "flux"):
        files = tables.file_names(family, names, per_block)
        assert len(set(files.values())) == len(names)
        assert all(known[files[name]] == name for name in names)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no layer table"):
        tables.layer_table("sd3")
    assert tables.describe("conv_in", 4, 4) is None and tables.describe_projection("conv_in", 4) is None


def test_the_tables_need_no_diffusers():
    code = (
        "import sys; from diffusekrona_train.models import layers; layers.layer_table('sdxl'); "
        "print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- writing them ---------------------------------------------------------------------------------------------------


def describe(config: dict) -> dict:
    """The table of one UNet: its layers [dotted name, in, out], all its parameters, its layers a block."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    wanted = (".attn1.", ".attn2.", ".ff.net.")
    layers = [
        [name, module.in_features, module.out_features]
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in name for part in wanted)
    ]
    return {
        "base_parameters": sum(p.numel() for p in unet.parameters()),
        "layers_per_block": config["layers_per_block"],
        "layers": layers,
    }


def write() -> None:
    """Write diffusekrona_train/assets/layers/*.json: after a change of the configs, `python -m tests.test_tables`."""
    tables.FOLDER.mkdir(parents=True, exist_ok=True)
    for alias, path in CONFIGS.items():
        table = describe(json.loads(path.read_text()))
        layers = ",\n  ".join(json.dumps(layer) for layer in table.pop("layers"))
        head = ",\n ".join(f"{json.dumps(key)}: {value}" for key, value in table.items())
        text = "{" + head + ',\n "layers": [\n  ' + layers + "\n ]}\n"
        (tables.FOLDER / f"{alias}.json").write_text(text)
        print(alias, table, json.loads(text)["layers"][0])


if __name__ == "__main__":
    write()
