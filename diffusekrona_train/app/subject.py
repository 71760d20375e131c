"""A new subject in three steps: photos, what it is, which model. One page, one button."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusekrona_train.app import jobs
from diffusekrona_train.app.draft import LARGEST_PHOTO, Draft
from diffusekrona_train.app.pages import Answer, fragment, page, posted, studio_of, text_of
from diffusekrona_train.app.worker import briefly
from diffusekrona_train.config import make_config
from diffusekrona_train.config.fields import PREFIX, groups_of
from diffusekrona_train.training.check.fits import fits_here, quick_fits

FIELDS = ("class", "token", "name", "model", "other_model")


def draft_of(request: Request) -> Draft:
    """Return the draft of the studio."""
    return Draft(studio_of(request).root)


def _parts(draft: Draft) -> dict[str, Any]:
    """Photos, YAML and what is wrong, as the fields are now."""
    plain = {"model": "toybox", "subject": {"images": str(draft.photos_folder), "class": "thing"}, "output": "x"}
    try:
        config, problem, text = make_config(draft.here()), "", draft.yaml()
    except ValueError as error:
        config, problem, text = make_config(plain), str(error), ""
    try:
        photos = draft.photos(config)
    except ValueError as error:
        photos, problem = [], problem or str(error)
    caption = config.subject.fill(config.subject.prompt)
    return {"photos": photos, "problem": problem, "yaml": text, "caption": caption, "config": config}


async def show(request: Request) -> Response:
    """Show the page."""
    studio, draft = studio_of(request), draft_of(request)
    fields, models = draft.fields(), studio.models or quick_fits()
    parts = await run_in_threadpool(_parts, draft)
    chosen = {"chosen": fields.get("model") or models[0].alias, "models": models, "sure": bool(studio.models)}
    return page(request, "new.html", fields=fields, groups=groups_of(parts["config"]), **chosen, **parts)


@posted
async def refresh(request: Request, form: FormData) -> Answer:
    """Keep what was typed in, and show it: at once, without the worker."""
    studio, draft = studio_of(request), draft_of(request)
    await run_in_threadpool(_keep, draft, form)
    parts = await run_in_threadpool(_parts, draft)
    html = {"photos": fragment("_photos.html", csrf=studio.csrf, **parts)}
    return {"html": html, "problem": parts["problem"], "yaml": parts["yaml"], "count": len(draft.names())}


@posted
async def look(request: Request, form: FormData) -> Answer:
    """Say what photos, identifier and models are like."""
    studio, draft = studio_of(request), draft_of(request)
    lines: dict[str, list[str]] = {"advice": [], "identifier": [], "plan": []}
    if draft.names():
        try:
            lines = await studio.worker.call(briefly, make_config(draft.here()))
        except (ValueError, RuntimeError, OSError) as error:
            lines["plan"] = [str(error)]
    studio.models = studio.models or await studio.worker.call(fits_here)
    chosen = draft.fields().get("model") or studio.models[0].alias
    context = {"lines": lines, "models": studio.models, "chosen": chosen, "sure": True, "photos": draft.names()}
    return {"html": {name: fragment(f"_{name}.html", **context) for name in ("models", "advice", "identifier", "plan")}}


def _keep(draft: Draft, form: FormData) -> None:
    names = [name for name in form if name in FIELDS or name.startswith(PREFIX)]
    draft.write_fields({name: text_of(form, name) for name in names if text_of(form, name)})
    for key in form:
        if key.startswith("caption:") and key.removeprefix("caption:") in draft.names():
            draft.write_caption(key.removeprefix("caption:"), text_of(form, key))


@posted
async def upload(request: Request, form: FormData) -> Answer:
    """Take photos; those that cannot be used are named, and the others stay."""
    draft, wrong = draft_of(request), []
    for file in form.getlist("photos"):
        if isinstance(file, UploadFile) and file.size:
            try:
                await run_in_threadpool(draft.add, file.filename or "photo", await file.read(LARGEST_PHOTO + 1))
            except ValueError as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong[:3]) + (f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""))
    return "/new"


@posted
async def remove(request: Request, form: FormData) -> Answer:
    """Remove a photo."""
    draft_of(request).remove(text_of(form, "photo"))
    return "/new"


@posted
async def example(request: Request, form: FormData) -> Answer:
    """Fill in the embedded poodle."""
    await run_in_threadpool(draft_of(request).take_example)
    return "/new"


@posted
async def begin(request: Request, form: FormData) -> Answer:
    """Make the run folder and put it into the queue."""
    studio, draft = studio_of(request), draft_of(request)
    await run_in_threadpool(_keep, draft, form)
    name = await run_in_threadpool(draft.begin)
    jobs.enqueue(studio.root, name)
    await run_in_threadpool(jobs.tick, studio.root)
    return f"/runs/{name}"


ACTIONS = {"photos": upload, "fields": refresh, "look": look, "remove": remove, "example": example, "start": begin}
ROUTES = [Route("/new", show), *(Route(f"/new/{name}", action, methods=["POST"]) for name, action in ACTIONS.items())]
