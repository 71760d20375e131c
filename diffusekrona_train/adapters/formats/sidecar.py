"""Write NAME.json beside NAME.safetensors: the trigger words where A1111, Forge and InvokeAI look for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from diffusekrona_train.common.files import atomic

TEXT, VERSION = "activation text", "sd version"
FIELDS = (TEXT, VERSION, "description", "notes", "negative text", "preferred weight")
"""What these programs write into such a file themselves."""
VERSIONS = {"sdxl": "SDXL", "sd_v1": "SD1", "sd_v2": "SD2"}
"""Beginning of ss_base_model_version -> what A1111 calls it."""


def write_sidecar(adapter: Path) -> str:
    """Write the sidecar of an adapter file from the file's own metadata; returns a remark, '' where it has no words.

    Notes that a user made there in another program stay; a JSON file of another kind is left alone.
    """
    with safe_open(adapter, "np") as file:
        about = file.metadata() or {}
    words, path = about.get("modelspec.trigger_phrase"), adapter.with_suffix(".json")
    if not words:
        return ""
    base = about.get("ss_base_model_version", "")
    version = next((name for start, name in VERSIONS.items() if base.startswith(start)), "Unknown")
    kept = _noted(path)
    if kept is None:
        return f"{path.name} is a file of another kind and stays; the trigger words are {words!r}"
    with atomic(path) as temporary:
        text = json.dumps({**kept, TEXT: words, VERSION: version}, ensure_ascii=False, indent=4)
        temporary.write_text(text + "\n", encoding="utf-8")
    return f"{path.name}: trigger words {words!r} for A1111, Forge and InvokeAI"


def _noted(path: Path) -> dict[str, Any] | None:
    """Return what is in a sidecar, {} if there is none; None for a file that is not a sidecar."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and (not found or found.keys() & set(FIELDS)) else None
