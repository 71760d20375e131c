"""A folder of computed tensors under keys of what they were made from: read, made where missing, shared over processes.

An entry is one safetensors file with a digest of its content; a damaged one counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusekrona_train.common.device import free
from diffusekrona_train.common.faults import reach
from diffusekrona_train.common.files import atomic, remove_abandoned

Result = TypeVar("Result")
Maker = Callable[[Any], dict[str, Tensor]]
FORMAT = 1
"""Raised whenever an entry of the same key would hold something else."""


@dataclass(frozen=True)
class Entry:
    """One file of the cache: what it is made from, and what to call it in a message."""

    kind: str
    made_from: dict[str, Any]
    what: Any
    """Handed to the maker."""
    problem: str
    """What to say where the result is not finite."""

    def path(self, folder: Path) -> Path:
        text = json.dumps({"format": FORMAT, "kind": self.kind, **self.made_from}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        return folder / self.kind / key[:2] / f"{key}.safetensors"


class Processes(Protocol):
    """accelerate's view of the processes of a run."""

    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...


class Store:
    """Entries read from disk or made, over the processes of an accelerator (one process without).

    `gather` joins the lists of all processes, in the order of their ranks; default: accelerate's gather_object.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Processes | None,
        log: Callable[[str], object],
        gather: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        self.folder, self.accelerator, self.gather = folder, accelerator, gather
        self.rank = accelerator.process_index if accelerator else 0
        self.world = accelerator.num_processes if accelerator else 1
        self.log = log if self.rank == 0 else lambda text: None
        if self.rank == 0:
            remove_abandoned(folder)

    def get(self, entries: Sequence[Entry], open_maker: Callable[[], Maker]) -> tuple[list[dict[str, Tensor]], bool]:
        """Return the tensors of all entries, and whether something had to be loaded to make one.

        Shares go by position among all entries, not among the missing: other processes write while this one looks.
        """
        distinct = {entry.path(self.folder): entry for entry in entries}
        found = {path: read_entry(path) for path in distinct}
        mine = list(distinct.items())[self.rank :: self.world]
        loaded = self.together(lambda: self._make([item for item in mine if found[item[0]] is None], found, open_maker))
        for path, tensors in found.items():
            found[path] = read_entry(path) if tensors is None else tensors
        # on a disk that the processes do not share, each makes what the others kept to themselves
        rest = [item for item in distinct.items() if found[item[0]] is None]
        loaded = self.together(lambda: self._make(rest, found, open_maker)) or loaded
        return [found[entry.path(self.folder)] for entry in entries], loaded  # type: ignore[misc]

    def _make(self, missing: list[tuple[Path, Entry]], found: dict, open_maker: Callable[[], Maker]) -> bool:
        if not missing:
            return False
        start, kind = time.monotonic(), missing[0][1].kind
        make = open_maker()
        for index, (path, entry) in enumerate(missing):
            # copies: a part of a larger tensor would keep all of it in memory
            tensors = {name: value.detach().cpu().contiguous().clone() for name, value in make(entry.what).items()}
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                raise ValueError(entry.problem)
            write_entry(path, tensors, index)
            found[path] = tensors
        del make
        free()
        self.log(f"{kind}: {len(missing)} made in {time.monotonic() - start:.1f} s, kept in {self.folder}")
        return True

    def together(self, action: Callable[[], Result]) -> Result:
        """Run `action` in every process; if it fails in one it fails in all, so that none waits for ever."""
        if self.world == 1:
            return action()
        gather = self.gather
        if gather is None:
            from accelerate.utils import gather_object as gather

        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        messages = [message for message in gather([str(failure) if failure else ""]) if message]
        if failure:
            raise failure
        if messages:
            raise ValueError(messages[0])
        return cast(Result, result)


def read_entry(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of an entry; None where it is missing or damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return None
    return tensors if tensors and expected == _digest(tensors) else None


def write_entry(path: Path, tensors: dict[str, Tensor], index: int = 0) -> None:
    """Write an entry atomically, with a digest that shows later damage."""
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"digest": _digest(tensors)})
        reach("cache", index)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
