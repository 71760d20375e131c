"""What all pages share: the studio, templates, forms that are checked, answers, updates that come by themselves."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from diffusekrona_train.app import jobs, runs
from diffusekrona_train.app.guard import LARGEST_BODY, same, token_for
from diffusekrona_train.app.worker import Card, Worker
from diffusekrona_train.report.charts import Line, line_chart
from diffusekrona_train.training.curves import series, smoothed

HERE = Path(__file__).parent
SECONDS = 0.6
"""Between two looks at the folders of a page that is open."""
MultiPartParser.spool_max_size = LARGEST_BODY  # an upload stays in memory until it was looked at
_CHARTING = threading.Lock()


@dataclass
class Studio:
    """The server's own state: nothing that a restart may not forget."""

    root: Path
    secret: bytes
    worker: Worker = field(default_factory=Worker)
    cards: list[Card] = field(default_factory=list)
    making: dict[str, str] = field(default_factory=dict)
    """Run -> '' while images are generated for it, or why that failed."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def csrf(self) -> str:
        """Return the token that forms carry."""
        return token_for(self.secret, "csrf")

    def run(self, request: Request) -> Path:
        """Return the run folder that an address names; LookupError without one."""
        return runs.find_run(self.root, request.path_params["name"])

    def statuses(self) -> list[runs.Status]:
        """Return the status of every run, the newest first."""
        queued = jobs.waiting(self.root)
        return [runs.status_of(folder, folder.name in queued) for folder in runs.all_runs(self.root)]

    def setting(self, name: str, value: str | None = None) -> str:
        """Return a setting that outlives the server, '' without it; `value` replaces it first."""
        path = self.root / runs.HOME / "settings.json"
        found = next(runs.json_lines(path, whole=True), {})
        if value is not None:
            found[name] = value
            path.write_text(json.dumps(found), encoding="utf-8")
        return str(found.get(name, ""))


def duration(seconds: float | None) -> str:
    """Return seconds in words: '40 s', '3 min', '2 h 5 min'; a dash without any."""
    if seconds is None:
        return "–"
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{minutes} min"
        if minutes < 90
        else f"{minutes // 60} h {minutes % 60} min"
    )


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters["duration"] = duration


def studio_of(request: Request) -> Studio:
    """Return the studio that a request is for."""
    return request.app.state.studio


def fragment(template: str, /, **context: Any) -> str:
    """Return a part of a page as HTML."""
    return TEMPLATES.get_template(template).render(**context)


def page(request: Request, template: str, code: int = 200, /, **context: Any) -> HTMLResponse:
    """Return a whole page."""
    return HTMLResponse(fragment(template, csrf=studio_of(request).csrf, path=request.url.path, **context), code)


# ---- forms ---------------------------------------------------------------------------------------------------------

Answer = str | dict[str, Any]
"""Where to go next, or what a script asked for."""


def posted(handler: Callable[[Request, FormData], Awaitable[Answer]]) -> Callable[[Request], Awaitable[Response]]:
    """Decorate what a form does: its token is compared first; ValueError and LookupError become one line."""

    async def checked(request: Request) -> Response:
        async with request.form(max_files=100, max_fields=600) as form:
            given = request.headers.get("x-csrf") or str(form.get("csrf", ""))
            if not same(given, studio_of(request).csrf):
                raise HTTPException(403, "the form is from another site or from before; load the page again")
            answer = await handler(request, form)
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return JSONResponse({"to": answer}) if by_script(request) else RedirectResponse(answer, 303)

    return checked


def by_script(request: Request) -> bool:
    """Return whether the page's script asks, which takes JSON."""
    return "x-csrf" in request.headers


def text_of(form: FormData, name: str) -> str:
    """Return a text field, '' without it; ValueError for a file in its place."""
    value = form.get(name, "")
    if isinstance(value, UploadFile):
        raise ValueError(f"{name}: is a file and should be text")
    return value.strip()


def number_of(form: FormData, name: str, default: float, low: float, high: float) -> float:
    """Return a number field; ValueError where it is none or out of bounds."""
    text = text_of(form, name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ValueError(f"{name}: {text[:40]!r} should be a number from {low:g} to {high:g}")
    return value


async def failed(request: Request, error: Exception) -> Response:
    """Answer an error with one line: as JSON to a script, else on a page."""
    status = error.status_code if isinstance(error, HTTPException) else 404 if isinstance(error, LookupError) else 400
    status = 500 if isinstance(error, RuntimeError | OSError) else status
    text = str(error.detail if isinstance(error, HTTPException) else error.args[0] if error.args else error)
    text = " ".join(text.split())[:600]
    if by_script(request):
        return JSONResponse({"error": text}, status)
    return page(request, "error.html", status, text=text, status=status)


# ---- updates -------------------------------------------------------------------------------------------------------


def live(make: Callable[[Request], Mapping[str, str]]) -> Callable[[Request], Awaitable[Response]]:
    """Return a stream of server-sent events: the parts of a page (id -> HTML), each whenever it has changed."""

    async def stream(request: Request) -> Response:
        await run_in_threadpool(make, request)  # a wrong address is an answer of its own

        async def changes() -> AsyncIterator[str]:
            sent: dict[str, str] = {}
            while True:
                try:
                    now = await run_in_threadpool(make, request)
                except LookupError:  # deleted meanwhile
                    yield "event: gone\ndata: {}\n\n"
                    return
                changed = {name: html for name, html in now.items() if sent.get(name) != html}
                sent.update(changed)
                yield f"data: {json.dumps(changed)}\n\n" if changed else ": nothing new\n\n"
                await asyncio.sleep(SECONDS)

        return StreamingResponse(changes(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    return stream


# ---- charts --------------------------------------------------------------------------------------------------------


def charts_of(folder: Path) -> list[tuple[str, str]]:
    """Return (what it shows, SVG) of a run's curves, and of what was measured on its checkpoints."""
    with _CHARTING:
        loss = runs.cached("loss chart", folder / "metrics.jsonl", lambda _: _loss_charts(folder))
        scores = runs.cached("scores chart", folder / "evaluation" / "best.json", lambda _: _score_charts(folder))
    return [*loss, *scores]


def _loss_charts(folder: Path) -> list[tuple[str, str]]:
    metrics, charts = runs.metrics_of(folder), []
    x, loss = series(metrics, "loss")
    if len(x) > 1:
        lines = [Line("", x, loss, faint=True), Line("training", x, smoothed(loss))]
        charts.append((f"Training loss, {smoothed(loss)[-1]:.4f} at step {x[-1]}", line_chart("Loss", lines)))
    x, held = series(metrics, "validation_loss")
    if len(x) > 1:
        low = x[held.index(min(held))]
        chart = line_chart("Held-out loss", [Line("held-out", x, held, points=True)], mark_x=low)
        charts.append((f"Held-out loss, lowest at step {low}", chart))
    return charts


def _score_charts(folder: Path) -> list[tuple[str, str]]:
    chosen = (runs.best_of(folder) or {}).get("chosen_step")
    return [
        (
            f"{title} by step; the best checkpoint is step {chosen}",
            line_chart(title, [Line(title, x, y, points=True)], mark_x=chosen),
        )
        for title, x, y in runs.scores_of(folder)
    ]
