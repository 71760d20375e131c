"""The page of a run: photos beside samples, sliders over steps and strengths, curves, warnings, buttons."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusekrona_train.app import jobs, pages
from diffusekrona_train.app.pages import Answer, Studio, number_of, posted, run_of, studio_of
from diffusekrona_train.app.use import make_images
from diffusekrona_train.common.run_folder import step_name
from diffusekrona_train.config import EMBEDDED
from diffusekrona_train.data import collect
from diffusekrona_train.report.page import Figure, picture
from diffusekrona_train.training import status

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PARTS, SHOWN_PHOTOS = ("state", "numbers", "actions", "warnings", "charts"), 6


def parts_of(request: Request) -> dict[str, str]:
    """Return the parts of the page that change by themselves."""
    studio, folder = studio_of(request), run_of(request)
    queue, failed = jobs.waiting(studio.root), status.last_error(folder / jobs.MEASURE_LOG)
    known = {"status": studio.status_of(folder), "best": status.best_of(folder), "charts": status.charts_of(folder)}
    known |= {"place": queue.index(folder.name) + 1 if folder.name in queue else 0, "csrf": studio.csrf}
    known |= {"measuring": "running" if status.live_process(folder / jobs.MEASURE_PID) else failed}
    known |= {"trained": bool(status.adapters_of(folder))}
    parts = {name: pages.fragment(f"_{name}.html", **known) for name in PARTS}
    return {**parts, "samples": json.dumps(samples_of(studio, folder))}


def samples_of(studio: Studio, folder: Path) -> dict[str, Any]:
    """Return what the sliders move over: steps, and for each prompt its images by step and by strength."""
    config, base = status.config_of(folder), f"/runs/{quote(folder.name)}"
    prompts = [{"prompt": prompt, "seed": seed, "images": {}} for prompt, seed in status.jobs_of(config)]
    steps = status.sample_steps(folder)
    for step in steps:
        for number, one in enumerate(prompts):
            changed, size = status.signature(_sample_file(folder, step, number, one["seed"]))
            if size:
                one["images"][step] = f"{base}/samples/{step}/1/{number}?v={changed % 10**10}"
    made: dict[str, dict[int, str]] = {}
    for path in (folder / "pictures" / "grid").glob("step-*-x*"):
        if match := re.fullmatch(r"step-0*(\d+)-x([\d.]+)", path.name):
            step, strength = int(match[1]), float(match[2])
            there = [n for n in range(len(prompts)) if _grid_file(folder, step, strength, n)]
            made[f"{step}@{strength:g}"] = {n: f"{base}/samples/{step}/{strength:g}/{n}" for n in there}
    return {
        "steps": [step for step in steps if any(step in one["images"] for one in prompts)],
        "prompts": prompts,
        "made": made,
        "checkpoints": sorted(status.adapters_of(folder)),
        "best": (status.best_of(folder) or {}).get("chosen_step"),
        "busy": studio.making.get(folder.name) == "",
        "error": studio.making.get(folder.name, ""),
        "small": config.model in EMBEDDED,
    }


def _sample_file(folder: Path, step: int, number: int, seed: int) -> Path:
    return folder / "samples" / step_name(step) / f"{number:02d}-{seed}.png"


def _grid_folder(folder: Path, step: int, strength: float) -> Path:
    return folder / "pictures" / "grid" / f"{step_name(step)}-x{strength:g}"


def _grid_file(folder: Path, step: int, strength: float, number: int) -> Path | None:
    """The image of a prompt's number at (step, strength), None where it was not made."""
    place, wanted = _grid_folder(folder, step, strength), status.jobs_of(status.config_of(folder))[number]
    rows = status.cached("rows", place / "manifest.jsonl", lambda path: list(status.json_lines(path)))
    found = [place / Path(str(row["file"])).name for row in rows if (row.get("prompt"), row.get("seed")) == wanted]
    return next((path for path in found if path.is_file()), None)


async def show(request: Request) -> Response:
    """Show the page."""
    folder = run_of(request)
    parts, photos = await run_in_threadpool(parts_of, request), await run_in_threadpool(photos_of, folder)
    about = {"name": folder.name, "config": status.config_of(folder), "photos": photos, "strengths": STRENGTHS}
    return pages.page(request, "run.html", parts=parts, **about)


def photos_of(folder: Path) -> list[Figure]:
    """Return small copies of a run's first photos; none where they are gone, or are a data set of the hub."""

    def read(_: Path) -> list[Figure]:
        where = status.config_of(folder).subject.images
        if where and not where.startswith("toybox:") and not Path(where).expanduser().exists():
            return []
        try:
            found = collect(status.config_of(folder)).pictures[:SHOWN_PHOTOS]
            return [picture(one.open(), one.name, side=240) for one in found]
        except (ValueError, OSError):
            return []

    return status.cached("photos", status.config_file(folder), read)


async def sample(request: Request) -> Response:
    """Answer with the image of a prompt at a step and a strength."""
    folder, wanted = run_of(request), request.path_params
    step, number, prompts = wanted["step"], wanted["number"], status.jobs_of(status.config_of(folder))
    if number >= len(prompts):
        raise LookupError(f"the run has {len(prompts)} prompts")
    other = _grid_file(folder, step, wanted["strength"], number) if wanted["strength"] != 1 else None
    return pages.image_file(other or _sample_file(folder, step, number, prompts[number][1]), folder)


@posted
async def strength(request: Request, form: FormData) -> Answer:
    """Generate the run's prompts with a checkpoint at another strength."""
    folder, scale = run_of(request), number_of(form, "strength", 1, 0.05, 2)
    step, config = int(number_of(form, "step", 0, 0, 10**6)), status.config_of(folder)
    wanted, fill = config.validation, config.subject.fill
    options = {name: getattr(wanted, name) for name in ("seeds", "steps", "guidance")}
    options |= {"scale": scale, "negative": fill(wanted.negative), "output": _grid_folder(folder, step, scale)}
    options |= {"strength_schedule": wanted.strength_schedule or None}
    make_images(studio_of(request), folder, list(map(fill, wanted.prompts)), step, options)
    return {"busy": True}


def _start(root: Path, folder: Path, form: FormData) -> None:
    more = int(number_of(form, "more", 0, 0, 100_000))
    steps = status.config_of(folder).train.steps + more
    jobs.enqueue(root, folder.name, [f"train.steps={steps}"] if more else [])
    jobs.tick(root)


def _delete(root: Path, folder: Path, form: FormData) -> None:
    if form.get("sure") != folder.name:
        raise ValueError(f"deleting {folder.name} was not confirmed; nothing was removed")
    jobs.delete(root, folder)


ACTIONS: dict[str, Callable[[Path, Path, FormData], None]] = {
    "start": _start,
    "stop": lambda root, folder, form: jobs.stop(folder),
    "leave": lambda root, folder, form: jobs.leave_queue(root, folder.name),
    "measure": lambda root, folder, form: jobs.measure(folder),
    "delete": _delete,
}
"""What a button of the run asks for."""


@posted
async def act(request: Request, form: FormData) -> Answer:
    """Do what a button asks for."""
    folder, action = run_of(request), ACTIONS.get(request.path_params["action"])
    if action is None:
        raise LookupError("there is no such button")
    await run_in_threadpool(action, studio_of(request).root, folder, form)
    return f"/runs/{quote(folder.name)}" if folder.exists() else "/"


ROUTES = [
    Route("/runs/{name}", show),
    Route("/runs/{name}/events", pages.live(parts_of)),
    Route("/runs/{name}/samples/{step:int}/{strength:float}/{number:int}", sample),
    Route("/runs/{name}/strength", strength, methods=["POST"]),
    Route("/runs/{name}/do/{action}", act, methods=["POST"]),
]
