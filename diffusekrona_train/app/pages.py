"""What all pages share: the studio, templates, forms that are checked, answers, updates that come by themselves."""

from __future__ import annotations

import asyncio
import json
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
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from diffusekrona_train.app import jobs
from diffusekrona_train.app.guard import LARGEST_BODY, same, token_for
from diffusekrona_train.app.worker import Worker
from diffusekrona_train.training import status
from diffusekrona_train.training.check.fits import Fit

HERE = Path(__file__).parent
SECONDS = 0.6
"""Between two looks at the folders of a page that is open."""
Answer = str | dict[str, Any]
"""Of a form: where to go next, or what a script asked for."""
MultiPartParser.spool_max_size = LARGEST_BODY  # an upload stays in memory until it was looked at


@dataclass
class Studio:
    """The server's own state: nothing that a restart may not forget."""

    root: Path
    secret: bytes
    worker: Worker = field(default_factory=Worker)
    models: list[Fit] = field(default_factory=list)
    making: dict[str, str] = field(default_factory=dict)
    """Run -> '' while images are generated for it, or why that failed."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.csrf = token_for(self.secret, "csrf")

    def status_of(self, folder: Path) -> status.Status:
        """Return the status of a run, with what the queue and its buttons add."""
        found = status.status_of(folder)
        if found.active and (folder / jobs.STOP_LATER).exists():
            found.state = "stopping"
        elif not found.active and folder.name in jobs.waiting(self.root):
            found.state = "queued"
        return found

    def setting(self, name: str, value: str | None = None) -> str:
        """Return a setting that outlives the server, '' without it; `value` replaces it first."""
        path = self.root / jobs.HOME / "settings.json"
        found = next(status.json_lines(path, whole=True), {})
        if value is not None:
            path.write_text(json.dumps(found | {name: value}), encoding="utf-8")
        return value or str(found.get(name, ""))


def studio_of(request: Request) -> Studio:
    """Return the studio that a request is for."""
    return request.app.state.studio


def run_of(request: Request) -> Path:
    """Return the run folder that an address names; LookupError without one."""
    return status.find_run(studio_of(request).root, request.path_params["name"])


def image_file(path: Path, folder: Path) -> FileResponse:
    """Answer with a PNG of a run; LookupError where it is not in `folder`, also by way of a link."""
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise LookupError(f"{path.name}: no such image")
    return FileResponse(path, media_type="image/png")


def duration(seconds: float | None) -> str:
    """Return seconds in words: '40 s', '3 min', '2 h 5 min'; a dash without any."""
    if seconds is None:
        return "–"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{hours} h {minutes} min" if hours else f"{minutes} min"


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters["duration"] = duration


def fragment(template: str, /, **context: object) -> str:
    """Return a part of a page as HTML."""
    return TEMPLATES.get_template(template).render(**context)


def page(request: Request, template: str, code: int = 200, /, **context: object) -> HTMLResponse:
    """Return a whole page."""
    return HTMLResponse(fragment(template, csrf=studio_of(request).csrf, path=request.url.path, **context), code)


def posted(handler: Callable[[Request, FormData], Awaitable[Answer]]) -> Callable[[Request], Awaitable[Response]]:
    """Decorate what a form does: its token is compared first; the page's script gets JSON."""

    async def checked(request: Request) -> Response:
        async with request.form(max_files=100, max_fields=600) as form:
            if not same(request.headers.get("x-csrf") or str(form.get("csrf", "")), studio_of(request).csrf):
                raise HTTPException(403, "the form is from another site or from before; load the page again")
            answer = await handler(request, form)
        if isinstance(answer, dict):
            return JSONResponse(answer)
        return JSONResponse({"to": answer}) if "x-csrf" in request.headers else RedirectResponse(answer, 303)

    return checked


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
    code, text = 404 if isinstance(error, LookupError) else 500, str(error.args[0] if error.args else error)
    if isinstance(error, HTTPException):
        code, text = error.status_code, error.detail
    elif isinstance(error, ValueError):
        code = 400
    text = " ".join(text.split())[:600]
    if "x-csrf" in request.headers:
        return JSONResponse({"error": text}, code)
    return page(request, "error.html", code, text=text, code=code)


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
