"""Write a field into an adapter file's own JSON; its tensors stay bit-identical."""

from __future__ import annotations

import json
from pathlib import Path

from diffusekrona_train.adapters.formats import tensorfile
from diffusekrona_train.adapters.formats.names import KEY


def annotate(path: str | Path, **info: object) -> None:
    """Set fields of the JSON that an adapter file of this project describes itself with (None removes a field).

    Nothing is written where nothing changes. ValueError for a file of another tool, which has no such JSON.
    """
    tensors, metadata = tensorfile.read(path)
    if KEY not in metadata:
        raise ValueError(f"{path}: is not an adapter file of this project; it has no metadata to write into")
    before = json.loads(metadata[KEY])
    after = {name: value for name, value in {**before, **info}.items() if value is not None or name not in info}
    if after != before:
        text = json.dumps(after, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        tensorfile.write(path, tensors, {**metadata, KEY: text})
