"""The page on which an adapter is used: generate beside the base model, download, copy to another program."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from diffusekrona_train.app import runs
from diffusekrona_train.app.draft import safe_name
from diffusekrona_train.app.pages import Answer, Studio, fragment, live, number_of, page, posted, studio_of, text_of
from diffusekrona_train.app.worker import export_lora, generate
from diffusekrona_train.common.files import atomic
from diffusekrona_train.config import EMBEDDED

MOST_SHOWN = 24
BASE_FIELDS = ("model", "revision", "variant", "vae", "model_config_dir", "prediction_type")
LORA_FOLDERS = ("models/loras", "models/Lora", "ComfyUI/models/loras")
"""Where ComfyUI and Forge look for adapters, below their own folder."""


def gallery_of(folder: Path) -> list[dict[str, Any]]:
    """Return prompts with their images, the newest first: the base model's before the adapter's."""
    place = folder / "pictures"
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for row in runs.cached("rows", place / "manifest.jsonl", lambda path: list(runs.json_lines(path))):
        path = place / Path(str(row.get("file", ""))).name
        if not path.is_file():
            continue
        scale, made = row.get("scale"), runs.signature(path)[0]
        strengths = [f"{one['strength'] * (scale or 1):g}" for one in row.get("adapters", ())]
        label = "without adapter" if scale is None else f"strength {' and '.join(strengths)}"
        group = groups.setdefault((row["prompt"], row["seed"]), {"newest": 0, "images": {}})
        group["newest"] = max(group["newest"], made)
        group["images"][path.name] = {"file": path.name, "label": label, "made": made, "base": scale is None}
    ordered = sorted(groups.items(), key=lambda item: -item[1]["newest"])[:MOST_SHOWN]
    return [
        {
            "prompt": prompt,
            "seed": seed,
            "images": sorted(group["images"].values(), key=lambda one: (not one["base"], one["made"])),
        }
        for (prompt, seed), group in ordered
    ]


def parts_of(request: Request) -> dict[str, str]:
    """Return the parts of the page that change by themselves."""
    studio = studio_of(request)
    folder = studio.run(request)
    state = {"busy": studio.making.get(folder.name) == "", "error": studio.making.get(folder.name) or ""}
    small = runs.config_of(folder).model in EMBEDDED
    return {"gallery": fragment("_gallery.html", name=folder.name, groups=gallery_of(folder), small=small, **state)}


async def show(request: Request) -> Response:
    """The page."""
    studio = studio_of(request)
    folder = studio.run(request)
    config, adapters = runs.config_of(folder), runs.adapters_of(folder)
    others = [
        other.name
        for other in runs.all_runs(studio.root)
        if other != folder and runs.adapters_of(other) and runs.config_of(other).model == config.model
    ]
    best = (runs.best_of(folder) or {}).get("chosen_step")
    about = {
        "name": folder.name,
        "config": config,
        "steps": sorted(adapters, reverse=True),
        "others": others,
        "best": best,
    }
    parts = await run_in_threadpool(parts_of, request)
    prompt = f"A [V] {config.subject.class_noun} on the beach"
    return page(request, "use.html", parts=parts, prompt=prompt, copy_to=studio.setting("copy_to"), **about)


def make_images(studio: Studio, folder: Path, prompts: Sequence[str], step: int, options: dict[str, Any]) -> None:
    """Begin to generate in the worker; ValueError while the run has images under way."""
    if studio.making.get(folder.name) == "":
        raise ValueError("images of this run are being generated; wait for them")
    source = None
    if "adapters" not in options:  # a checkpoint by its file: the final one has no folder of its own
        adapter = runs.adapters_of(folder)[step]
        options = {**options, **_base(folder)}
        source = str(adapter)
    studio.making[folder.name] = ""

    async def make() -> None:
        try:
            await studio.worker.call(generate, source, list(prompts), options)
            studio.making.pop(folder.name, None)
        except Exception as error:  # whatever it is, the page says it and the next try may do better
            studio.making[folder.name] = " ".join(str(error).split())[:400] or type(error).__name__

    task = asyncio.get_running_loop().create_task(make())
    studio.tasks.add(task)
    task.add_done_callback(studio.tasks.discard)


def _base(folder: Path) -> dict[str, Any]:
    """The base model as the run's config names it."""
    config = runs.config_of(folder)
    return {name: value for name in BASE_FIELDS if (value := getattr(config, name)) is not None}


@posted
async def create(request: Request, form: FormData) -> Answer:
    """Generate a prompt with the adapter and without it."""
    studio = studio_of(request)
    folder, prompt = studio.run(request), text_of(form, "prompt")
    if not prompt:
        raise ValueError("prompt: write what the image should show, such as A [V] dog on the beach")
    adapters = runs.adapters_of(folder)
    step = int(number_of(form, "step", max(adapters, default=0), 0, 10**6))
    if step not in adapters:
        raise ValueError(f"step: {folder.name} has no checkpoint of step {step}")
    first = int(number_of(form, "seed", 0, 0, 2**40))
    strength = number_of(form, "strength", 1, 0, 2)
    seeds = range(first, first + int(number_of(form, "count", 1, 1, 8)))
    options: dict[str, Any] = {"seeds": list(seeds), "base": "base" in form, "output": folder / "pictures"}
    if second := text_of(form, "second"):
        other = runs.find_run(studio.root, second)
        others = runs.adapters_of(other)
        if not others:
            raise ValueError(f"second: {second} has no adapter yet")
        also = number_of(form, "second_strength", 1, 0, 2)
        uses = [f"{adapters[step]}:{strength:g}", f"{others[max(others)]}:{also:g}"]
        options |= {"adapters": uses, **_base(folder)}
    else:
        options["scale"] = strength
    make_images(studio, folder, [prompt], step, options)
    return {"busy": True} if "x-csrf" in request.headers else f"/runs/{quote(folder.name)}/use"


async def picture(request: Request) -> Response:
    """A generated image."""
    folder = studio_of(request).run(request)
    found = [path for path in (folder / "pictures").glob("*.png") if path.name == request.path_params["file"]]
    if not found:
        raise LookupError("no such image")
    return FileResponse(runs.inside(found[0], folder), media_type="image/png")


# ---- files ---------------------------------------------------------------------------------------------------------


async def _adapter(studio: Studio, folder: Path, step: int | None, kind: str) -> tuple[Path, str]:
    """(file, name to give it) of a checkpoint as it is, or as an exact LoRA, which is made at the first call."""
    adapters = runs.adapters_of(folder)
    step = max(adapters, default=0) if step is None else step
    if step not in adapters:
        raise LookupError(f"{folder.name} has no adapter of step {step}")
    if kind not in ("lokr", "lora"):
        raise ValueError(f"format: {kind[:20]!r} should be lokr or lora")
    stem = safe_name(folder.name, "adapter") + ("" if step == max(adapters) else f"-step-{step}")
    source = runs.inside(adapters[step], folder)
    if kind == "lokr":
        return source, f"{stem}.safetensors"
    target = folder / "exports" / f"{stem}-lora.safetensors"
    if not target.is_file() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(exist_ok=True)
        await studio.worker.call(export_lora, source, target)
    return target, target.name


async def download(request: Request) -> Response:
    """An adapter file."""
    studio, query = studio_of(request), request.query_params
    step = query.get("step", "")
    wanted = int(step) if step.isdigit() else None
    file, name = await _adapter(studio, studio.run(request), wanted, query.get("format", "lokr"))
    return FileResponse(file, media_type="application/octet-stream", filename=name)


@posted
async def copy(request: Request, form: FormData) -> Answer:
    """Copy the adapter into the folder of another program, which is remembered."""
    studio = studio_of(request)
    folder, named = studio.run(request), text_of(form, "folder") or studio.setting("copy_to")
    target = lora_folder(named)
    step = text_of(form, "step")
    file, name = await _adapter(
        studio, folder, int(step) if step.isdigit() else None, text_of(form, "format") or "lokr"
    )

    def write() -> None:
        with atomic(target / name) as temporary:
            shutil.copyfile(file, temporary)
        studio.setting("copy_to", named)

    await run_in_threadpool(write)
    return {"said": f"{name} is in {target} now"} if "x-csrf" in request.headers else f"/runs/{quote(folder.name)}/use"


def lora_folder(named: str) -> Path:
    """Return the folder for adapters of the program in `named`; ValueError where there is none."""
    place = Path(named).expanduser()
    if named and place.is_absolute():
        if place.name.lower() in ("lora", "loras") and place.is_dir():
            return place
        for inner in LORA_FOLDERS:
            if (place / inner).is_dir():
                return place / inner
    raise ValueError(
        f"folder: {named[:80]!r} should be the full path of ComfyUI or Forge (with models/loras or models/Lora in it)"
    )


ROUTES = [
    Route("/runs/{name}/use", show),
    Route("/runs/{name}/use/events", live(parts_of)),
    Route("/runs/{name}/generate", create, methods=["POST"]),
    Route("/runs/{name}/pictures/{file}", picture),
    Route("/runs/{name}/adapter", download),
    Route("/runs/{name}/copy", copy, methods=["POST"]),
]
