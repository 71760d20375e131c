"""Find the linears of a denoiser that can be adapted, by name, in a built model or without one.

`describe` says once what a name means; a family adds to it or leaves out (contracts.Family). Known models have their
linears listed in assets/layers/*.json: no diffusers is imported, so `krona-inspect params` answers at once and a file
can be read with no model at hand.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from diffusekrona_train.common.files import ASSETS
from diffusekrona_train.common.nearest import nearest
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.contracts import Family, Layer, Linears
from diffusekrona_train.models.registry import FAMILIES, family_named, known_family

FOLDER = ASSETS / "layers"
TABLES = {"sdxl": "sdxl", "sd15": "sd15", "sd14": "sd15", "sd21": "sd21", "toybox": "toybox"}
"""Model alias -> table; SD 1.4 has the layers of SD 1.5."""
FAMILY_OF = {"sdxl": "sdxl", "toybox": "sdxl", "sd15": "sd", "sd14": "sd", "sd21": "sd"}
"""Model alias -> family; the toybox counts as SDXL."""


# ---- what a name means ----------------------------------------------------------------------------------------------

PROJECTIONS = {
    "to_q": ("q", "image"),
    "to_k": ("k", "image"),
    "to_v": ("v", "image"),
    "to_out": ("o", "image"),
    "to_out.0": ("o", "image"),
    "add_q_proj": ("q", "text"),
    "add_k_proj": ("k", "text"),
    "add_v_proj": ("v", "text"),
    "to_add_out": ("o", "text"),
}
"""What diffusers calls the projections of an attention -> (role, stream)."""

_ENDS = "|".join(sorted(map(re.escape, PROJECTIONS), key=len, reverse=True))
_PROJECTION = re.compile(rf"(?:(?P<attention>.+)\.)?(?P<end>{_ENDS})")
_FEED_FORWARD = re.compile(r"(?:(?P<feed>.+)\.)?net\.\d+(?:\.proj)?")
CROSS = ("attn2", "cross_attn")
"""Last part of the path of an attention whose keys and values come from the text."""


def describe(name: str, in_features: int, out_features: int) -> Layer | None:
    """Return the row of an attention's projection or a feed-forward's linear in diffusers' names; None for another
    name."""
    if match := _PROJECTION.fullmatch(name):
        attention = match["attention"] or ""
        role, stream = PROJECTIONS[match["end"]]
        kind = "cross" if attention.rpartition(".")[2] in CROSS else "self"
        group = _group(attention, name, role, "text" if kind == "cross" and role in "kv" else stream)
        return Layer(name, in_features, out_features, role, kind, stream, _parent(attention), group)
    if match := _FEED_FORWARD.fullmatch(name):
        return Layer(name, in_features, out_features, "ffn", "ffn", "image", _parent(match["feed"] or ""), name)
    return None


def _group(attention: str, name: str, role: str, reads: str) -> str:
    """Return the name under which a projection shares its input: an output shares it with none."""
    return name if role == "o" else f"{attention}:{reads}"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def described(linears: Linears) -> list[Layer]:
    """Return the rows of all linears that `describe` knows, in their order."""
    return [layer for name, widths in linears.items() if (layer := describe(name, *widths))]


def by_role(linears: Linears) -> list[Layer]:
    """Describe linears of an unknown family: an attention counts where it has q, k, v and an output, and is a cross
    attention also where its keys are made from another width than its queries."""
    roles: dict[str, dict[str, int]] = {}
    rows = [(layer, _parent(layer.name.removesuffix(".0"))) for layer in described(linears)]
    for layer, attention in rows:
        if layer.kind != "ffn":
            roles.setdefault(attention, {})[layer.projection] = layer.in_features
    found = []
    for layer, attention in rows:
        widths = roles.get(attention, {})
        if layer.kind == "ffn":
            found.append(layer)
        elif set("qkvo") <= widths.keys():
            found.append(_crossed(layer, attention) if widths["k"] != widths["q"] else layer)
    return found


def _crossed(layer: Layer, attention: str) -> Layer:
    reads = "text" if layer.projection in "kv" else layer.stream
    return replace(layer, kind="cross", group=_group(attention, layer.name, layer.projection, reads))


# ---- around the transformer blocks of a UNet ------------------------------------------------------------------------

_AROUND = re.compile(r"(?P<block>.+\.attentions\.\d+)\.proj_(?P<end>in|out)")


def describe_projection(name: str, width: int) -> Layer | None:
    """Return the row of a UNet's proj_in or proj_out; None for another name. Only other tools adapt them."""
    match = _AROUND.fullmatch(name)
    return match and Layer(name, width, width, match["end"], "proj", block=match["block"], group=name)


def describer(family: str) -> Callable[[str, int, int], Layer | None]:
    """Return what describes any layer of a family's adapter files by its dotted path: None for one that is not in
    such."""
    own = family_named(family)

    def describe_any(name: str, width_in: int, width_out: int) -> Layer | None:
        found = own.describe(name, width_in, width_out) or describe_projection(name, width_in)
        return found or own.describe_other(name, width_in, width_out)

    return describe_any


def projections_of(layers: Iterable[Layer]) -> list[Layer]:
    """Return proj_in and proj_out of the attention blocks that these layers are in, both as wide as the block itself.

    Linear in SDXL and SD 2, 1x1 convolutions in SD 1.
    """
    found = []
    for layer in layers:
        block, _, rest = layer.name.partition(".transformer_blocks.0.")
        if rest == "attn1.to_q":
            found += [describe_projection(f"{block}.proj_{end}", layer.in_features) for end in ("in", "out")]
    return [layer for layer in found if layer]


# ---- known models, without building them ----------------------------------------------------------------------------


@functools.cache
def _table(alias: str) -> dict[str, Any]:
    if alias not in TABLES:
        raise ValueError(f"model {alias!r} has no layer table; there are {', '.join(TABLES)}")
    return json.loads((FOLDER / f"{TABLES[alias]}.json").read_text())


def layer_table(alias: str) -> list[Layer]:
    """Return all layers of a known denoiser that can be adapted, in the order of its modules."""
    linears = {name: (width_in, width_out) for name, width_in, width_out in _table(alias)["layers"]}
    return family_named(FAMILY_OF[alias]).layers(linears)


def base_parameters(alias: str) -> int:
    """Count all parameters of a known denoiser."""
    return _table(alias)["base_parameters"]


def layers_per_block(alias: str) -> int:
    """Return the layers in each down block of a known denoiser: SDXL's file names depend on it."""
    return _table(alias)["layers_per_block"]


# ---- names in adapter files -----------------------------------------------------------------------------------------


def underscored(prefix: str, path: str) -> str:
    """Return a dotted path as kohya's and LyCORIS's files write it: lycoris_transformer_blocks_0_attn_to_q."""
    return prefix + path.replace(".", "_")


def usual_names(*paths: str, prefixes: Sequence[str] = ()) -> list[str]:
    """Return the forms in which tools write a layer's paths: bare, with the dotted `prefixes`, kohya's and
    LyCORIS's."""
    dotted = ["", *(f"{prefix}." for prefix in prefixes)]
    return [
        form
        for path in dict.fromkeys(paths)
        for form in (
            *(f"{prefix}{path}" for prefix in dotted),
            *(underscored(p, path) for p in ("lora_unet_", "lycoris_")),
        )
    ]


def file_name(family: str, name: str, layers_per_block: int = 2) -> str:
    """Return the name of layer `name` (dotted diffusers path) in an adapter file of `family`, without a tensor's
    suffix."""
    if family not in FAMILIES:
        return underscored("lycoris_", name)
    return family_named(family).file_name(name, layers_per_block)


def file_names(family: str, names: Iterable[str], layers_per_block: int = 2) -> dict[str, str]:
    """Return dotted path -> name in an adapter file, for each of `names`; see file_name."""
    return {name: file_name(family, name, layers_per_block) for name in names}


def known_names(names: Iterable[str], layers_per_block: int = 2, family: str = "sdxl") -> dict[str, str]:
    """Return every name that tools give these layers of `family` -> dotted path."""
    other_names = family_named(family).other_names
    return {form: name for name in names for form in other_names(name, layers_per_block)}


# ---- in a model that is built ---------------------------------------------------------------------------------------


def linears_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return dotted name -> (in_features, out_features); bitsandbytes' and adapted linears count too."""
    return dict(_linears("", model))


def _linears(path: str, module: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(widths[0], int) and isinstance(widths[1], int):
        yield path, (widths[0], widths[1])
        return
    for name, child in module.named_children():
        yield from _linears(f"{path}.{name}" if path else name, child)


def linears_of_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return the same from a denoiser's parameter names and shapes: every weight of two dimensions."""
    return {
        name.removesuffix(".weight"): (int(shape[1]), int(shape[0]))
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def find_layers(model: nn.Module, spec: AdapterConfig | None) -> list[Layer]:
    """Return the layers of a built denoiser that `spec` chooses, all without one, in the model's order.

    Its family says which; in a model of no known family they go by their role. Raises ValueError where the model has no
    such attention, or a pattern matches nothing (with near misses).
    """
    config = {"_class_name": type(model).__name__, **dict(getattr(model, "config", None) or {})}
    family = known_family(config)
    layers = family.layers(linears_of(model)) if family else by_role(linears_of(model))
    if not any(layer.kind != "ffn" for layer in layers):
        raise ValueError(f"{type(model).__name__} has no attention module with to_q, to_k, to_v and to_out")
    return layers if spec is None else select_layers(layers, spec)


def find_projections(model: nn.Module) -> list[Layer]:
    """Return proj_in and proj_out around the transformer blocks of a built UNet, adapted ones too."""
    found = []
    for name, module in model.named_modules():
        if not name:
            continue  # diffusers' models warn where one of their config's fields is asked for as an attribute
        width = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
        if isinstance(width, int) and (layer := describe_projection(name, width)):
            found.append(layer)
    return found


def others(family: Family, linears: Linears) -> list[Layer]:
    """Return the layers of a complete denoiser that only files of other tools adapt, beside a UNet's projections."""
    return [layer for name, widths in linears.items() if (layer := family.describe_other(name, *widths))]


def find_others(model: nn.Module) -> list[Layer]:
    """Return the same, and the projections, of a built denoiser."""
    family = known_family({"_class_name": type(model).__name__, **dict(getattr(model, "config", None) or {})})
    return [*find_projections(model), *(others(family, linears_of(model)) if family else ())]


def select_layers(layers: list[Layer], spec: AdapterConfig) -> list[Layer]:
    """Choose likewise from a list of layers, such as a table of a model that is not built. Raises as `find_layers`."""
    if spec.is_whole:
        return layers
    if layers and spec.streams and not any(_in_stream(layer, spec.streams) for layer in layers):
        streams = " and ".join(sorted({layer.stream for layer in layers}))
        raise ValueError(f"adapter.streams: {spec.streams} matches no layer; those of this model see: {streams}")
    chosen = [layer for layer in layers if _has_role(layer, spec)]
    if not chosen:
        kinds = sorted({layer.kind for layer in layers})
        streams = f" and streams: {spec.streams}" if spec.streams else ""
        raise ValueError(
            f"adapter: targets {spec.targets} with attention: {spec.attention}{streams} match no layer; "
            f"the model has layers of these kinds: {', '.join(kinds) or 'none'}"
        )
    if spec.blocks is None:
        return chosen
    for pattern in spec.blocks:
        if not any(_matches(layer.name, pattern) for layer in chosen):
            raise ValueError(f"adapter.blocks: {pattern!r} matches no layer; near: {', '.join(_near(pattern, chosen))}")
    return [layer for layer in chosen if any(_matches(layer.name, pattern) for pattern in spec.blocks)]


def _in_stream(layer: Layer, streams: Sequence[str]) -> bool:
    return layer.stream in ("both", *streams)


def _has_role(layer: Layer, spec: AdapterConfig) -> bool:
    if spec.streams is not None and not _in_stream(layer, spec.streams):
        return False
    if layer.kind == "ffn":
        return spec.ffn
    return not set(layer.projection).isdisjoint(spec.targets) and spec.attention in ("both", layer.kind)


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatchcase(name, f"*{pattern}*")


def _near(pattern: str, layers: list[Layer]) -> list[str]:
    """Return dotted beginnings of layer names that look like `pattern`."""
    parts = [layer.name.split(".") for layer in layers]
    prefixes = list(dict.fromkeys(".".join(words[:n]) for words in parts for n in range(1, len(words) + 1)))
    return nearest(pattern, prefixes, 0.5, count=3) or [p for p in prefixes if p.count(".") == 1][:6]
