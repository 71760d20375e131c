"""The application: all pages behind the guard, and the clock that starts what waits in the queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from diffusekrona_train.app import jobs, subject, use, watch
from diffusekrona_train.app.draft import Draft
from diffusekrona_train.app.guard import Guard, is_loopback, names_of, secret_of, token_for
from diffusekrona_train.app.pages import HERE, Studio, failed, fragment, live, page, studio_of
from diffusekrona_train.app.worker import warm_up
from diffusekrona_train.training import status
from diffusekrona_train.training.check.fits import fits_here
from diffusekrona_train.training.curves import series


def make_app(root: Path, host: str = "127.0.0.1") -> tuple[Starlette, str | None]:
    """Return the application over the runs in `root` (made if missing), and the access token it asks for.

    The token is None where only this machine reaches `host`.
    """
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    secret = secret_of(root / jobs.HOME)
    access = None if is_loopback(host) else token_for(secret, "access")
    studio = Studio(root, secret)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_clock(studio)), asyncio.create_task(_warm(studio))]
        yield
        for task in (*tasks, *studio.tasks):
            task.cancel()
        studio.worker.close()

    routes = [
        Route("/", index),
        Route("/events", live(index_parts)),
        Route("/compare", compare),
        *subject.ROUTES,
        *watch.ROUTES,
        *use.ROUTES,
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    kinds = (ValueError, LookupError, RuntimeError, OSError, HTTPException)
    guard = [Middleware(Guard, names=names_of(host), access=access)]
    app = Starlette(routes=routes, middleware=guard, exception_handlers=dict.fromkeys(kinds, failed), lifespan=lifespan)
    app.state.studio = studio
    return app, access


def begin_demo(root: Path) -> str:
    """Queue the embedded poodle where no run has its name yet; return the address of its page."""
    root = root.resolve()
    if not (root / "poodle").exists():
        draft = Draft(root)
        draft.take_example()
        jobs.enqueue(root, draft.begin())
    return "/runs/poodle"


async def _clock(studio: Studio) -> None:
    while True:
        with contextlib.suppress(OSError, ValueError):  # a folder that vanished; a second later it is off the list
            await run_in_threadpool(jobs.tick, studio.root)
        await asyncio.sleep(1)


async def _warm(studio: Studio) -> None:
    with contextlib.suppress(RuntimeError):
        studio.models = await studio.worker.call(fits_here)
        await studio.worker.call(warm_up)


def _rows(studio: Studio) -> list[dict[str, Any]]:
    """All runs with their newest image; config None where it cannot be read."""
    found = []
    for folder in status.all_runs(studio.root):
        row: dict[str, Any] = {"folder": folder, "config": None, "image": "", "small": False}
        with contextlib.suppress(ValueError):
            samples = watch.samples_of(studio, folder)
            urls = [one["images"].get(step) for step in samples["steps"][-1:] for one in samples["prompts"]]
            urls += [photo.uri for photo in watch.photos_of(folder)[:1]]
            image = next(filter(None, urls), "")
            row |= {"config": status.config_of(folder), "image": image, "small": samples["small"]}
        found.append({**row, "status": studio.status_of(folder)})
    return found


def index_parts(request: Request) -> dict[str, str]:
    """Return the list of runs, which changes by itself."""
    studio = studio_of(request)
    return {"runs": fragment("_runs.html", runs=_rows(studio), queue=jobs.waiting(studio.root))}


async def index(request: Request) -> Response:
    """Show all runs, and the button for a new subject."""
    parts = await run_in_threadpool(index_parts, request)
    return page(request, "index.html", parts=parts, draft=len(Draft(studio_of(request).root).names()))


async def compare(request: Request) -> Response:
    """Show all runs in one table."""

    def rows() -> list[dict[str, Any]]:
        found = [row for row in _rows(studio_of(request)) if row["config"] is not None]
        for row in found:
            metrics, best = status.metrics_of(row["folder"]), status.best_of(row["folder"]) or {}
            row["held"] = min(series(metrics, "validation_loss")[1], default=None)
            row["seconds"] = max(series(metrics, "time")[1], default=None)
            row["best"] = best.get("chosen_step")
            scores = status.scores_of(row["folder"])
            row["scores"] = {name: f"{y[x.index(row['best'])]:.3f}" for name, x, y in scores if row["best"] in x}
        return found

    return page(request, "compare.html", rows=await run_in_threadpool(rows))
