"""Which layers of a denoiser are adapted, found by role: attention is a module with to_q, to_k, to_v and to_out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import nn

from diffusekrona_train.adapters import Layer
from diffusekrona_train.config import AdapterConfig

ROLES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out"}


def find_layers(model: nn.Module, spec: AdapterConfig | None) -> list[Layer]:
    """The layers of `model` that `spec` chooses, in the model's order; none: all attention and feed-forward linears.

    Raises ValueError where the model has no such attention, or a pattern matches nothing (with near misses).
    """
    layers = [layer for name, module in model.named_modules() for layer in _layers_of(name, module)]
    if not any(layer.kind != "ffn" for layer in layers):
        raise ValueError(f"{type(model).__name__} has no attention module with to_q, to_k, to_v and to_out")
    return layers if spec is None else select_layers(layers, spec)


def select_layers(layers: list[Layer], spec: AdapterConfig) -> list[Layer]:
    """The same choice from a list of layers, such as a table of a model that is not there. Raises as `find_layers`."""
    if spec.targets == "all":
        return layers
    chosen = [layer for layer in layers if _has_role(layer, spec)]
    if not chosen:
        kinds = sorted({layer.kind for layer in layers})
        raise ValueError(
            f"adapter: targets {spec.targets} with attention: {spec.attention} match no layer; "
            f"the model has layers of these kinds: {', '.join(kinds) or 'none'}"
        )
    if spec.blocks is None:
        return chosen
    for pattern in spec.blocks:
        if not any(_matches(layer.name, pattern) for layer in chosen):
            raise ValueError(f"adapter.blocks: {pattern!r} matches no layer; near: {', '.join(_near(pattern, chosen))}")
    return [layer for layer in chosen if any(_matches(layer.name, pattern) for pattern in spec.blocks)]


def _layers_of(name: str, module: nn.Module) -> Iterator[Layer]:
    """The layers that `module` has by its own role: an attention's projections, or a feed-forward's linears."""
    if all(hasattr(module, role) for role in ROLES.values()):
        linears = {letter: next(_linears(role, getattr(module, role)), None) for letter, role in ROLES.items()}
        if all(linears.values()):
            kind = "cross" if _is_cross(name, module) else "self"
            for letter, (path, linear) in ((k, v) for k, v in linears.items() if v):
                yield _layer(f"{name}.{path}", linear, letter, kind)
    elif isinstance(getattr(module, "net", None), nn.ModuleList | nn.Sequential):
        for path, linear in _linears("net", module.net):  # type: ignore[arg-type]
            yield _layer(f"{name}.{path}", linear, "ffn", "ffn")


def _layer(name: str, linear: nn.Module, projection: str, kind: str) -> Layer:
    return Layer(name.removeprefix("."), linear.in_features, linear.out_features, projection, kind)  # type: ignore[arg-type]


def _linears(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, linear) below `module`; whatever has in_features counts, bitsandbytes' and adapted ones too."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _linears(f"{path}.{name}", child)


def _is_cross(name: str, module: nn.Module) -> bool:
    """diffusers' attention says it itself; others are told by the widths that keys and queries come from."""
    said = getattr(module, "is_cross_attention", None)
    if said is not None:
        return bool(said)
    return name.endswith("attn2") or module.to_k.in_features != module.to_q.in_features  # type: ignore[union-attr]


def _has_role(layer: Layer, spec: AdapterConfig) -> bool:
    if layer.kind == "ffn":
        return spec.ffn
    return layer.projection in spec.targets and spec.attention in ("both", layer.kind)


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatchcase(name, f"*{pattern}*")


def _near(pattern: str, layers: list[Layer]) -> list[str]:
    """Dotted beginnings of layer names that look like `pattern`."""
    parts = [layer.name.split(".") for layer in layers]
    prefixes = list(dict.fromkeys(".".join(words[:n]) for words in parts for n in range(1, len(words) + 1)))
    return (
        difflib.get_close_matches(pattern, prefixes, n=3, cutoff=0.5) or [p for p in prefixes if p.count(".") == 1][:6]
    )
