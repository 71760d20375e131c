"""What a run resumes from: written whole or not at all, read without pickle, refused where the config has changed.

A checkpoint is `checkpoints/step-000100/adapter.safetensors` (kept for ever, loads in any tool) and
`resume/step-000100/state.safetensors` (factors, optimiser, scaler, counters; the newest few are kept). What a step
draws depends on (seed, step, index) alone, so there is no state of a random generator to keep.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusekrona_train.adapters import formats
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.common import faults
from diffusekrona_train.common.files import atomic

FORMAT = "1"
MAY_CHANGE = (
    "output",
    "validation",
    "data.cache_dir",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_resume_states",
    "train.keep_best",
    "train.log_every",
    "train.trackers",
)
"""Fields that a resumed run may set anew: how long, what is watched, where things go. All others make another run."""


@dataclass(frozen=True)
class State:
    """A resume state as read from disk: tensors by name, and `about` (step, config, processes, ...) from its header."""

    path: Path
    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]

    @property
    def step(self) -> int:
        return self.about["step"]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under `prefix/`, without it."""
        return {name[len(prefix) + 1 :]: value for name, value in self.tensors.items() if name.startswith(prefix + "/")}


# ---- writing -------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    injection: Injection,
    optimizer: torch.optim.Optimizer,
    *,
    info: dict,
    about: dict,
    extra: dict[str, torch.Tensor],
    keep: int,
) -> Path:
    """Writes the checkpoint of `step` under the run folder; returns the adapter file.

    The adapter comes first, then the resume state, then states beyond `keep` and those of later steps go.
    OSError (a full disk) leaves what stood before as it was.
    """
    faults.reach("adapter", step)
    adapter = folder / "checkpoints" / name_of(step) / "adapter.safetensors"
    formats.save_adapter(adapter, injection, info)
    moments, numbers = _flatten(optimizer.state_dict()["state"])
    tensors = {f"factors/{name}": value for name, value in injection.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in moments.items()}
    tensors |= {f"extra/{name}": value for name, value in extra.items()}
    header = {**about, "step": step, "format": FORMAT, "optimizer": numbers}
    target = folder / "resume" / name_of(step) / "state.safetensors"
    with atomic(target) as temporary:
        # Clones: bitsandbytes shares its quantisation maps between parameters, and a file holds each tensor once.
        copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        save_file(copies, temporary, metadata={"krona": json.dumps(header)})
        faults.reach("state", step)
    faults.reach("rotation", step)
    for old in [*_later(folder, step), *states(folder)[keep:]]:
        shutil.rmtree(old, ignore_errors=True)
    return adapter


def _later(folder: Path, step: int) -> list[Path]:
    """What a run left behind that was rewound to before it: it belongs to another line of steps."""
    found = [*(folder / "resume").glob("step-*"), *(folder / "checkpoints").glob("step-*")]
    return [path for path in found if (_step_of(path) or 0) > step]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def _flatten(tree: dict, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and plain numbers of a nested dict, by slash-separated path (integer keys as #7)."""
    tensors, numbers = {}, {}
    for key, value in tree.items():
        path = prefix + (f"#{key}" if isinstance(key, int) else key)
        if isinstance(value, dict):
            inner_tensors, inner_numbers = _flatten(value, path + "/")
            tensors |= inner_tensors
            numbers |= inner_numbers
        elif isinstance(value, torch.Tensor):
            tensors[path] = value
        else:
            numbers[path] = value
    return tensors, numbers


def _unflatten(flat: dict[str, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = [int(part[1:]) if part.startswith("#") else part for part in path.split("/")]
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


# ---- reading -------------------------------------------------------------------------------------------------------


def states(folder: Path) -> list[Path]:
    """Folders of complete resume states, the newest first."""
    found = [path for path in (folder / "resume").glob("step-*") if (path / "state.safetensors").is_file()]
    return sorted((path for path in found if _step_of(path) is not None), key=_step_of, reverse=True)  # type: ignore[arg-type]


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"step-(\d+)", path.name)
    return int(match[1]) if match else None


def read(path: Path) -> State:
    """The state in `path` (its folder or file). ValueError where it is missing, damaged or of another format."""
    file = path / "state.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no resume state at {path}; give a folder such as runs/dog/resume/step-000100")
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["krona"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"the resume state {file} cannot be read ({type(error).__name__}: {error})") from None
    if about.get("format") != FORMAT or not isinstance(about.get("step"), int):
        raise ValueError(f"the resume state {file} has format {about.get('format')!r}; this version reads {FORMAT}")
    return State(file, tensors, about)


def newest(folder: Path, log=print) -> State | None:
    """The newest state that can be read, None where there is none; a damaged one is named and passed over."""
    for path in states(folder):
        try:
            return read(path)
        except ValueError as error:
            log(f"{error}; taking the one before")
    return None


def refuse_lost(folder: Path) -> None:
    """ValueError where no state can be read though the run went far: starting it anew would wipe its checkpoints."""
    kept = list((folder / "checkpoints").glob("step-*/adapter.safetensors"))
    if states(folder) or len(kept) > 1:
        raise ValueError(
            f"--resume: {folder} holds {len(kept)} checkpoints and no resume state that can be read; give an adapter "
            "as train.init_from of another run, or start this one again with --overwrite"
        )


def restore(state: State, injection: Injection, optimizer: torch.optim.Optimizer) -> None:
    """Puts factors and optimiser back, bit for bit. ValueError where the state belongs to other factors."""
    wanted = {name: tuple(value.shape) for name, value in injection.state_dict().items()}
    factors = state.part("factors")
    if wanted != {name: tuple(value.shape) for name, value in factors.items()}:
        raise ValueError(f"the resume state {state.path} was made for other factors than this config describes")
    injection.load_state_dict(factors)
    template = optimizer.state_dict()
    template["state"] = _unflatten({**state.part("optimizer"), **state.about["optimizer"]})
    optimizer.load_state_dict(template)


# ---- may this config continue that run? ----------------------------------------------------------------------------


def refuse_changes(state: State, config: dict, processes: int) -> None:
    """ValueError naming each field that differs from the run in `state` and may not."""
    before, now = dict(_leaves(state.about["config"])), dict(_leaves(config))
    changed = [
        f"{field} (was {before.get(field)!r}, now {now.get(field)!r})"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field) and not _may_change(field)
    ]
    if state.about["processes"] != processes:
        changed.append(f"number of processes (was {state.about['processes']}, now {processes})")
    if changed:
        raise ValueError(
            f"cannot resume {state.path.parent}: changed {'; '.join(changed)}. Put the old value back, or start a new "
            "run with another output (a resumed run may change train.steps, validation, logging and output)"
        )


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.loads(json.dumps(value))


def _may_change(field: str) -> bool:
    return any(field == allowed or field.startswith(allowed + ".") for allowed in MAY_CHANGE)
