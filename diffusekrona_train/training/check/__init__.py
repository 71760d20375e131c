"""What a config would do, before it does it: photos, prompts, identifier, layers, steps, memory, disk.

Loads no weights. Every section is a function that gives lines; `check_config` gathers them and makes the contact sheet.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from diffusekrona_train.config import RunConfig
from diffusekrona_train.config.known import known_model
from diffusekrona_train.config.prompts import prompt_warnings, unread
from diffusekrona_train.data import (
    Collection,
    Crop,
    collect,
    collect_prior,
    crop_pixels,
    plan_crops,
    printable,
)
from diffusekrona_train.models import generating_model
from diffusekrona_train.models.hub import HubModel
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.report.sheet import contact_sheet, fit
from diffusekrona_train.training.check.advice import advise
from diffusekrona_train.training.check.identifier import (
    known_words,
    local_tokenizers,
    rare_words,
    token_count,
)
from diffusekrona_train.training.check.needs import (
    base_parameters,
    device_lines,
    disk_lines,
    layers_of,
    memory_lines,
    step_lines,
)
from diffusekrona_train.training.check.starter import write_init

__all__ = ["check_briefly", "check_config", "draw_sheet", "write_init"]

MOST_DRAWN = 40
"""Photos on the contact sheet."""
CELL = 256
"""Side of a photo on the contact sheet, in pixels."""
MOST_REASONS = 20
"""Lines on what was skipped and why, and on what was done to photos."""
COLOURS = ("#e8710a", "#1a73e8", "#188038", "#a142f4")


def check_config(config: RunConfig) -> list[tuple[str, list[str]]]:
    """Return (title, lines) of what training would do; make the contact sheet. ValueError where it could not start."""
    from diffusekrona_train.models import configured_model
    from diffusekrona_train.training.setup import check_start

    source = configured_model(config)
    check_start(config, source)
    collection = collect(config)
    crops = plan_crops(collection.pictures, config.data, config.train.seed)
    sheet = draw_sheet(config, crops, Path(config.output).expanduser() / "check.png")
    trainable, adapter = adapter_lines(config, source)
    return [
        ("photos", photo_lines(config, collection)),
        ("advice", list(advise(crops))),
        ("sheet", [f"{sheet}: the crop marked on each photo, and the crop"]),
        ("model", model_lines(config, source)),
        ("prompts", prompt_lines(config, collection)),
        ("identifier", identifier_lines(config, source, collection)),
        ("adapter", adapter),
        ("steps", step_lines(config, collection)),
        ("memory", memory_lines(config, source)),
        ("disk", disk_lines(config, source, collection, trainable)),
        ("device", device_lines()),
    ]


def check_briefly(config: RunConfig) -> dict[str, list[str]]:
    """Return what a page shows of the check: `advice` on the photos, the `identifier`, and the `plan`."""
    from diffusekrona_train.models import configured_model

    photos, train = collect(config), config.train
    advice = list(advise(plan_crops(photos.pictures, config.data, train.seed)))
    if len(photos.pictures) == 2:
        advice.append("few: three to ten photos from several sides show more than two")
    advice += [f"{name}: {why}" for name, why in (*photos.skipped, *photos.remarks)]
    source = configured_model(config)
    views = train.steps * train.batch_size * train.gradient_accumulation / len(photos.pictures)
    plan = [f"{train.steps} steps, in which each photo is seen {views:.0f} times", *memory_lines(config, source)[:1]]
    return {
        "advice": advice,
        "identifier": identifier_lines(config, source, photos),
        "plan": [*plan, *device_lines()],
    }


def photo_lines(config: RunConfig, collection: Collection) -> list[str]:
    """Return how many images there are, in which sizes, with whose captions, and everything that was left out."""
    sizes = Counter(f"{picture.width} x {picture.height}" for picture in collection.pictures).most_common(4)
    where = config.subject.images or "subject.files"
    lines = [f"{len(collection.pictures)} from {printable(where)} ({', '.join(f'{n} of {s}' for s, n in sizes)}, …)"]
    lines[0] = lines[0].replace(", …)", ")" if len(sizes) < 4 else ", …)")
    lines += [f"captions: {count} from {source}" for source, count in collection.caption_source.most_common()]
    repeats = Counter(picture.repeats for picture in collection.pictures)
    if set(repeats) != {1}:
        lines.append("repeats: " + ", ".join(f"{times} photos x {count}" for count, times in sorted(repeats.items())))
    lines += [f"skipped {line}" for line in _by_reason(collection.skipped)]
    lines += _by_reason(collection.remarks)
    lines += collection.notes
    if config.prior.kind == "images" and config.prior.images:
        there = len(collect_prior(config, Path(config.prior.images).expanduser()).pictures)
        lines.append(f"class images: {there} of {config.prior.count} in {printable(config.prior.images)}")
    elif config.prior.kind == "images":
        lines.append(f"class images: {config.prior.count}, those missing are made by the base model first")
    return lines


def _by_reason(told: Iterable[tuple[str, str]]) -> list[str]:
    """Return `a.md, b.md and 3 more: why`, a line for each reason."""
    names: dict[str, list[str]] = {}
    for name, why in told:
        names.setdefault(why, []).append(name)
    lines = []
    for why, own in list(names.items())[:MOST_REASONS]:
        more = f" and {len(own) - 5} more" if len(own) > 5 else ""
        lines.append(f"{', '.join(own[:5])}{more}: {why}")
    return lines + ([f"… and {len(names) - MOST_REASONS} more reasons"] if len(names) > MOST_REASONS else [])


def draw_sheet(config: RunConfig, crops: list[list[Crop]], path: Path) -> Path:
    """Return a PNG of each photo with its crops outlined, beside the crops themselves."""
    rows = []
    for row in crops[:MOST_DRAWN]:
        first = row[0]
        label = f"{printable(first.picture.name, limit=40)}  {first.picture.width} x {first.picture.height}"
        label += f", {first.share:.0%} kept, {first.size_hw[1]} x {first.size_hw[0]}"
        label += f", enlarged {first.upscaling:.2f}x" if first.upscaling > 1 else ""
        photo = first.picture.open()  # one at a time, and of each only what the sheet shows
        crops_shown = [fit(Image.fromarray(crop_pixels(crop, photo)), CELL) for crop in row[:4]]
        rows.append((label, [fit(_with_boxes(row[:4], photo), CELL), *crops_shown]))
        del photo
    left_out = f" (the first {MOST_DRAWN} of {len(crops)})" if len(crops) > MOST_DRAWN else ""
    return contact_sheet(rows, path, cell=CELL, title=f"{config.name}: photos and crops{left_out}")


def _with_boxes(crops: list[Crop], photo: Image.Image) -> Image.Image:
    """Return the photo, small, with what no crop shows pale and a frame around each crop."""
    factor = min(1.0, 512 / max(photo.size))
    size = max(1, round(photo.width * factor)), max(1, round(photo.height * factor))
    photo = photo.resize(size, Image.Resampling.LANCZOS)
    shown = Image.new("L", size, 90)
    boxes = []
    for crop in crops:
        left, top, right, bottom = (edge * factor for edge in crop.box())
        boxes.append((left, top, max(left + 1, right - 1), max(top + 1, bottom - 1)))
        ImageDraw.Draw(shown).rectangle(boxes[-1], fill=255)
    photo = Image.composite(photo, Image.new("RGB", size, "white"), shown)
    draw = ImageDraw.Draw(photo)
    width = max(1, max(size) // 100)
    for colour, box in reversed(list(zip(COLOURS, boxes, strict=False))):
        draw.rectangle(box, outline=colour, width=width)
    return photo


def model_lines(config: RunConfig, source: ModelSource) -> list[str]:
    """Return what the model is, and a warning where the resolution is not the one it was made for."""
    parameters = base_parameters(source)
    lines = [f"{source.identity}: family {source.family.name}, {parameters:,} parameters, {source.prediction_type}"]
    if source.default_resolution != config.data.resolution:
        lines.append(
            f"data.resolution: {config.data.resolution}, and the model was made for {source.default_resolution}; "
            "its images are worse at other sizes"
        )
    known = known_model(source.like)
    base = getattr(source.place, "base", None)
    if known is not None and known.train_instead is not None:
        lines.append(f"it is distilled to few steps and learns badly: train {known.train_instead}, generate with this")
    if known is not None:
        lines.append(f"licence: {known.licence}{GATED if known.gated else ''}")
    if isinstance(base, HubModel):
        lines.append(f"what is not in files comes from {base.identity}{'' if _is_cached(base) else ', by download'}")
    if isinstance(source.place, HubModel) and not _is_cached(source.place):
        size = known.download_gb if known is not None else parameters * 2.6 / 1e9
        lines.append(f"its weights are not on this machine: about {size:.1f} GB are downloaded first{_room(size)}")
    return lines + _generating(config, source)


def _generating(config: RunConfig, source: ModelSource) -> list[str]:
    """Return what generates images where it is another model, its licence and download."""
    other = generating_model(config, source)
    if other is source:
        return []
    known, lines = known_model(other.identity), [f"images are generated with {other.identity}"]
    if known is not None:
        lines[0] += f", licence: {known.licence}{GATED if known.gated else ''}"
        if isinstance(other.place, HubModel) and not _is_cached(other.place):
            lines.append(f"about {known.download_gb:.1f} GB more are downloaded for it{_room(known.download_gb)}")
    return lines


GATED = "; gated: accept it on the model's hub page, then run `hf auth login`"


def _room(gigabytes: float) -> str:
    """Return what the disk of the hub's cache says to a download, '' where it cannot be asked."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if there is None:
        return ""
    free = shutil.disk_usage(there).free / 1e9
    return f"; {free:.1f} GB are free there" + ("" if free > gigabytes else ", which is too little")


def _is_cached(place: HubModel) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(place.name, "model_index.json", revision=place.revision)
    return isinstance(found, str)


def prompt_lines(config: RunConfig, collection: Collection) -> list[str]:
    """Return captions and prompts as the text encoder reads them."""
    captions = Counter(text for picture in collection.pictures for text in picture.captions).most_common()
    lines = [f"caption of {count}: {_quoted(text)}" for text, count in captions[:5]]
    if len(captions) > 5:
        lines.append(f"and {len(captions) - 5} more captions")
    fill = config.subject.fill
    if config.prior.kind != "none":
        lines.append(f"class: {_quoted(fill(config.prior.prompt))}")
    if config.validation.every:
        lines += [f"validation: {_quoted(fill(prompt))}" for prompt in config.validation.prompts[:10]]
        lines += prompt_warnings(map(fill, config.validation.prompts), kind="validation prompt")
    lines += prompt_warnings((text for text, _ in captions), kind="caption")
    token = config.subject.token.lower()
    without = sum(count for text, count in captions if token not in text.lower())
    if without:
        lines.append(
            f"{without} captions do not hold the identifier {config.subject.token!r}: nothing would be tied to it; "
            "write [V] into them, or set subject.captions: false"
        )
    return lines


def _quoted(text: str) -> str:
    return f"{text[:110]!r}{'…' if len(text) > 110 else ''}"


def identifier_lines(config: RunConfig, source: ModelSource, collection: Collection) -> list[str]:
    """Return tokens of the identifier in each encoder, whether it means something already, and captions that are too
    long."""
    token = config.subject.token
    if token.lower() == config.subject.class_noun.lower():
        return [f"{token!r} is the class noun itself: the subject would overwrite the whole class; take a rare word"]
    tokenizers = local_tokenizers(source)
    if not tokenizers:
        return [f"{token!r}: the tokenizers are not on this machine yet, so its tokens were not counted"]
    counts = [token_count(tokenizer, token) for tokenizer in tokenizers]
    where = "the text encoder" if len(counts) == 1 else "each text encoder"
    lines = [f"{token!r}: {counts[0]} {'token' if counts[0] == 1 else 'tokens'} in {where}"]
    if len(set(counts)) > 1:
        lines = [f"{token!r}: {' and '.join(map(str, counts))} tokens in the text encoders"]
    known = list(dict.fromkeys(word for tokenizer in tokenizers for word in known_words(tokenizer, token)))
    if known:
        others = ", ".join(rare_words(tokenizers[0], token))
        lines.append(f"{', '.join(known)} means something to the model already; rare words it has: {others}")
    elif max(counts) > 4:
        lines.append("many tokens for one identifier are learnt slowly; a word of one or two is better")
    room = tokenizers[0].model_max_length - 2
    captions = {text for picture in collection.pictures for text in picture.captions}
    prompts = list(map(config.subject.fill, config.validation.prompts)) if config.validation.every else []
    captions |= set(prompts)
    longest = max(captions, key=lambda text: token_count(tokenizers[0], text))
    if token_count(tokenizers[0], longest) > room:
        long = sum(token_count(tokenizers[0], text) > room for text in captions)
        lines.append(f"{long} captions or prompts have more than {room} tokens: what comes after is not read")
    told = [f"prompt {_quoted(text)}: {line}" for text in prompts if (line := unread(text, tokenizers))]
    return lines + told[:5]


def adapter_lines(config: RunConfig, source: ModelSource) -> tuple[int, list[str]]:
    """Return (trainable parameters, lines on layers and factors)."""
    from diffusekrona_train.adapters import count_parameters, plan, plan_notes
    from diffusekrona_train.models.layers import select_layers

    spec = config.adapter
    base = base_parameters(source)
    if spec.is_whole:
        return base, [f"full: all {base:,} parameters of the denoiser"]
    layers = select_layers(layers_of(source), spec)
    options = plan(spec, layers)
    trainable = count_parameters(spec, layers)
    kinds = Counter(layer.kind for layer in layers)
    what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    lines = [
        f"{spec.type}: {len(layers)} layers ({what}), {trainable:,} parameters, {trainable / base:.3%} of the denoiser"
    ]
    if spec.type == "krona" and not (spec.params or spec.match_lora_rank):
        pairs = Counter((option["a1"], option["a2"]) for option in options.values())
        lines.append("(a1, a2): " + ", ".join(f"{pair} in {count} layers" for pair, count in pairs.most_common()))
    return trainable, lines + plan_notes(spec, layers, options)
