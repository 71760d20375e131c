"""Name records anew whose names left out what was default when they were made; their scores are not touched.

    python scripts/studies/rekey.py docs/paper/toybox/records.jsonl

Version 0.1 named a record by the config fields that differed from the defaults, and said nothing of what no study
varied. A default that changed would then have found a record of other runs. Names are now made of every value. The
defaults of then are written out below and not taken from the package, where they may change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffusekrona_train.common.files import atomic
from scripts.studies.records import Record, key_of, lines_of

DEFAULTS_OF_0_1: dict[str, Any] = json.loads("""
{"revision": null, "variant": null, "vae": null, "model_config_dir": null,
 "subject": {"class": null, "token": "sks", "prompt": "A [V] {class}", "captions": true},
 "adapter": {"type": "krona", "a1": 4, "a2": 64, "factors": {}, "factors_by_width": {}, "params": null,
  "match_lora_rank": null, "on_indivisible": "error", "init_a": "normal", "init_b": "zero", "rank": 4, "alpha": null,
  "factor": -1, "full_matrix": false, "decompose_both": false, "scale": 1.0, "targets": ["q", "k", "v", "o"],
  "attention": "both", "blocks": null, "ffn": false},
 "data": {"resolution": 1024, "crop": "center", "buckets": false, "flip": false, "variants": 1,
  "vae_precision": "fp32"},
 "prior": {"kind": "none", "weight": 1.0, "prompt": "A {class}", "images": null, "count": 100},
 "train": {"learning_rate": 0.0005, "batch_size": 1, "gradient_accumulation": 1, "optimizer": "adamw",
  "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-08, "max_grad_norm": 1.0, "schedule": "constant",
  "warmup_steps": 0, "seed": 0, "mixed_precision": "auto", "quantize": "none", "memory": "auto", "compile": false,
  "tf32": true, "channels_last": false, "loss": "mse", "weighting": "none", "snr_gamma": 5.0, "noise_offset": 0.0,
  "caption_dropout": 0.0, "init_from": null}}
""")
SOURCE = ("revision", "variant", "vae", "model_config_dir")
"""What names the base model of a record without training."""
SAMPLING_OF_0_1 = {"negative": "", "scheduler": None, "noise": "prompt", "strength": 1.0, "strength_schedule": ""}
ENCODERS_OF_0_1 = {
    True: {"CLIP": "toybox", "DINO": "toybox"},
    False: {"CLIP": "openai/clip-vit-base-patch32", "DINO": "facebook/dino-vits16"},
}
BATCH_OF_0_1 = {True: 12, False: 1}
"""By whether the model is toybox: images generated at once, as configs/paper/models had it."""


def rekeyed(record: Record) -> Record:
    """Return a record of 0.1 under its new name, any other as it is; ValueError where it does not fit its old name."""
    of = record["of"]
    if "encoders" in of:
        return record
    if key_of(of) != record["key"]:
        raise ValueError(f"the record {record['key']!r} does not fit its key; it was changed")
    run, toybox = of["run"], of["run"]["model"].startswith("toybox ")
    base = of["step"] == 0
    config = _base_config(run["config"]) if base else filled(run["config"], DEFAULTS_OF_0_1)
    if not base and config["train"]["schedule"] != "constant":
        config["train"].setdefault("steps", 500)
    of = {
        **of,
        "run": {**run, "config": config},
        "sampling": {**of["sampling"], **SAMPLING_OF_0_1, "batch_size": BATCH_OF_0_1[toybox]},
        "encoders": ENCODERS_OF_0_1[toybox],
        "gallery": "",
    }
    return {**record, "key": key_of(of), "of": of, "run": "base" if base else key_of(of["run"])}


def filled(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a config that leaves defaults out with the sections' defaults filled in."""
    unknown = tree.keys() - defaults.keys() - {"steps"}
    assert not unknown, f"0.1 had no field {sorted(unknown)}"
    return {
        name: filled(tree.get(name, {}), value) if isinstance(value, dict) and value else tree.get(name, value)
        for name, value in defaults.items()
    } | ({"steps": tree["steps"]} if "steps" in tree else {})


def _base_config(config: dict[str, Any]) -> dict[str, Any]:
    return {"subject": config["subject"], **{name: config.get(name) for name in SOURCE}}


def main(given: list[str]) -> int:
    if len(given) != 1 or not Path(given[0]).is_file():
        print("error: give one file of records, such as docs/paper/toybox/records.jsonl", file=sys.stderr)
        return 2
    path = Path(given[0])
    try:
        old = [record for _, record in lines_of(path)]
        new = {record["key"]: record for record in map(rekeyed, old)}
    except ValueError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    assert len(new) == len(old), "two records under one name"
    with atomic(path) as temporary:
        lines = (json.dumps(new[key], ensure_ascii=False, sort_keys=True) for key in sorted(new))
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    changed = len(new.keys() - {record["key"] for record in old})
    print(f"{changed} of {len(new)} records have new names")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
