"""Plan the images of one krona-sample call: file names, PNG metadata, manifest, and which exist already.

A file's name ends in a hash of everything that determines its content. So nothing is overwritten, an interrupted call
continues where it stopped, and several processes share the work without communication.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffusekrona_train.common.files import atomic
from diffusekrona_train.sampling.render import SampleSettings

SWEEPABLE: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "guidance": float,
    "scale": float,
    "seed": int,
    "height": int,
    "width": int,
    "scheduler": str,
    "negative": str,
    "strength_schedule": lambda text: "" if text == "none" else text,
}
"""Option of krona-sample that --sweep can take -> how a value is read."""


WIDEST_ROW = 8
"""Images in a row of a sheet that shows the base model beside the adapter."""


@dataclass(frozen=True)
class Planned:
    """One image to generate, the adapter scale (None: only the base model), and its file."""

    prompt: str
    seed: int
    settings: SampleSettings
    scale: float | None
    label: str
    file: str
    record: dict[str, Any]
    subject: int | None = None
    """Number of its adapter, where every prompt has its own."""


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """Parse 'guidance=1,2.5' as ("guidance", [1.0, 2.5]); ValueError with the known options."""
    name, equals, values = text.partition("=")
    if not equals or not values.strip(","):
        raise ValueError(f"--sweep {text!r}: write OPTION=v1,v2 such as guidance=1,5,10")
    name = name.replace("-", "_")
    if name not in SWEEPABLE:
        raise ValueError(f"--sweep {name}: unknown option; use one of {', '.join(SWEEPABLE)}")
    try:
        return name, list(dict.fromkeys(SWEEPABLE[name](value.strip()) for value in values.split(",") if value.strip()))
    except ValueError:
        raise ValueError(f"--sweep {text!r}: a value is not of type {SWEEPABLE[name].__name__}") from None


def plan_pictures(
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleSettings,
    *,
    scale: float | None = 1.0,
    sweeps: Sequence[tuple[str, list[Any]]] = (),
    with_base: bool = False,
    about: dict[str, Any] | None = None,
    first: int = 0,
) -> list[Planned]:
    """Plan every image of a call: prompts, then the base (with_base) before the adapter, then sweep values, then seeds.

    `about` (model, adapters, dtype …) joins each image's record and so its key. Prompts are numbered from `first`.
    """
    names = [name for name, _ in sweeps]
    if len(set(names)) < len(names):
        raise ValueError("--sweep names an option twice; put all of its values in one list")
    planned: list[Planned] = []
    for number, prompt in enumerate(prompts, start=first):
        for combination in itertools.product(*(values for _, values in sweeps)):
            chosen = dict(zip(names, combination, strict=True))
            told = {**chosen, "strength_schedule": chosen.get("strength_schedule") or "none"}
            label = ", ".join(f"{name} {told[name]}" for name in chosen)
            own_scale = chosen.pop("scale", scale)
            own_seeds = [chosen.pop("seed")] if "seed" in chosen else list(seeds)
            own = replace(settings, **chosen)
            for state in [None, own_scale] if with_base and own_scale is not None else [own_scale]:
                for seed in own_seeds:
                    planned.append(_planned(number, prompt, seed, own, state, label, about or {}))
    unique = {item.file: item for item in planned}  # the base is the same at every value of a swept scale
    return list(unique.values())


def _planned(
    number: int,
    prompt: str,
    seed: int,
    settings: SampleSettings,
    scale: float | None,
    label: str,
    about: dict[str, Any],
) -> Planned:
    if scale is None:  # no adapter whose strength could vary
        settings = replace(settings, strength_schedule="")
    record = {"prompt": prompt, "seed": seed, **asdict(settings), **about, "scale": scale}
    if settings.noise == "prompt":
        del record["noise"]  # images of version 0.1 keep their names
    if not settings.strength_schedule:
        del record["strength_schedule"]
    if scale is None:
        record |= {"adapters": []}
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    if scale is None:
        label = re.sub(r",? ?scale [^,]*", "", label)
    middle = re.sub(r"[^A-Za-z0-9.+_-]+", "-", label)[:40]
    parts = [f"{number:03d}", words or "empty", "base" if scale is None else "", middle, f"seed{seed:06d}", key]
    return Planned(prompt, seed, settings, scale, label, "-".join(part for part in parts if part) + ".png", record)


def batches(planned: Sequence[Planned], batch_size: int) -> list[list[Planned]]:
    """Group images by scale and settings, base first.

    The same plan always falls into the same batches: neither a stop nor the number of processes changes which images
    are drawn together, so they are bitwise the same.
    """
    groups: dict[tuple, list[Planned]] = {}
    for item in planned:
        groups.setdefault((item.scale is not None, item.scale or 0.0, item.settings), []).append(item)
    ordered = sorted(groups, key=lambda key: key[:2])
    return [groups[key][i : i + batch_size] for key in ordered for i in range(0, len(groups[key]), batch_size)]


def draw(
    planned: Sequence[Planned],
    folder: Path | None,
    draw_batch: Callable[[list[Planned]], list[Any]],
    *,
    batch_size: int = 1,
    overwrite: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Planned, Any]]:
    """Yield (plan, image) as each is made: this process' share of what `folder` does not hold yet, saved there.

    Without a folder nothing is saved, and all are made.
    """
    for batch in batches(planned, batch_size)[rank::world]:
        missing = [item for item in batch if folder is None or overwrite or not (folder / item.file).exists()]
        if not missing:
            continue
        for item, image in zip(batch, draw_batch(batch), strict=True):
            if item in missing:
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    save_picture(folder / item.file, image, item.record)
                    append_line(folder / "manifest.jsonl", {"file": item.file, **item.record})
                yield item, image


def save_picture(path: Path, image: Image.Image, record: dict[str, Any]) -> None:
    """Save a PNG with the record as JSON under `krona`, and under `parameters` the line that other tools show."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("parameters", parameters_text(record, image.size))
    info.add_itxt("krona", json.dumps(record, ensure_ascii=False, sort_keys=True))
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def parameters_text(record: dict[str, Any], size: tuple[int, int]) -> str:
    """Return the text that A1111 and similar tools write: prompt, negative prompt, then settings by name."""
    settings = {
        "Steps": record["steps"],
        "Sampler": record["scheduler"] or "model's own",
        "CFG scale": record["guidance"],
        "Seed": record["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model": record.get("model", ""),
    }
    if record.get("strength_schedule"):
        settings["Strength schedule"] = record["strength_schedule"]
    negative = f"\nNegative prompt: {record['negative']}" if record["negative"] else ""
    return f"{record['prompt']}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line in one write, so that processes may share the file."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # a descriptor has no file name
    finally:
        os.close(descriptor)


def settle_manifest(planned: Sequence[Planned], folder: Path) -> Path:
    """Rewrite manifest.jsonl: a line for each existing image, sorted by file name; lines of other calls are kept."""
    path = folder / "manifest.jsonl"
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows[row["file"]] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a line cut by a killed process
    rows |= {item.file: {"file": item.file, **item.record} for item in planned}
    there = [rows[name] for name in sorted(rows) if (folder / name).exists()]
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in there))
    return path


def write_sheet(planned: Sequence[Planned], folder: Path) -> Path:
    """Write a labelled contact sheet of the plan: a row for each prompt, the base model's images left of the adapter's.

    Where that would be wider than eight images, the base has a row of its own above the adapter's.
    """
    from diffusekrona_train.report.sheet import contact_sheet

    rows: dict[tuple[str, str], list[Planned]] = {}
    for item in planned:
        rows.setdefault((item.prompt, "base" if item.scale is None else "adapter"), []).append(item)
    has_base = any(state == "base" for _, state in rows)
    labels = {item.file: item.label for item in planned}
    if has_base and max(map(len, rows.values())) <= WIDEST_ROW // 2:
        beside: dict[tuple[str, str], list[Planned]] = {}
        for (prompt, state), items in sorted(rows.items(), key=lambda row: row[0][1] != "base"):
            beside.setdefault((prompt, ""), []).extend(items)
            labels |= {item.file: ", ".join(filter(None, (state, item.label))) for item in items}
        rows = beside
    strips = []
    for (prompt, state), items in rows.items():
        name = f"{state}: {prompt}" if has_base and state else prompt
        strips.append((name, [Image.open(folder / item.file) for item in items]))
    widest = max(rows.values(), key=len)
    columns = [", ".join(filter(None, (labels[item.file], f"seed {item.seed}"))) for item in widest]
    key = hashlib.sha256("".join(item.file for item in planned).encode()).hexdigest()[:8]
    return contact_sheet(strips, folder / f"sheet-{key}.png", columns=columns)
