"""The page of a run: photos beside samples, sliders over steps and strengths, curves, warnings, buttons."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from diffusekrona_train.app import jobs, runs
from diffusekrona_train.app.draft import thumbnail
from diffusekrona_train.app.pages import Answer, Studio, charts_of, fragment, live, number_of, page, posted, studio_of
from diffusekrona_train.app.use import make_images
from diffusekrona_train.common.run_folder import step_name
from diffusekrona_train.config import EMBEDDED, RunConfig
from diffusekrona_train.data import collect

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SHOWN_PHOTOS = 6


def parts_of(request: Request) -> dict[str, str]:
    """Return the parts of the page that change by themselves."""
    studio = studio_of(request)
    folder = studio.run(request)
    queue = jobs.waiting(studio.root)
    status = runs.status_of(folder, folder.name in queue)
    place = queue.index(folder.name) + 1 if folder.name in queue else 0
    context = {"status": status, "csrf": studio.csrf, "place": place, "measuring": runs.measuring(folder)}
    context |= {"best": runs.best_of(folder), "charts": charts_of(folder), "trained": bool(runs.adapters_of(folder))}
    names = ("state", "numbers", "actions", "warnings", "charts")
    parts = {name: fragment(f"_{name}.html", **context) for name in names}
    return {**parts, "samples": json.dumps(samples_of(studio, folder))}


def samples_of(studio: Studio, folder: Path) -> dict[str, Any]:
    """Return what the sliders move over: steps, and for each prompt its images by step and by strength."""
    config = runs.config_of(folder)
    steps, jobs_ = runs.sample_steps(folder), runs.jobs_of(config)
    base = f"/runs/{quote(folder.name)}"
    images: list[dict[str, str]] = [{} for _ in jobs_]
    for step in steps:
        for number, (_, seed) in enumerate(jobs_):
            path = folder / "samples" / step_name(step) / f"{number:02d}-{seed}.png"
            if path.is_file():
                version = runs.signature(path)[0] % 10**10
                images[number][str(step)] = f"{base}/samples/{step}/{number}?v={version}"
    made: dict[str, dict[str, str]] = {}
    for path in (folder / "pictures" / "grid").glob("step-*-x*"):
        match = re.fullmatch(r"step-(\d+)-x([\d.]+)", path.name)
        if match:
            step, strength = int(match[1]), float(match[2])
            numbers = [number for number, _ in enumerate(jobs_) if grid_file(folder, config, step, strength, number)]
            made[f"{step}@{strength:g}"] = {str(n): f"{base}/grid/{step}/{strength:g}/{n}" for n in numbers}
    return {
        "steps": [step for step in steps if any(str(step) in row for row in images)],
        "prompts": [
            {"prompt": prompt, "seed": seed, "images": row} for (prompt, seed), row in zip(jobs_, images, strict=True)
        ],
        "made": made,
        "checkpoints": sorted(runs.adapters_of(folder)),
        "best": (runs.best_of(folder) or {}).get("chosen_step"),
        "busy": studio.making.get(folder.name) == "",
        "error": studio.making.get(folder.name) or "",
        "small": config.model in EMBEDDED,
    }


def grid_folder(folder: Path, step: int, strength: float) -> Path:
    """Return where the images of a step at a strength are kept."""
    return folder / "pictures" / "grid" / f"{step_name(step)}-x{strength:g}"


def grid_file(folder: Path, config: RunConfig, step: int, strength: float, number: int) -> Path | None:
    """Return the image of a prompt's number at (step, strength), None where it was not made."""
    place, (prompt, seed) = grid_folder(folder, step, strength), runs.jobs_of(config)[number]
    for row in runs.cached("rows", place / "manifest.jsonl", lambda path: list(runs.json_lines(path))):
        if (row.get("prompt"), row.get("seed")) == (prompt, seed) and (place / Path(str(row["file"])).name).is_file():
            return place / Path(str(row["file"])).name
    return None


async def show(request: Request) -> Response:
    """The page."""
    studio = studio_of(request)
    folder = studio.run(request)
    parts = await run_in_threadpool(parts_of, request)
    config, count = runs.config_of(folder), len(await run_in_threadpool(photos_of, folder))
    about = {
        "name": folder.name,
        "config": config,
        "photos": range(count),
        "strengths": STRENGTHS,
    }
    return page(request, "run.html", parts=parts, **about)


def photos_of(folder: Path) -> list[tuple[bytes, str]]:
    """Return small copies of a run's first photos; none where they are gone, or are a data set of the hub."""

    def read(_: Path) -> list[tuple[bytes, str]]:
        config = runs.config_of(folder)
        where = config.subject.images
        if where and not where.startswith("toybox:") and not Path(where).expanduser().exists():
            return []
        try:
            return [thumbnail(picture.open()) for picture in collect(config).pictures[:SHOWN_PHOTOS]]
        except (ValueError, OSError):
            return []

    return runs.cached("photos", folder / (runs.USED if (folder / runs.USED).is_file() else runs.ASKED), read)


async def photo(request: Request) -> Response:
    """A photo of the run."""
    found = await run_in_threadpool(photos_of, studio_of(request).run(request))
    number = request.path_params["number"]
    if number >= len(found):
        raise LookupError(f"the run shows {len(found)} photos")
    return Response(found[number][0], media_type=found[number][1])


async def sample(request: Request) -> Response:
    """An image of a step, as training rendered it."""
    folder, number = studio_of(request).run(request), request.path_params["number"]
    prompts = runs.jobs_of(runs.config_of(folder))
    if number >= len(prompts):
        raise LookupError(f"the run has {len(prompts)} prompts")
    path = folder / "samples" / step_name(request.path_params["step"]) / f"{number:02d}-{prompts[number][1]}.png"
    return FileResponse(runs.inside(path, folder), media_type="image/png")


async def grid(request: Request) -> Response:
    """An image of a step at another strength."""
    folder, wanted = studio_of(request).run(request), request.path_params
    config = runs.config_of(folder)
    if wanted["number"] >= len(runs.jobs_of(config)):
        raise LookupError("the run has fewer prompts")
    path = grid_file(folder, config, wanted["step"], wanted["strength"], wanted["number"])
    if path is None:
        raise LookupError("that image was not made")
    return FileResponse(runs.inside(path, folder), media_type="image/png")


@posted
async def strength(request: Request, form: FormData) -> Answer:
    """Generate the run's prompts with a checkpoint at another strength."""
    studio = studio_of(request)
    folder = studio.run(request)
    config, scale = runs.config_of(folder), number_of(form, "strength", 1, 0.05, 2)
    step = int(number_of(form, "step", 0, 0, 10**6))
    if step not in runs.adapters_of(folder):
        raise ValueError(f"step: there is no checkpoint of step {step}; see train.checkpoint_every")
    wanted = config.validation
    options = {
        "scale": scale,
        "seeds": wanted.seeds,
        "steps": wanted.steps,
        "guidance": wanted.guidance,
        "negative": config.subject.fill(wanted.negative),
        "strength_schedule": wanted.strength_schedule or None,
        "output": grid_folder(folder, step, scale),
    }
    make_images(studio, folder, [config.subject.fill(prompt) for prompt in wanted.prompts], step, options)
    return {"busy": True}


# ---- buttons -------------------------------------------------------------------------------------------------------


def _start(studio: Studio, folder: Path, form: FormData) -> str:
    more = number_of(form, "more", 0, 0, 100_000)
    steps = runs.config_of(folder).train.steps + int(more)
    jobs.enqueue(studio.root, folder.name, [f"train.steps={steps}"] if more else [])
    jobs.tick(studio.root)
    return f"/runs/{quote(folder.name)}"


def _stop(studio: Studio, folder: Path, form: FormData) -> str:
    jobs.stop(folder)
    return f"/runs/{quote(folder.name)}"


def _leave(studio: Studio, folder: Path, form: FormData) -> str:
    jobs.leave_queue(studio.root, folder.name)
    return f"/runs/{quote(folder.name)}"


def _measure(studio: Studio, folder: Path, form: FormData) -> str:
    jobs.measure(folder)
    return f"/runs/{quote(folder.name)}"


def _delete(studio: Studio, folder: Path, form: FormData) -> str:
    if form.get("sure") != folder.name:
        raise ValueError(f"deleting {folder.name} was not confirmed; nothing was removed")
    jobs.delete(studio.root, folder)
    return "/"


ACTIONS = {"start": _start, "stop": _stop, "leave": _leave, "measure": _measure, "delete": _delete}


@posted
async def act(request: Request, form: FormData) -> Answer:
    """What a button of the run asks for."""
    studio, action = studio_of(request), ACTIONS.get(request.path_params["action"])
    folder = studio.run(request)
    if action is None:
        raise LookupError(f"there is no action {request.path_params['action'][:40]!r}")
    return await run_in_threadpool(action, studio, folder, form)


ROUTES = [
    Route("/runs/{name}", show),
    Route("/runs/{name}/events", live(parts_of)),
    Route("/runs/{name}/photos/{number:int}", photo),
    Route("/runs/{name}/samples/{step:int}/{number:int}", sample),
    Route("/runs/{name}/grid/{step:int}/{strength:float}/{number:int}", grid),
    Route("/runs/{name}/strength", strength, methods=["POST"]),
    Route("/runs/{name}/do/{action}", act, methods=["POST"]),
]
