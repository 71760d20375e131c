"""Write and read what a run resumes from: complete or not at all, without pickle, refused if the config has changed.

A checkpoint is `checkpoints/step-000100/adapter.safetensors` (kept for ever, loads in any tool) and
`resume/step-000100/state.safetensors` (factors, optimiser, scaler, counters; the newest few are kept). What a step
draws depends only on (seed, step, index), so there is no state of a random generator to keep.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusekrona_train.adapters import formats
from diffusekrona_train.adapters.flat import ALIGN, FlatFactors
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.common import faults
from diffusekrona_train.common.files import atomic
from diffusekrona_train.common.run_folder import adapter_file, step_name, step_of

FORMAT = "2"
OLDER = "1"
"""Version 0.1 kept the moments of each factor under its number."""
MAY_CHANGE = (
    "output",
    "validation",
    "sample",
    "subject.images",  # what lies there is compared instead
    "subject.files",
    "prior.images",
    "data.cache_dir",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_resume_states",
    "train.keep_best",
    "train.log_every",
    "train.trackers",
    "train.cuda_graph",  # it replays the same kernels
)
"""Fields that a resumed run may set anew: how long, what is watched, where things go. All others make another run."""

YOUNGER = {
    "data.text_precision": "auto",
    "adapter.align_draws": 16,
    "adapter.rank_scale": "rank",
    "adapter.rho": 2,
    "adapter.block_size": 16,
    "train.rate_unit": "factor",
    "train.rate_ratio": 1.0,
    "train.dco_beta": 1000.0,
}
"""Fields that states of older versions lack -> the value with which a run trains as it did before they were there."""


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
        """Return the tensors under `prefix/`, without it."""
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
    shown: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Path:
    """Write the checkpoint of `step` under the run folder; return the adapter file.

    The adapter comes first, made of the factors as they are within `shown`; then the resume state, then states beyond
    `keep` and those of later steps go. OSError (a full disk) leaves what was there before untouched.
    """
    faults.reach("adapter", step)
    adapter = adapter_file(folder, step)
    with shown():
        formats.save_adapter(adapter, injection, info)
    assert injection.flat is not None, "a run trains factors in flat buffers"
    moments, numbers = moments_by_name(injection.flat, optimizer)
    tensors = {f"factors/{name}": value for name, value in injection.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in moments.items()}
    tensors |= {f"extra/{name}": value for name, value in extra.items()}
    header = {**about, "step": step, "format": FORMAT, "optimizer": numbers}
    target = folder / "resume" / step_name(step) / "state.safetensors"
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
    """Remove what a run left behind that was rewound to before it: it belongs to another line of steps."""
    found = [*(folder / "resume").glob("step-*"), *(folder / "checkpoints").glob("step-*")]
    return [path for path in found if step_of(path) > step]


# ---- the optimiser's state: flat in memory, by name in a file -------------------------------------------------------

EACH, BLOCK = ("exp_avg", "exp_avg_sq", "state1", "state2"), ("absmax1", "absmax2")
"""What AdamW and bitsandbytes' 8-bit AdamW keep for each number, and for each block of 256 of them."""


def moments_by_name(flat: FlatFactors, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """Return tensors "exp_avg/layer|factor", those that are of no factor under their own name, and plain numbers.

    A file does not depend on how factors lie in memory. One copy from the device for each kind of moment.
    """
    tensors, numbers = {}, {}
    for path, value in _leaves(optimizer.state_dict()["state"].get(0, {}), separator=":"):
        if not isinstance(value, torch.Tensor):
            numbers[path] = value
        elif _numbers_a_moment(path):
            parts = zip(flat.segments, _parts(flat, path, value.detach().cpu()), strict=True)
            tensors |= {f"{path}/{segment.name}": part for segment, part in parts}
        else:
            tensors[path] = value
    return tensors, numbers


def load_moments(
    flat: FlatFactors, optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor], numbers: dict
) -> None:
    """Put back what `moments_by_name` gave. KeyError where the moments of a factor are missing."""
    state: dict[str, Any] = {}
    for path in dict.fromkeys([*numbers, *(name.split("/")[0] for name in moments)]):
        value = numbers[path] if path in numbers else moments.get(path)
        if (each := _numbers_a_moment(path)) and path not in numbers:
            some = moments[f"{path}/{flat.segments[0].name}"]
            value = torch.zeros(flat.size // each, dtype=some.dtype)
            for segment, part in zip(flat.segments, _parts(flat, path, value), strict=True):
                given = moments[f"{path}/{segment.name}"].flatten()
                part[: len(given)].copy_(given)
        *parents, last = path.split(":")
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    template = optimizer.state_dict()
    template["state"] = {0: state} if state else {}
    optimizer.load_state_dict(template)


def _numbers_a_moment(path: str) -> int:
    """Return how many of the factors' numbers one number of this tensor stands for; 0 where it stands for none."""
    key = path.rpartition(":")[2]
    return 1 if key in EACH else ALIGN if key in BLOCK else 0


def _parts(flat: FlatFactors, path: str, whole: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return each segment's share, with its padding: there too 8-bit moments say what zero is."""
    each = _numbers_a_moment(path)
    for segment in flat.segments:
        yield whole[segment.start // each : (segment.start + segment.step) // each]


def _of_the_older_format(state: State, names: list[str], moments: dict, numbers: dict) -> tuple[dict, dict]:
    """Return moments of version 0.1, by number in the order of the factors, as this version's. ValueError for 8-bit
    ones."""
    if any("/state1" in name or "/absmax1" in name for name in moments):
        raise ValueError(
            f"the resume state {state.path} was written by version 0.1 with train.optimizer: adamw8bit, whose blocks "
            "were laid out otherwise; start a new run from its adapter with train.init_from"
        )
    new: dict[str, torch.Tensor] = {}
    steps = set()
    for path, value in moments.items():
        number, key = path.split("/")
        if key == "step":
            steps.add(float(value))
        else:
            new[f"{key}/{names[int(number.removeprefix('#'))]}"] = value
    if len(steps) > 1:
        raise ValueError(f"the resume state {state.path} has factors of different step counts")
    return new | {"step": torch.tensor(max(steps))} if steps else new, numbers


# ---- reading -------------------------------------------------------------------------------------------------------


def states(folder: Path) -> list[Path]:
    """Return the folders of complete resume states, the newest first."""
    found = [path for path in (folder / "resume").glob("step-*") if (path / "state.safetensors").is_file()]
    return sorted((path for path in found if step_of(path) >= 0), key=step_of, reverse=True)


def read(path: Path) -> State:
    """Return the state in `path` (its folder or file). ValueError where it is missing, damaged or of another format."""
    file = path / "state.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no resume state at {path}; give a folder such as runs/dog/resume/step-000100")
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["krona"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"the resume state {file} cannot be read ({type(error).__name__}: {error})") from None
    if about.get("format") not in (FORMAT, OLDER) or not isinstance(about.get("step"), int):
        raise ValueError(f"the resume state {file} has format {about.get('format')!r}; this version reads {FORMAT}")
    return State(file, tensors, about)


def newest(folder: Path, warn: Callable[[str], object] = lambda _: None) -> State | None:
    """Return the newest state that can be read, None without one; a damaged one is reported to `warn` and skipped."""
    damaged = []
    for path in states(folder):
        try:
            state = read(path)
        except ValueError as error:
            damaged.append(f"{error}; taking the one before")
            continue
        for line in damaged:
            warn(line)
        return state
    return None


def refuse_lost(folder: Path) -> None:
    """Raise ValueError where no state can be read though the run went far: starting it anew would wipe its
    checkpoints."""
    kept = list((folder / "checkpoints").glob("step-*/adapter.safetensors"))
    if states(folder) or len(kept) > 1:
        raise ValueError(
            f"--resume: {folder} holds {len(kept)} checkpoints and no resume state that can be read; give an adapter "
            "as train.init_from of another run, or start this one again with --overwrite"
        )


def restore(state: State, injection: Injection, optimizer: torch.optim.Optimizer) -> None:
    """Put factors and optimiser back, bit for bit. ValueError where the state belongs to other factors."""
    wanted = {name: tuple(value.shape) for name, value in injection.state_dict().items()}
    factors = state.part("factors")
    if wanted != {name: tuple(value.shape) for name, value in factors.items()}:
        raise ValueError(f"the resume state {state.path} was made for other factors than this config describes")
    injection.load_state_dict(factors)
    assert injection.flat is not None, "a run trains factors in flat buffers"
    moments, numbers = state.part("optimizer"), state.about["optimizer"]
    if state.about["format"] == OLDER:
        moments, numbers = _of_the_older_format(state, list(wanted), moments, numbers)
    try:
        load_moments(injection.flat, optimizer, moments, numbers)
    except KeyError as error:
        raise ValueError(f"the resume state {state.path} has no moments {error} of the optimiser") from None


# ---- may this config continue that run? ----------------------------------------------------------------------------


def refuse_changes(state: State, config: dict, processes: int) -> None:
    """Raise ValueError naming each field that differs from the run in `state` and may not."""
    trees = state.about["config"], json.loads(json.dumps(config))
    before, now = ({**YOUNGER, **dict(_leaves(tree))} for tree in trees)
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


def _leaves(tree: dict, prefix: str = "", *, separator: str = ".") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}{separator}", separator=separator)
        else:
            yield f"{prefix}{key}", value


def _may_change(field: str) -> bool:
    return any(field == allowed or field.startswith(allowed + ".") for allowed in MAY_CHANGE)
