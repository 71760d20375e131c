"""The application: all pages behind the guard, and the clock that starts what waits in the queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from diffusekrona_train.app import jobs, runs, subject, use, watch
from diffusekrona_train.app.draft import Draft
from diffusekrona_train.app.guard import Guard, is_loopback, names_of, secret_of, token_for
from diffusekrona_train.app.pages import HERE, Studio, failed, fragment, live, page, studio_of
from diffusekrona_train.app.worker import cards, warm_up


def make_app(root: Path, host: str = "127.0.0.1") -> tuple[Starlette, str | None]:
    """Return the application over the runs in `root` (made if missing), and the access token it asks for.

    The token is None where only this machine reaches `host`.
    """
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    secret = secret_of(root / runs.HOME)
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
    guard = Middleware(Guard, names=names_of(host), access=access)
    app = Starlette(
        routes=routes, middleware=[guard], exception_handlers=dict.fromkeys(kinds, failed), lifespan=lifespan
    )
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
        with contextlib.suppress(
            OSError, ValueError
        ):  # a folder that vanished; a second later it is gone from the list
            await run_in_threadpool(jobs.tick, studio.root)
        await asyncio.sleep(1)


async def _warm(studio: Studio) -> None:
    with contextlib.suppress(RuntimeError):
        studio.cards = await studio.worker.call(cards)
        await studio.worker.call(warm_up)


# ---- all runs ------------------------------------------------------------------------------------------------------


def index_parts(request: Request) -> dict[str, str]:
    """Return the list of runs, which changes by itself."""
    studio = studio_of(request)
    queue = jobs.waiting(studio.root)
    shown = [_shown(studio, status) for status in studio.statuses()]
    return {"runs": fragment("_runs.html", runs=shown, queue=queue)}


def _shown(studio: Studio, status: runs.Status) -> dict[str, Any]:
    folder = runs.find_run(studio.root, status.name)
    try:
        config = runs.config_of(folder)
        samples = watch.samples_of(studio, folder)
    except ValueError:
        return {"status": status, "image": "", "config": None, "small": False}
    newest = str(samples["steps"][-1]) if samples["steps"] else ""
    image = next((row["images"][newest] for row in samples["prompts"] if newest in row["images"]), "")
    image = image or f"/runs/{quote(folder.name)}/photos/0"
    return {"status": status, "image": image, "config": config, "small": samples["small"]}


async def index(request: Request) -> Response:
    """The first page: all runs, and the button for a new subject."""
    parts = await run_in_threadpool(index_parts, request)
    return page(request, "index.html", parts=parts, draft=len(Draft(studio_of(request).root).names()))


async def compare(request: Request) -> Response:
    """All runs in one table."""
    studio = studio_of(request)

    def rows() -> list[dict[str, Any]]:
        found = []
        for shown in (_shown(studio, status) for status in studio.statuses()):
            if shown["config"] is not None:
                folder = runs.find_run(studio.root, shown["status"].name)
                held = [line["validation_loss"] for line in runs.metrics_of(folder) if line.get("validation_loss")]
                times = [line["time"] for line in runs.metrics_of(folder) if line.get("time")]
                best = (runs.best_of(folder) or {}).get("chosen_step")
                scores = {name: f"{y[x.index(best)]:.3f}" for name, x, y in runs.scores_of(folder) if best in x}
                more = {"held": min(held, default=None), "seconds": max(times, default=None), "best": best}
                found.append({**shown, **more, "scores": scores})
        return found

    return page(request, "compare.html", rows=await run_in_threadpool(rows))
