"""Records: one small JSON file for each (run, step, sampling settings), named by a hash of what determines it.

RUNS/records/KEY.json      what was measured
RUNS/strips/KEY.png        the images of its first seed, side by side
RUNS/trained/RUN/          the run folders

Version 0.1 named a record by the config fields that differed from the defaults, and said nothing of what no study
varied; a default that changed would then have found a record of other runs. Names are now made of every value.

    python -m scripts.studies.records FILE      # give the records of 0.1 in a file their new names; scores stay
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusekrona_train.common.files import atomic, sha256
from diffusekrona_train.config import RunConfig
from diffusekrona_train.config.run import EMBEDDED

ASSETS = Path(__file__).resolve().parents[2] / "diffusekrona_train" / "assets"
METRICS = ("clip_i", "clip_t", "dino")
WITHOUT_INFLUENCE = ("checkpoint_every", "keep_resume_states", "keep_best", "log_every", "trackers", "cuda_graph")
"""Fields of `train` that do not change the factors."""
SINCE: dict[str, Any] = {
    "prediction_type": None,
    "text_encoders": None,
    "subject.caption_key": None,
    "subject.image_column": None,
    "subject.caption_column": None,
    "subject.split": None,
    "adapter.norm_cap": None,
    "adapter.align_draws": 16,
    "adapter.rank_scale": "rank",
    "adapter.rho": 2,
    "adapter.block_size": 16,
    "train.average": None,
    "adapter.streams": None,
    "data.text_precision": "auto",
    "train.rate_unit": "factor",
    "train.rate_ratio": 1.0,
    "train.dco_beta": 1000.0,
}
"""Config fields younger than the first records: dotted name -> the value that trains as before the field was there.

A run with exactly this value is named as if there were no such field, so that older records are found. It is written
here and not taken from the config: when a default changes, the new value is part of the name, and no old record fits.
"""
Record = dict[str, Any]


def key_of(of: dict[str, Any]) -> str:
    """Twelve hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def model_mark(source: Any) -> str:
    """The weights that a record was measured with: an embedded model's list of sums, else its name or its hash.

    toybox-flow's VAE is toybox's, which is not in its list.
    """
    if source.identity in EMBEDDED:
        mark = f"{source.identity} sha256:{sha256(ASSETS / source.identity / 'SHA256SUMS')}"
        vae = ASSETS / "toybox" / "pipe" / "vae" / "diffusion_pytorch_model.safetensors"
        return mark if source.identity == "toybox" else f"{mark} vae sha256:{sha256(vae)[:16]}"
    return source.identity


def run_mark(config: RunConfig, model: str, photos: list[str]) -> dict[str, Any]:
    """Return what a run's factors depend on, every default written out.

    With a constant rate the steps are left out: fewer steps are the beginning of the same run. The photos stand for
    `subject.images`, `files` and `limit`.
    """
    tree = config.model_dump(mode="json", by_alias=True)
    for name in ("model", "output", "validation", "sample"):
        del tree[name]
    del tree["data"]["cache_dir"]
    for name in WITHOUT_INFLUENCE + (("steps",) if config.train.schedule == "constant" else ()):
        del tree["train"][name]
    for name in ("images", "files", "limit"):
        del tree["subject"][name]
    return {"model": model, "config": without_neutral(tree, SINCE), "photos": photos}


def without_neutral(tree: dict[str, Any], since: dict[str, Any]) -> dict[str, Any]:
    """Return a config tree without the fields of `since` that have the value given there."""
    kept = {}
    for name, value in tree.items():
        inner = {key.partition(".")[2]: own for key, own in since.items() if key.startswith(f"{name}.")}
        if name in since and value == since[name]:
            continue
        kept[name] = without_neutral(value, inner) if inner and isinstance(value, dict) else value
    return kept


def path_of(runs: Path, key: str) -> Path:
    return runs / "records" / f"{key}.json"


def strip_of(runs: Path, key: str) -> Path:
    return runs / "strips" / f"{key}.png"


def keep(runs: Path, record: Record, strip: bytes | None = None) -> None:
    """Writes a record, its strip first: a record that is there is whole."""
    if strip is not None:
        with atomic(strip_of(runs, record["key"])) as temporary:
            temporary.write_bytes(strip)
    with atomic(path_of(runs, record["key"])) as temporary:
        temporary.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


def read(runs: Path, key: str) -> Record | None:
    """The record of a key, None where it is not there or damaged."""
    try:
        record = json.loads(path_of(runs, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """The records in one file, one a line, in order of their keys; those that are there of other studies stay."""
    lines = {record["key"]: line for line, record in lines_of(path)}
    lines |= {record["key"]: json.dumps(record, ensure_ascii=False, sort_keys=True) for record in records}
    _write(path, [lines[key] for key in sorted(lines)])


def lines_of(path: Path) -> list[tuple[str, Record]]:
    """(line, record) of each record in a file, none without one; ValueError where a line is none."""
    if not path.is_file():
        return []
    try:
        found = [(line, json.loads(line)) for line in _lines(path) if line]
        return [(line, record) for line, record in found if record["key"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is no file of records; move it, or export to another folder") from None


def import_lines(path: Path, runs: Path, model: str) -> int:
    """Takes up records that another machine made; how many are new here. ValueError where one is of other weights."""
    try:
        lines = _lines(path)
    except OSError as error:
        raise ValueError(f"--import-records {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--import-records {path}: {error}") from None
    found = [_checked(line, f"--import-records {path}, line {i}", model) for i, line in enumerate(lines, 1) if line]
    new = [record for record in found if read(runs, record["key"]) is None]
    for record in new:
        keep(runs, record)
    return len(new)


def _lines(path: Path) -> list[str]:
    """Lines of a text file, of a packed one by its suffix .gz; ValueError where it cannot be read as such."""
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").splitlines()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError):
        raise ValueError("is damaged, or not of the kind that its suffix says") from None


def _write(path: Path, lines: Iterable[str]) -> None:
    """The reverse of `_lines`; equal lines give equal bytes."""
    content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _checked(line: str, where: str, model: str) -> Record:
    try:
        record = json.loads(line)
        key, of = record["key"], record["of"]
        scores = [record["scores"][name] for name in METRICS] if not record.get("diverged") else []
        facts = [record["parameters"], *(record["seconds"][name] for name in ("train", "sample", "measure"))]
        whole = all(isinstance(number, int | float) for number in (*scores, *facts))
        there = of["run"]["model"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{where}: is no record") from None
    if not re.fullmatch("[0-9a-f]{12}", str(key)) or key_of(of) != key or not whole:
        raise ValueError(f"{where}: the record {str(key)[:12]!r} does not fit its key; it was changed or cut")
    if there != model:
        raise ValueError(f"{where}: measured with other weights ({there}); here is {model}")
    return record


# ---- names of 0.1 ----------------------------------------------------------------------------------------------------


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
        print("error: give one file of records, such as docs/paper/toybox/records.jsonl.gz", file=sys.stderr)
        return 2
    path = Path(given[0])
    try:
        old = [record for _, record in lines_of(path)]
        new = {record["key"]: record for record in map(rekeyed, old)}
    except ValueError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    assert len(new) == len(old), "two records under one name"
    _write(path, [json.dumps(new[key], ensure_ascii=False, sort_keys=True) for key in sorted(new)])
    changed = len(new.keys() - {record["key"] for record in old})
    print(f"{changed} of {len(new)} records have new names")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
