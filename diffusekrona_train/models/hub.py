"""Load models from the Hugging Face hub or its local cache; report its many errors as one line each."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusekrona_train.config.known import config_file
from diffusekrona_train.models.local import config_name, load_whole


@dataclass
class HubModel:
    """A repository on the Hugging Face hub; `alias` marks one whose configs the package carries."""

    name: str
    revision: str | None = None
    variant: str | None = None
    alias: str | None = None

    @property
    def identity(self) -> str:
        return self.name

    def config(self, part: str) -> dict[str, Any]:
        if self.alias and not self.revision:
            return json.loads(self._packaged(part).read_text())
        from huggingface_hub import hf_hub_download

        with self._hub_errors(part):
            name = "model_index.json" if part == "model_index" else f"{part}/{config_name(part)}"
            file = hf_hub_download(self.name, name, revision=self.revision, local_files_only=hub_is_unreachable())
            return json.loads(Path(file).read_text())

    def _packaged(self, part: str) -> Path:
        """Return the package's own config of a part; ValueError where this model has no such part."""
        alias = {"sd14": "sd15"}.get(str(self.alias), str(self.alias))
        file = config_file(alias, "model_index.json" if part == "model_index" else f"{part}/{config_name(part)}")
        if not file.is_file():
            raise ValueError(f"model {self.name!r} has no {part}/")
        return file

    def load_part(self, part: str, cls: type, **options: Any) -> Any:
        if "torch_dtype" in options or "dtype" in options:
            options["variant"] = self.variant or self._fp16_variant(part)
        with self._hub_errors(part):
            options |= {"revision": self.revision, "local_files_only": hub_is_unreachable()}
            return load_whole(cls, self.name, **({"subfolder": part} if part else {}), **options)

    def _fp16_variant(self, part: str) -> str | None:
        """Return 'fp16' if the repository has half-size files of this part: they are read, then cast."""
        files = self._files
        there = f"{part}/" if part else ""
        return "fp16" if any(file.startswith(there) and ".fp16." in file for file in files) else None

    @functools.cached_property
    def _files(self) -> list[str]:
        from huggingface_hub import HfApi, snapshot_download

        try:
            if hub_is_unreachable():
                raise ConnectionError
            return HfApi().list_repo_files(self.name, revision=self.revision)
        except Exception:
            with contextlib.suppress(Exception):
                folder = Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
                return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            return []

    @contextlib.contextmanager
    def _hub_errors(self, part: str):
        """Turn the hub's many exceptions into one line each, with advice."""
        from huggingface_hub import errors

        at = f" at revision {self.revision!r}" if self.revision else ""
        try:
            yield
        except errors.GatedRepoError:
            raise ValueError(_gated(self.name)) from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
            raise ValueError(
                f"model {self.name!r}{at} was not found on the hub (or is private: run `hf auth login`)"
            ) from None
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
            raise ValueError(_no_network(self.name)) from None
        except errors.EntryNotFoundError:
            raise ValueError(f"model {self.name!r}{at} has no {part}/ in diffusers' layout") from None
        except Exception as error:  # transformers and diffusers wrap the above in OSError; httpx has its own
            text = f"{type(error).__name__} {error} {error.__cause__ or ''} {error.__context__ or ''}"
            if "gated" in text.lower():
                raise ValueError(_gated(self.name)) from None
            if re.search(r"ConnectError|connection|connect to|offline|Max retries|timed out|Timeout|ProxyError", text):
                raise ValueError(_no_network(self.name)) from None
            if isinstance(error, OSError):
                first = str(error).splitlines()[0][:200]
                raise ValueError(f"model {self.name!r}{at}, part {part}: {first}") from None
            if isinstance(error, ValueError):
                raise ValueError(f"model {self.name!r}{at}, part {part}: {str(error).splitlines()[0][:300]}") from None
            raise


@functools.cache
def hub_is_unreachable() -> bool:
    """Return True if the hub's host cannot be connected to: its client would retry for half a minute at each file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return bool(constants.HF_HUB_OFFLINE)
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return True
    return False


def _no_network(name: str) -> str:
    return f"model {name!r} is not in the local hub cache and the hub cannot be reached; give a local folder or file"


def _gated(name: str) -> str:
    return f"model {name!r} is gated: accept its licence on its hub page, then run `hf auth login`"
