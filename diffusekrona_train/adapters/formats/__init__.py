"""Read and write adapter files, inject them into a model, and convert them to other tools' formats.

What this project saves is a LoKr, LoRA or LoHa safetensors file with the names and metadata that ComfyUI, A1111 and
Forge read, and one JSON under the key `diffusekrona` that rebuilds the adapter. In three lines, on any pipeline:

    from diffusekrona_train.adapters.formats import load_adapter, set_scale, unload
    load_adapter(pipe, "dog.safetensors")
    set_scale(pipe, 0.8)          # unload(pipe) gives the base back, bit for bit
"""

from diffusekrona_train.adapters.formats.adapterfile import (
    AdapterFile,
    identify,
    read_adapter,
    save_adapter,
    write_adapter,
)
from diffusekrona_train.adapters.formats.authors import import_diffusekrona
from diffusekrona_train.adapters.formats.exports import EXPORTERS, export_command, merge
from diffusekrona_train.adapters.formats.loading import (
    fill,
    identified,
    inject_file,
    known_layers,
    load_adapter,
    open_adapter,
    set_scale,
    unload,
)
from diffusekrona_train.adapters.formats.merged import OVER_BASE
from diffusekrona_train.adapters.formats.sidecar import write_sidecar

__all__ = [
    "EXPORTERS",
    "OVER_BASE",
    "AdapterFile",
    "export_command",
    "fill",
    "identified",
    "identify",
    "import_diffusekrona",
    "inject_file",
    "known_layers",
    "load_adapter",
    "merge",
    "open_adapter",
    "read_adapter",
    "save_adapter",
    "set_scale",
    "unload",
    "write_adapter",
    "write_sidecar",
]
