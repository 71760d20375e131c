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

from diffusekrona_train.app import pages
from diffusekrona_train.app.pages import Answer, Studio, number_of, posted, run_of, studio_of, text_of
from diffusekrona_train.app.worker import export_lora, generate
from diffusekrona_train.common.files import atomic
from diffusekrona_train.config import EMBEDDED
from diffusekrona_train.data.names import safe_name
from diffusekrona_train.training import status

MOST_SHOWN = 24
BASE_FIELDS = ("model", "revision", "variant", "vae", "text_encoders", "model_config_dir", "prediction_type")
LORA_FOLDERS = ("models/loras", "models/Lora", "ComfyUI/models/loras")
"""Where ComfyUI and Forge look for adapters, below their own folder."""


def gallery_of(folder: Path) -> list[dict[str, Any]]:
    """Return prompts with their images, the newest first: the base model's before the adapter's."""
    place, groups = folder / "pictures", dict[tuple[str, int], list[dict[str, Any]]]()
    rows = status.cached("rows", place / "manifest.jsonl", lambda path: list(status.json_lines(path)))
    for row in rows:
        changed, size = status.signature(place / Path(str(row.get("file"))).name)
        if size:
            scale = row.get("scale")
            used = " and ".join(f"{one['strength'] * (scale or 1):g}" for one in row.get("adapters", ()))
            about = {"file": row["file"], "made": changed, "label": f"strength {used}" if used else "base model"}
            groups.setdefault((row["prompt"], row["seed"]), []).append({**about, "order": (bool(used), changed)})
    found = [
        {"prompt": prompt, "seed": seed, "images": sorted(images, key=lambda one: one["order"])}
        for (prompt, seed), images in groups.items()
    ]
    return sorted(found, key=lambda group: -max(one["made"] for one in group["images"]))[:MOST_SHOWN]


def parts_of(request: Request) -> dict[str, str]:
    """Return the parts of the page that change by themselves."""
    folder = run_of(request)
    making = studio_of(request).making.get(folder.name)
    known = {"busy": making == "", "error": making or "", "small": status.config_of(folder).model in EMBEDDED}
    return {"gallery": pages.fragment("_gallery.html", name=folder.name, groups=gallery_of(folder), **known)}


async def show(request: Request) -> Response:
    """Show the page."""
    studio, folder = studio_of(request), run_of(request)
    config, others = status.config_of(folder), [one for one in status.all_runs(studio.root) if one != folder]
    fitting = [one.name for one in others if status.adapters_of(one) and _base(one) == _base(folder)]
    about = {"name": folder.name, "steps": sorted(status.adapters_of(folder), reverse=True), "others": fitting}
    about |= {"prompt": f"A [V] {config.subject.class_noun} on the beach", "copy_to": studio.setting("copy_to")}
    about |= {"best": (status.best_of(folder) or {}).get("chosen_step")}
    return pages.page(request, "use.html", parts=await run_in_threadpool(parts_of, request), **about)


def _base(folder: Path) -> dict[str, Any]:
    """The base model as the run's config names it."""
    config = status.config_of(folder)
    return {name: value for name in BASE_FIELDS if (value := getattr(config, name)) is not None}


def _adapter(folder: Path, step: int | None) -> tuple[Path, int]:
    """(adapter file, step) of a checkpoint, the newest without a step; ValueError where there is none."""
    found = status.adapters_of(folder)
    step = max(found, default=0) if step is None else step
    if step not in found or not found[step].resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"step: {folder.name} has no checkpoint of step {step}; see train.checkpoint_every")
    return found[step], step


def make_images(
    studio: Studio, folder: Path, prompts: Sequence[str], step: int | None, options: dict[str, Any]
) -> None:
    """Begin to generate in the worker; ValueError while the run has images under way."""
    if studio.making.get(folder.name) == "":
        raise ValueError("images of this run are being generated; wait for them")
    source = None if "adapters" in options else str(_adapter(folder, step)[0])
    studio.making[folder.name] = ""

    async def make() -> None:
        try:
            await studio.worker.call(generate, source, list(prompts), {**options, **_base(folder)})
            del studio.making[folder.name]
        except Exception as error:  # whatever it is, the page says it, and the next try may do better
            studio.making[folder.name] = " ".join(str(error).split())[:400] or type(error).__name__

    task = asyncio.get_running_loop().create_task(make())
    studio.tasks.add(task)
    task.add_done_callback(studio.tasks.discard)


def _step(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 9 else None


@posted
async def create(request: Request, form: FormData) -> Answer:
    """Generate a prompt with the adapter and without it."""
    studio, folder, prompt = studio_of(request), run_of(request), text_of(form, "prompt")
    if not prompt:
        raise ValueError("prompt: write what the image should show, such as A [V] dog on the beach")
    file, step = _adapter(folder, _step(text_of(form, "step")))
    first, strength = int(number_of(form, "seed", 0, 0, 2**40)), number_of(form, "strength", 1, 0, 2)
    seeds = list(range(first, first + int(number_of(form, "count", 1, 1, 8))))
    options: dict[str, Any] = {"seeds": seeds, "base": "base" in form, "output": folder / "pictures"}
    if second := text_of(form, "second"):
        other, _ = _adapter(status.find_run(studio.root, second), None)
        also = number_of(form, "second_strength", 1, 0, 2)
        options["adapters"] = [f"{file}:{strength:g}", f"{other}:{also:g}"]
    else:
        options["scale"] = strength
    make_images(studio, folder, [prompt], step, options)
    return {"busy": True} if "x-csrf" in request.headers else f"/runs/{quote(folder.name)}/use"


async def shown(request: Request) -> Response:
    """Answer with a generated image."""
    folder, name = run_of(request), request.path_params["file"]
    found = next((path for path in (folder / "pictures").glob("*.png") if path.name == name), folder / "none")
    return pages.image_file(found, folder)


async def _file(studio: Studio, folder: Path, step: int | None, kind: str) -> tuple[Path, str]:
    """(file, name to give it) of a checkpoint as it is, or as an exact LoRA, which is made at the first call."""
    source, step = _adapter(folder, step)
    stem = safe_name(folder.name, "adapter") + ("" if step == max(status.adapters_of(folder)) else f"-step-{step}")
    if kind != "lora":
        return source, f"{stem}.safetensors"
    target = folder / "exports" / f"{stem}-lora.safetensors"
    if status.signature(target)[0] < status.signature(source)[0]:
        target.parent.mkdir(exist_ok=True)
        await studio.worker.call(export_lora, source, target)
    return target, target.name


async def download(request: Request) -> Response:
    """Answer with an adapter file."""
    query = request.query_params
    wanted = _step(query.get("step", "")), query.get("format", "lokr")
    file, name = await _file(studio_of(request), run_of(request), *wanted)
    return FileResponse(file, media_type="application/octet-stream", filename=name)


@posted
async def copy(request: Request, form: FormData) -> Answer:
    """Copy the adapter into the folder of another program, which is remembered."""
    studio, folder = studio_of(request), run_of(request)
    named = text_of(form, "folder") or studio.setting("copy_to")
    target = lora_folder(named)
    file, name = await _file(studio, folder, _step(text_of(form, "step")), text_of(form, "format"))
    with atomic(target / name) as temporary:
        await run_in_threadpool(shutil.copyfile, file, temporary)
    studio.setting("copy_to", named)
    return {"said": f"{name} is in {target} now"} if "x-csrf" in request.headers else f"/runs/{quote(folder.name)}/use"


def lora_folder(named: str) -> Path:
    """Return the folder for adapters of the program in `named`; ValueError where there is none."""
    place = Path(named).expanduser()
    if place.is_absolute() and place.name.lower() in ("lora", "loras") and place.is_dir():
        return place
    found = [place / inner for inner in LORA_FOLDERS if place.is_absolute() and (place / inner).is_dir()]
    if not found:
        raise ValueError(f"folder: {named[:80]!r} should be the full path of ComfyUI or Forge, with models/loras in it")
    return found[0]


ROUTES = [
    Route("/runs/{name}/use", show),
    Route("/runs/{name}/use/events", pages.live(parts_of)),
    Route("/runs/{name}/generate", create, methods=["POST"]),
    Route("/runs/{name}/pictures/{file}", shown),
    Route("/runs/{name}/adapter", download),
    Route("/runs/{name}/copy", copy, methods=["POST"]),
]
