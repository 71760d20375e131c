"""Writes diffusekrona_train/assets/layers/*.json: the linear layers of the known denoisers, built on the meta device.

Run it after a change of the configs in diffusekrona_train/assets/configs: `python scripts/make_layer_tables.py`.
Needs diffusers; the tables that it writes need nothing. tests/test_tables.py compares them with the real classes.
"""

from __future__ import annotations

import json
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "diffusekrona_train" / "assets"
CONFIGS = {
    "sdxl": ASSETS / "configs" / "sdxl" / "unet" / "config.json",
    "sd15": ASSETS / "configs" / "sd15" / "unet" / "config.json",
    "sd21": ASSETS / "configs" / "sd21" / "unet" / "config.json",
    "toybox": ASSETS / "toybox" / "pipe" / "unet" / "config.json",
}


def describe(config: dict) -> dict:
    """The table of one UNet: its layers [dotted name, in, out], all its parameters, its layers a block."""
    import torch
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


def main() -> None:
    (ASSETS / "layers").mkdir(parents=True, exist_ok=True)
    for alias, path in CONFIGS.items():
        table = describe(json.loads(path.read_text()))
        layers = ",\n  ".join(json.dumps(layer) for layer in table.pop("layers"))
        head = ",\n ".join(f"{json.dumps(key)}: {value}" for key, value in table.items())
        text = "{" + head + ',\n "layers": [\n  ' + layers + "\n ]}\n"
        (ASSETS / "layers" / f"{alias}.json").write_text(text)
        print(alias, table, json.loads(text)["layers"][0])


if __name__ == "__main__":
    main()
