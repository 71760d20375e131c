"""Names in adapter files: tensor suffixes, what a group of them is, and the metadata that user interfaces show.

The facts are those of the kohya and LyCORIS formats and of the ModelSpec standard.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusekrona_train.adapters.formats.peftnotes import DORA
from diffusekrona_train.adapters.spectra import terms
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import family_named, family_of
from diffusekrona_train.models.layers import Layer

KEY = "diffusekrona"
"""The metadata key of our own JSON."""

SAME = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
}
"""Other tools' suffixes -> kohya's."""

NEEDED = {
    "lora": [["lora_down.weight"], ["lora_up.weight"]],
    "loha": [["hada_w1_a"], ["hada_w1_b"], ["hada_w2_a"], ["hada_w2_b"]],
    "lokr": [["lokr_w1", "lokr_w1_a", "lokr_w1_b"], ["lokr_w2", "lokr_w2_a", "lokr_w2_b"]],
    "rows": [["rows_lokr_w1"], ["rows_lokr_w2"]],
    "terms": [["terms_a"], ["terms_b"]],
    "dora": [["dora_up"], ["dora_down"], ["dora_magnitude"]],
    "oft": [["rotation"]],
}
"""Kind -> its parts; a part is its first suffix, or (LoKr) the two others together. Kind full has `diff`, `diff_b` …"""

SUFFIXES = [suffix for parts in NEEDED.values() for part in parts for suffix in part]
_SUFFIX = re.compile(
    "(.+)\\.(" + "|".join(map(re.escape, [*SUFFIXES, *SAME, "alpha", "rows_alpha"])) + r"|diff(?:_\w+)?)$"
)
AUTHORS_KEY = re.compile(r"unet\.(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")


def split_keys(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split the keys of an adapter file: layer's name in the file -> suffix -> tensor, every layer complete and of one
    kind.

    Raises ValueError naming a tensor that is no adapter's, half a pair, or two kinds in one file.
    """
    if any(AUTHORS_KEY.match(key) for key in tensors):
        raise ValueError(
            "is a checkpoint of the DiffuseKronA authors; import it with krona-convert --from diffusekrona"
        )
    _refuse_foreign(tensors)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _SUFFIX.match(key)
        if match is None:
            raise ValueError(f"tensor {key} is extra: not part of a LoKr, LoRA or LoHa adapter")
        groups.setdefault(match[1], {})[SAME.get(match[2], match[2])] = tensor
    kinds = {name: kind_of(name, group) for name, group in groups.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"mixes {' and '.join(sorted(set(kinds.values())))} layers; only one kind per file is supported"
        )
    return groups


def _refuse_foreign(tensors: Iterable[str]) -> None:
    """Raise ValueError with the reason, and how many tensors it is about, for what adapters of other kinds hold."""
    names = list(tensors)
    for pattern, reason in FOREIGN.items():
        if found := [name for name in names if re.search(pattern, name)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(f"tensor {found[0]}{more} {reason}")


FOREIGN = {
    r"\.(dora_scale|lora_magnitude_vector)\b": f"makes this a DoRA, {DORA}",
    r"^((lora|lycoris|lora_prior)_te\d*_|text_encoder|text_encoders\.|clip_[lgh]\b|cond_stage_model|te[12]?\.)": (
        "adapts a text encoder; only adapters of the denoiser can be read"
    ),
    r"lycoris_text_model|base_model\.model\.text_model": (
        "adapts a text encoder; only adapters of the denoiser can be read"
    ),
    r"(^|\.|_)(llm_adapter|text_conditioner)[._]": (
        "adapts the text conditioner; only adapters of the denoiser can be read"
    ),
    r"\.(lora_mid\.weight|hada_t[12]|lokr_t[12])$": (
        "adapts a 3x3 convolution (Tucker form); only linear layers and 1x1 projections can be read"
    ),
    r"\.(oft_\w+|boft_\w+|oft_R\.weight|rescale)$": "is of OFT, which multiplies the weights and adds nothing",
    r"(^bundle_emb\.|^emb_params$|string_to_param)": "is a textual inversion embedding, not an adapter of the denoiser",
    r"\.lora_(B|up|A|down)\.bias$": "is a bias of a LoRA (lora_bias), which cannot be read here",
}
"""What is in a key -> why such a file cannot be read."""


def kind_of(name: str, group: dict[str, Tensor]) -> str:
    """Return lora, loha, lokr, rows or full; ValueError if a part is missing."""
    for kind, parts in NEEDED.items():
        if not any(suffix in group for part in parts for suffix in part):
            continue
        for whole, *halves in parts:
            if whole not in group and not (halves and all(half in group for half in halves)):
                lacking = next((half for half in halves if half not in group), whole) if _any(halves, group) else whole
                raise ValueError(f"layer {name}: tensor {lacking} is missing")
        return kind
    if any(suffix.startswith("diff") for suffix in group):
        return "full"
    raise ValueError(f"layer {name} has only {', '.join(sorted(group))}: its tensors are missing")


def _any(halves: list[str], group: dict[str, Tensor]) -> bool:
    return any(half in group for half in halves)


def describe_groups(
    layers: list[Layer], groups: dict[str, dict[str, Tensor]]
) -> tuple[AdapterConfig, dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Return spec, options and tensors of another tool's file, from its shapes.

    Its LoKr becomes KronA, thin pairs multiplied out and alpha / rank in w1, which is the same ΔW. Raises ValueError
    where shapes do not make the layer's.
    """
    kind, options, complete = "krona", {}, {}
    for layer in layers:
        group, is_conv = _flat(layer, groups[layer.name])
        if any(suffix.startswith("lokr") for suffix in group):
            complete[layer.name], options[layer.name] = _as_krona(layer, group)
        elif any(suffix.startswith("diff") for suffix in group):
            kind, complete[layer.name], options[layer.name] = "full", group, {}
        else:
            kind, thin = ("lora", "lora_down.weight") if "lora_down.weight" in group else ("loha", "hada_w1_b")
            if not group[thin].shape[0]:
                raise ValueError(f"layer {layer.name}: {thin} has shape {tuple(group[thin].shape)}: its rank is 0")
            alpha = group.get("alpha", torch.tensor(float(group[thin].shape[0])))
            options[layer.name] = {"rank": group[thin].shape[0], "alpha": float(alpha)}
            complete[layer.name] = {**group, "alpha": alpha}
        if is_conv:
            options[layer.name]["conv"] = True
    common = json.loads(Counter(json.dumps(option) for option in options.values()).most_common(1)[0][0])
    common = {key: value for key, value in common.items() if key not in ("row_permutation", "conv")}
    spec = {"type": kind, **_targets(layers), **common}
    return AdapterConfig.model_validate(spec), options, complete


def _flat(layer: Layer, group: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """fp32 tensors with those of a 1x1 convolution as matrices, and whether it is one; ValueError for other shapes."""
    for suffix, tensor in group.items():
        if suffix == "alpha" and tensor.numel() != 1:
            raise ValueError(f"layer {layer.name}: alpha has shape {tuple(tensor.shape)}, not one number's")
        if suffix not in ("alpha", "diff_b") and (tensor.ndim < 2 or tensor.shape[2:] not in ((), (1, 1))):
            raise ValueError(f"layer {layer.name}: {suffix} has shape {tuple(tensor.shape)}, not a matrix's")
    is_conv = any(tensor.ndim == 4 for tensor in group.values())
    return {s: (tensor.flatten(1) if tensor.ndim == 4 else tensor).float() for s, tensor in group.items()}, is_conv


def _as_krona(layer: Layer, group: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    scale, matrices = terms(group)
    A, B = (matrix if isinstance(matrix, Tensor) else matrix[0] @ matrix[1] for matrix in matrices)
    shape = (A.shape[0] * B.shape[0], A.shape[1] * B.shape[1]) if A.ndim == B.ndim == 2 else ()
    if shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"layer {layer.name}: {tuple(A.shape)} and {tuple(B.shape)} do not make its "
            f"{layer.out_features} x {layer.in_features}"
        )
    tensors = {"lokr_w1": scale * A, "lokr_w2": B, "alpha": torch.tensor(1.0)}
    return tensors, {"a1": A.shape[1], "a2": A.shape[0]}


def _targets(layers: list[Layer]) -> dict[str, Any]:
    """Return the spec's fields that choose exactly the kinds and projections of these layers."""
    kinds = {layer.kind for layer in layers}
    letters = [letter for letter in "qkvo" if any(layer.projection == letter for layer in layers)]
    attention = "both" if {"self", "cross"} <= kinds else "cross" if "cross" in kinds else "self"
    return {"targets": letters or list("qkvo"), "attention": attention, "ffn": "ffn" in kinds}


# ---- metadata ------------------------------------------------------------------------------------------------------


def header(
    path: str | Path,
    *,
    kind: str,
    family: str,
    layers: list[Layer],
    groups: dict[str, dict[str, Tensor]],
    options: dict[str, dict[str, Any]],
    info: dict[str, Any],
) -> dict[str, str]:
    """Return the metadata of an adapter file, every value a string: kohya's ss_ keys and the ModelSpec standard's.

    `kind` is the adapter's type, `info` our own JSON (token, prediction_type, resolution are read if there).
    """
    predicts = str(info.get("prediction_type") or "epsilon")
    base = family_named(family).metadata(layers, predicts)
    title = Path(path).stem
    resolution = info.get("resolution")
    network, arguments, dim, alpha = _network(kind, groups, options)
    about = {
        "ss_network_module": network,
        "ss_network_args": json.dumps(arguments),
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_v2": str(base["ss_base_model_version"].startswith("sd_v2")),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution}x{resolution}" if resolution else _usual_resolution(base),
        **base,
    }
    if words := trigger_words(info):
        about["modelspec.trigger_phrase"] = words
        about["ss_tag_frequency"] = json.dumps({words: {words: 1}}, ensure_ascii=False)  # A1111's and Forge's tags
    return about


def trigger_words(info: dict[str, Any]) -> str:
    """Return the trigger words, identifier and class noun: 'sks dog'; '' if the file has none."""
    return " ".join(str(info[key]).strip() for key in ("token", "class") if info.get("token") and info.get(key))


def model_header(path: str | Path, base: dict[str, str], resolution: int) -> dict[str, str]:
    """Return the ModelSpec metadata of a complete checkpoint file; `base` is its family's for adapters of it."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base["modelspec.architecture"].removesuffix("/lora"),
        "modelspec.implementation": "https://github.com/Stability-AI/"
        + ("generative-models" if base["ss_base_model_version"].startswith("sdxl") else "stablediffusion"),
        "modelspec.title": Path(path).stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.prediction_type": base["modelspec.prediction_type"],
        "modelspec.resolution": f"{resolution}x{resolution}",
    }


def _usual_resolution(base: dict[str, str]) -> str:
    side = {"sd_v1": 512, "sd_v2": 512, "sd_v2_v": 768}.get(base["ss_base_model_version"], 1024)
    return f"{side}x{side}"


def _network(
    kind: str, groups: dict[str, dict[str, Tensor]], options: dict[str, dict[str, Any]]
) -> tuple[str, dict[str, str], str, str]:
    """Return ss_network_module, _args, _dim and _alpha as strings (the args a dict)."""
    largest = max(groups, key=lambda name: options.get(name, {}).get("rank", 0))
    rank, alpha = options.get(largest, {}).get("rank", 1), options.get(largest, {}).get("alpha", 1)
    if kind in ("terms", "dora", "oft"):  # no other tool reads these
        return "diffusekrona", {"algo": kind}, str(rank), f"{float(alpha):g}"
    if kind == "lora":
        return "networks.lora", {}, str(rank), f"{float(alpha):g}"
    whole = all("lokr_w1" in group and "lokr_w2" in group for group in groups.values())
    if kind == "krona" or (kind == "lokr" and whole):
        # LyCORIS takes a full matrix where dim is at least half of it
        dim = str(max(max(group["lokr_w2"].shape) for group in groups.values()))
        factor = Counter(group["lokr_w1"].shape[0] for group in groups.values()).most_common(1)[0][0]
        arguments = {"algo": "lokr", "factor": str(factor), "full_matrix": "True", "preset": "attn-only"}
        return "lycoris.kohya", arguments, dim, dim
    arguments = {"algo": kind, "preset": "attn-only"}
    if kind == "lokr":
        arguments |= {"factor": str(options[largest]["factor"]), "full_matrix": "False"}
    return "lycoris.kohya", arguments, str(rank), str(rank if kind != "full" else 1)


def without_paths(value: Any) -> Any:
    """Replace every local path in `value` by its base name, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str | Path):
        text = str(value)
        local = text.startswith(("/", "./", "../", "~", "\\")) or text[1:3] == ":\\"
        if local or isinstance(value, Path) or (os.sep in text and len(text) < 1000 and Path(text).exists()):
            return text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value


def family_name(model: nn.Module) -> str:
    """Return the family of a loaded denoiser, from its class and config; ValueError if it is unknown."""
    config = {"_class_name": type(model).__name__, **dict(getattr(model, "config", None) or {})}
    return family_of(config, type(model).__name__).name


def layers_per_block(config: Mapping[str, Any] | None) -> int:
    """Return the layers in each block of a denoiser's config; 2, as in SDXL, if it is not one number."""
    value = dict(config or {}).get("layers_per_block", 2)
    return value if isinstance(value, int) else 2
