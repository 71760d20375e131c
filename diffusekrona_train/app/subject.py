"""A new subject in three steps: photos, what it is, which model. One page, one button."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from diffusekrona_train.app import jobs
from diffusekrona_train.app.draft import LARGEST_PHOTO, Draft, crop_image, thumbnail
from diffusekrona_train.app.form import PREFIX, groups_of
from diffusekrona_train.app.pages import Answer, fragment, page, posted, studio_of, text_of
from diffusekrona_train.app.worker import cards, check, first_cards
from diffusekrona_train.config import RunConfig, make_config
from diffusekrona_train.data import open_image

FIELDS = ("class", "token", "name", "model", "other_model")


def draft_of(request: Request) -> Draft:
    """Return the draft of the studio."""
    return Draft(studio_of(request).root)


async def show(request: Request) -> Response:
    """The page."""
    studio, draft = studio_of(request), draft_of(request)
    fields, shown = draft.fields(), studio.cards or first_cards()
    chosen = fields.get("model") or shown[0].alias
    parts = await run_in_threadpool(_parts, draft)
    groups = await run_in_threadpool(lambda: groups_of(_config_or_default(draft)))
    known = {"fields": fields, "chosen": chosen, "cards": shown, "sure": bool(studio.cards), "groups": groups}
    return page(request, "new.html", names=draft.names(), **known, **parts)


def _config_or_default(draft: Draft) -> RunConfig:
    try:
        return draft.config()
    except ValueError:
        return make_config({"model": "toybox", "subject": {"images": "toybox:poodle", "class": "x"}, "output": "x"})


def _parts(draft: Draft) -> dict[str, Any]:
    """Photos, YAML and what is wrong, as the fields are now."""
    try:
        config = draft.config()
        photos, problem = draft.photos(config), ""
        caption = config.subject.fill(config.subject.prompt)
    except ValueError as error:
        photos, problem, caption = [], str(error), ""
    try:
        text = draft.yaml()
    except ValueError:
        text = ""
    return {"photos": photos, "problem": problem, "yaml": text, "caption": caption}


async def _answer(request: Request, draft: Draft) -> dict[str, Any]:
    """The parts of the page that depend on photos and fields, for its script."""
    studio, parts = studio_of(request), await run_in_threadpool(_parts, draft)
    lines: dict[str, list[str]] = {"advice": [], "identifier": [], "plan": []}
    if parts["photos"]:
        tree = draft.tree()
        tree["subject"]["images"] = str(draft.photos_folder)
        try:
            lines = await studio.worker.call(check, tree)
        except (ValueError, RuntimeError, OSError) as error:
            lines["plan"] = [str(error)]
    context = {**parts, "csrf": studio.csrf, "lines": lines}
    names = {
        "models": "_models.html",
        "photos": "_photos.html",
        "advice": "_advice.html",
        "identifier": "_identifier.html",
        "plan": "_plan.html",
    }
    studio.cards = studio.cards or await studio.worker.call(cards)
    context |= {"cards": studio.cards, "sure": True, "chosen": draft.fields().get("model") or studio.cards[0].alias}
    html = {name: fragment(template, **context) for name, template in names.items()}
    return {"html": html, "problem": parts["problem"], "count": len(draft.names())}


@posted
async def upload(request: Request, form: FormData) -> Answer:
    """Take photos; the first that cannot be used is named, and the others stay."""
    draft, wrong = draft_of(request), []
    for file in form.getlist("photos"):
        if isinstance(file, UploadFile) and (file.size or 0) > 0:
            try:
                content = await file.read(LARGEST_PHOTO + 1)
                await run_in_threadpool(draft.add, file.filename or "photo", content)
            except ValueError as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong[:3]) + (f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""))
    return "/new"


@posted
async def refresh(request: Request, form: FormData) -> Answer:
    """Keep what was typed in, and say what it means."""
    draft = draft_of(request)
    _keep(draft, form)
    return await _answer(request, draft)


def _keep(draft: Draft, form: FormData) -> None:
    names = [name for name in form if name in FIELDS or name.startswith(PREFIX)]
    draft.write_fields({name: text_of(form, name) for name in names if text_of(form, name)})
    for key in form:
        if key.startswith("caption:"):
            draft.write_caption(key.removeprefix("caption:"), text_of(form, key))


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
    _keep(draft, form)
    name = await run_in_threadpool(draft.begin)
    jobs.enqueue(studio.root, name)
    await run_in_threadpool(jobs.tick, studio.root)
    return f"/runs/{name}"


async def photo(request: Request) -> Response:
    """A photo of the draft, or its crop, made anew."""
    draft, name = draft_of(request), request.path_params["photo"]
    path = draft.path_of(name)

    def make() -> tuple[bytes, str]:
        if request.path_params["kind"] == "photo":
            return thumbnail(open_image(path, name))
        return thumbnail(
            next(crop_image(one.crop) for one in draft.photos(_config_or_default(draft)) if one.name == name)
        )

    content, kind = await run_in_threadpool(make)
    return Response(content, media_type=kind)


ROUTES = [
    Route("/new", show),
    Route("/new/photos", upload, methods=["POST"]),
    Route("/new/fields", refresh, methods=["POST"]),
    Route("/new/remove", remove, methods=["POST"]),
    Route("/new/example", example, methods=["POST"]),
    Route("/new/start", begin, methods=["POST"]),
    Route("/new/{kind}/{photo}", photo),
]
