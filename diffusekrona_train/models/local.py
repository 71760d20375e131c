"""Load models from a folder in diffusers' layout, like the embedded one; shared code of all model sources."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusekrona_train.common.device import ran_out
from diffusekrona_train.common.files import ASSETS, sha256
from diffusekrona_train.models.checkpointfile import SCALES, listed, read_header
from diffusekrona_train.models.contracts import DENOISERS

BESIDE_WEIGHTS = (*SCALES, "absmax", "quant_map", "qzeros", "weight_scale_inv")
WEIGHTS = ("diffusion_pytorch_model*.safetensors", "model*.safetensors")
CONFIG_NAMES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}


def config_name(part: str) -> str:
    """Return the file name of a part's config inside its subfolder."""
    kind = part.removesuffix("_2").removesuffix("_3").rpartition("_")[2]  # of text_encoder_3: encoder
    return CONFIG_NAMES.get(kind, "config.json")


@functools.cache
def check_embedded(model: str) -> None:
    """Check an embedded model against its SHA256SUMS, once per process; ValueError names a damaged file."""
    folder = ASSETS / model
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        path = folder / name
        if not path.is_file():
            raise ValueError(f"model {model!r}: its file {name} is missing from the package; install it again")
        if sha256(path) != expected:
            raise ValueError(f"model {model!r}: its file {name} is damaged (SHA-256 differs); install it again")


@dataclass
class LocalModel:
    """A folder in diffusers' layout: unet/, vae/, text_encoder/, tokenizer/, scheduler/ …"""

    path: Path
    variant: str | None = None
    name: str | None = None
    alias: str | None = None
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    """Part -> its folder, for parts that lie in another model's."""

    @property
    def identity(self) -> str:
        """Return base name and hash of the weights, or the name that the model was given; never a path."""
        return self._identity

    @functools.cached_property
    def _identity(self) -> str:
        if self.name:
            return self.name
        digest = hashlib.sha256()
        for file in (file for folder in DENOISERS for file in self._weight_files(folder)):
            digest.update(sha256(file).encode())
        return f"{self.path.resolve().name} sha256:{digest.hexdigest()[:16]}"

    def config(self, part: str) -> dict[str, Any]:
        """Return the part's config; ValueError if the folder has no such part or its config cannot be read."""
        file = self._folder(part) / config_name(part)
        if part == "model_index":
            file = self.path / "model_index.json"
            if not file.is_file():
                return {}
        if not file.is_file():
            raise ValueError(f"model folder {str(self.path)!r} has no {part}/{file.name}; a diffusers folder needs it")
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"model folder {str(self.path)!r}: {part}/{file.name} is not JSON ({error.msg})") from None

    def load_part(self, part: str, cls: type, **options: Any) -> Any:
        self.config(part)
        if "torch_dtype" in options or "dtype" in options:
            files = self._weight_files(part)
            if not files:
                raise ValueError(f"model folder {str(self.path)!r} has no .safetensors weights in {part}/")
            plain = [file for file in files if file.name.count(".") == 1 or ".safetensors.index" in file.name]
            options["variant"] = self.variant or (None if plain else _variant_of(files[0].name))
        with one_line_errors(f"model folder {str(self.path)!r}, part {part}"):
            return load_whole(cls, str(self._folder(part)), local_files_only=True, **options)

    def check_part(self, part: str, family: str, tensors: Callable[[], dict[str, Any]]) -> None:
        """Raise ValueError naming what the denoiser's files lack of `tensors`, by their headers.

        Other parts have older names too, which the libraries know: those are held against their files at loading.
        """
        files = self._weight_files(part)
        if part != "unet" or not files:
            return
        there = {name for file in files for name in read_header(file, f"{part}/{file.name}")[0]}
        if missing := [name for name in tensors() if name not in there]:
            raise ValueError(
                f"model folder {str(self.path)!r}, part {part} lacks {listed(missing)}; use a complete copy"
            )

    def _weight_files(self, part: str) -> list[Path]:
        return sorted(file for pattern in WEIGHTS for file in self._folder(part).glob(pattern))

    def _folder(self, part: str) -> Path:
        return self.elsewhere.get(part, self.path / part)


def embedded(model: str) -> LocalModel:
    """A model of the package, its files held against their sums; toybox-flow has toybox's VAE."""
    check_embedded("toybox")
    check_embedded(model)
    elsewhere = {"vae": ASSETS / "toybox" / "pipe" / "vae"} if model == "toybox-flow" else {}
    return LocalModel(ASSETS / model / "pipe", name=model, alias=model, elsewhere=elsewhere)


def _variant_of(file_name: str) -> str | None:
    """Return 'fp16' for model.fp16.safetensors or model.fp16-00001-of-00002.safetensors."""
    middle = file_name.removesuffix(".safetensors").split(".", 1)[1]
    return middle.split("-")[0] or None


def load_whole(cls: Any, name: str, **options: Any) -> Any:
    """Call `cls.from_pretrained`; ValueError if files lack tensors, which libraries replace by random numbers."""
    if not ({"torch_dtype", "dtype"} & options.keys()):  # a tokenizer
        return cls.from_pretrained(name, **options)
    model, told = cls.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"lacks {listed(missing)}; use a complete copy")
    if scales := sorted(key for key in told["unexpected_keys"] if key.endswith(BESIDE_WEIGHTS)):
        raise ValueError(f"holds {listed(scales)} of quantised weights, which are read from single files only")
    return model


@contextlib.contextmanager
def one_line_errors(what: str):
    """Turn a broken folder's OSError or shape error into one line; that memory has ended is no fault of the folder."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if ran_out(error):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{what} cannot be loaded: {first[:200]}") from None
