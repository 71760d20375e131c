"""Latents and text embeddings, made once and kept on disk under a key of what they were made from.

The key holds the photo's content, the crop, the model, the precision and the format, so nothing stale is ever read. An
entry that is damaged is made again; VAE and text encoders are loaded only where an entry is missing, and leave memory
before training starts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffusekrona_train.common.device import DTYPES, name_of
from diffusekrona_train.common.faults import reach
from diffusekrona_train.common.files import atomic
from diffusekrona_train.config import RunConfig
from diffusekrona_train.data import (
    Collection,
    Crop,
    Picture,
    collect,
    collect_prior,
    crop_pixels,
    is_image,
    open_image,
    plan_crops,
    printable,
)
from diffusekrona_train.data.cache import Entry, Processes, Store
from diffusekrona_train.data.order import Row, order_as_before, refuse_changes
from diffusekrona_train.models.contracts import Family, Part, Tensors
from diffusekrona_train.models.source import ModelSource

Renderer = Callable[[str, int], Image.Image]
"""(prompt, seed) -> an image of the base model."""


@dataclass
class Bucket:
    """Images of one size. N images (one that a pass shows r times has r rows), V variants of each."""

    latents: Tensor
    """(N, V, C, h, w) fp32."""
    extras: Tensors
    """What the family's picture_conditioning says of each crop, by name: (N, V, ...); {} for most families."""
    caption_index: Tensor
    """(N,) rows of TrainingSet.conditioning."""
    names: list[str]
    contents: list[str] = field(default_factory=list)
    """SHA-256 of each row's photo."""
    turns: list[tuple[int, ...]] | None = None
    """For each row the rows of TrainingSet.conditioning that take turns, where a picture has several captions."""

    def captions_of(self, pictures: Tensor, turn: Tensor | None) -> Tensor:
        """Return rows (B,) of TrainingSet.conditioning for `pictures` (B,) of this bucket, seen `turn` (B,) times."""
        if self.turns is None or turn is None:
            return self.caption_index[pictures]
        own = [self.turns[picture] for picture in pictures.tolist()]
        return torch.tensor([rows[seen % len(rows)] for rows, seen in zip(own, turn.tolist(), strict=True)])

    def arranged(self, order: list[int]) -> Bucket:
        """Return the same pictures, row i being today's row order[i]."""
        rows = torch.tensor(order)
        return Bucket(
            self.latents[rows],
            {name: values[rows] for name, values in self.extras.items()},
            self.caption_index[rows],
            [self.names[i] for i in order],
            [self.contents[i] for i in order],
            [self.turns[i] for i in order] if self.turns else None,
        )


@dataclass
class TrainingSet:
    """All that training reads: on the CPU, whatever device made it."""

    instances: list[Bucket]
    priors: list[Bucket]
    captions: list[str]
    conditioning: list[Tensors]
    """What the family's encode_prompt gave, one row a caption; lengths may differ."""

    def rows(self) -> list[list[list[Row]]]:
        """Return what each row shows, of instances and class images, by bucket: by this a resumed run knows its
        images."""
        return [[self._rows_of(bucket) for bucket in group] for group in (self.instances, self.priors)]

    def _rows_of(self, bucket: Bucket) -> list[Row]:
        turns = bucket.turns or [(index,) for index in bucket.caption_index.tolist()]
        texts = [tuple(self.captions[index] for index in own) for own in turns]
        return [Row(*row) for row in zip(bucket.contents, texts, bucket.names, strict=True)]

    def arrange(self, before: list[list[list[Row]]]) -> None:
        """Put the pictures into the order of `before`, an earlier set-up's rows(); ValueError where they differ."""
        now = self.rows()
        refuse_changes(*(list(itertools.chain(*itertools.chain(*groups))) for groups in (before, now)))
        for group, old, today in zip((self.instances, self.priors), before, now, strict=True):
            orders = [order_as_before(*pair) for pair in zip(old, today, strict=True)]
            group[:] = [bucket.arranged(order) for bucket, order in zip(group, orders, strict=True)]

    def conditioning_of(self, text: str) -> Tensors:
        """Return the tensors of one caption or prompt, without a batch axis; ValueError for a text that was not
        prepared."""
        if text not in self.captions:
            raise ValueError(f"the prompt {text!r} was not encoded before training")
        return self.conditioning[self.captions.index(text)]


def cache_folder(config: RunConfig) -> Path:
    """Return where entries lie: `data.cache_dir`, or a folder `cache` beside the run's, shared by the runs there."""
    return Path(config.data.cache_dir or Path(config.output).parent / "cache").expanduser()


def build_training_set(
    config: RunConfig,
    source: ModelSource,
    *,
    device: torch.device,
    log: Callable[[str], object] = lambda _: None,
    extra_prompts: Sequence[str] = (),
    accelerator: Processes | None = None,
    render: Renderer | None = None,
) -> TrainingSet:
    """Return latents and embeddings of all that training, validation and sampling read, from the cache or made now.

    `render(prompt, seed)` gives a PIL image of the base model and is called only where class images are missing. Under
    an `accelerator` the work is shared over its processes, and a failure of one is raised in all. ValueError names the
    photo whose latents are not finite.
    """
    store = Store(cache_folder(config), accelerator, log)
    collection, priors = collect(config), Collection([])
    if config.prior.kind == "images":
        priors = _class_images(config, source, store, render)
    for note in [*collection.notes, *priors.notes]:
        store.log(note)
    captions = prompts_of(config, collection.pictures + priors.pictures, extra_prompts)

    crops = [plan_crops(group.pictures, config.data, config.train.seed) for group in (collection, priors)]
    made = _made_with_tf32(config, device)
    images = _image_entries(config, source, [crop for group in crops for row in group for crop in row], made)
    texts = _text_entries(config, source, captions, made)
    latents, _ = store.get(images, lambda: _image_maker(config, source, device))
    embeddings, _ = store.get(texts, lambda: _text_maker(source, device))

    found = dict(zip([entry.what for entry in images], (tensors["latents"] for tensors in latents), strict=True))
    return TrainingSet(
        *(_buckets(group, found, captions, source.family) for group in crops),
        captions=captions,
        conditioning=embeddings,
    )


def prompts_of(config: RunConfig, pictures: Iterable[Picture], extra: Sequence[str] = ()) -> list[str]:
    """Return every text that a run needs embedded, each once: nothing, class prompt, negative, validation, captions,
    extra."""
    fill = config.subject.fill
    fixed = [
        "",
        config.prior.prompt,
        config.validation.negative,
        config.subject.prompt,
        *config.validation.prompts,
        *extra,
    ]
    return list(dict.fromkeys([*map(fill, fixed), *(text for picture in pictures for text in picture.captions)]))


def _made_with_tf32(config: RunConfig, device: torch.device) -> dict[str, bool]:
    """Return what a key says of TF32, which changes what fp32 encoders give; nothing without it: those keys stay."""
    return {"tf32": True} if torch.device(device).type == "cuda" and config.train.tf32 else {}


def _image_entries(config: RunConfig, source: ModelSource, crops: Sequence[Crop], made: dict[str, bool]) -> list[Entry]:
    precision = config.data.vae_precision
    vae = {
        "model": source.identity,
        "parts": _fingerprint(source, [source.family.parts.vae]),
        "revision": config.revision,
    }
    vae |= {"variant": config.variant, "vae": _file_identity(config.vae), "precision": precision} | made
    advice = (
        "is the VAE file complete?"
        if precision == "fp32"
        else f"it overflows in {precision}: set data.vae_precision: fp32"
    )
    entries = []
    for crop in crops:
        where = {"scaled": crop.scaled_hw, "top_left": crop.top_left, "size": crop.size_hw, "flipped": crop.flipped}
        problem = f"{printable(crop.picture.name)}: the VAE gives latents that are not finite; {advice}"
        colour = {"colour": crop.picture.colour} if crop.picture.colour else {}  # sRGB photos keep their old entries
        entries.append(Entry("latents", vae | where | {"photo": crop.picture.sha256} | colour, crop, problem))
    return entries


def _text_entries(
    config: RunConfig, source: ModelSource, captions: Sequence[str], made: dict[str, bool]
) -> list[Entry]:
    encoders = source.family.parts.text_encoders
    parts = _fingerprint(source, [*encoders, *source.family.parts.tokenizers])
    precision = "+".join(dict.fromkeys(name_of(source.text_dtype(part)) for part in encoders))
    precision = "int8" if source.text_precision == "int8" else precision
    parts += [f"text_encoders {_file_identity(name)}" for name in config.text_encoders or ()]
    model = {"model": source.identity, "parts": parts, "revision": config.revision, "variant": config.variant} | made
    problem = "{!r}: the text encoders give embeddings that are not finite; are the model's files complete?"
    return [
        Entry("text", model | {"precision": precision, "text": text}, text, problem.format(printable(text)))
        for text in captions
    ]


def _image_maker(config: RunConfig, source: ModelSource, device: torch.device) -> Callable[[Crop], Tensors]:
    vae = source.load("vae", dtype=DTYPES[config.data.vae_precision], device=device)["vae"]

    @torch.no_grad()
    def make(crop: Crop) -> Tensors:
        pixels = torch.from_numpy(crop_pixels(crop)).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = source.family.encode_image(vae, pixels.to(device, DTYPES[config.data.vae_precision]))[0]
        return {"latents": latents.float()}

    return make


def _text_maker(source: ModelSource, device: torch.device) -> Callable[[str], Tensors]:
    parts = source.load("tokenizers", "text_encoders", device=device)

    @torch.no_grad()
    def make(text: str) -> Tensors:
        return source.family.encode_prompt(parts["tokenizers"], parts["text_encoders"], text)

    return make


def _fingerprint(source: ModelSource, parts: Sequence[Part]) -> list[str]:
    """Return what distinguishes two local folders with the same denoiser: name, size and both ends of each file of
    `parts`."""
    place = getattr(source.place, "base", source.place)  # what a single transformer's other parts are taken from
    root = getattr(place, "path", None)
    if root is None or not Path(root).is_dir():
        return [] if place is source.place else [place.identity]
    marks = []
    for part in parts:
        for path in sorted(Path(root, part.folder).glob("*")):
            if path.suffix in (".safetensors", ".json", ".txt") and path.is_file():
                marks.append(f"{part.folder}/{path.name} {_ends(path)}")
    return marks


def _file_identity(name: str | None) -> str | None:
    """Return a hub name as it is; a file or folder by its content, so that the cache outlives its moving."""
    if name is None or not Path(name).expanduser().exists():
        return name
    path = Path(name).expanduser()
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) + sorted(path.rglob("config.json"))
    return " ".join(_ends(file) for file in files)


def _ends(path: Path, length: int = 1 << 20) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest = hashlib.sha256(file.read(length))
        file.seek(max(0, size - length))
        digest.update(file.read(length))
    return f"{size}:{digest.hexdigest()[:16]}"


def _buckets(rows: list[list[Crop]], latents: dict[Crop, Tensor], captions: list[str], family: Family) -> list[Bucket]:
    """Return one bucket for each size of crop, smallest first."""
    shelves: dict[tuple[int, int], list[list[Crop]]] = {}
    turns: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for row in rows:
        picture = row[0].picture
        shelves.setdefault(row[0].size_hw, []).extend([row] * picture.repeats)
        own = [captions.index(text) for text in picture.captions]
        # the copies of a repeated picture begin at different captions, so that one pass shows several
        own_turns = [(*own[i % len(own) :], *own[: i % len(own)]) for i in range(picture.repeats)]
        turns.setdefault(row[0].size_hw, []).extend(own_turns)
    return [
        Bucket(
            latents=torch.stack([torch.stack([latents[crop] for crop in row]) for row in shelf]),
            extras=_extras(shelf, family),
            caption_index=torch.tensor([own[0] for own in turns[size]]),
            names=[row[0].picture.name for row in shelf],
            contents=[row[0].picture.sha256 for row in shelf],
            turns=turns[size] if any(len(own) > 1 for own in turns[size]) else None,
        )
        for size, shelf in sorted(shelves.items())
    ]


def _extras(shelf: list[list[Crop]], family: Family) -> Tensors:
    """Return name -> (N, V, ...) of the images of a shelf."""
    given = [
        [family.picture_conditioning(crop.original_hw, crop.top_left, crop.size_hw) for crop in row] for row in shelf
    ]
    return {name: torch.stack([torch.stack([one[name] for one in row]) for row in given]) for name in given[0][0]}


def class_image_folder(config: RunConfig, source: ModelSource) -> Path:
    """Return where class images lie: `prior.images`, or a folder of the cache for this model, prompt and size."""
    if config.prior.images is not None:
        return Path(config.prior.images).expanduser()
    prompt = config.subject.fill(config.prior.prompt)
    text = json.dumps([source.identity, config.revision, prompt, config.data.resolution])
    return cache_folder(config) / "class-images" / hashlib.sha256(text.encode()).hexdigest()[:16]


def _class_images(config: RunConfig, source: ModelSource, store: Store, render: Renderer | None) -> Collection:
    """Return the class images, after the missing ones were rendered: number i from seed i, each process its share."""
    folder = class_image_folder(config, source)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"class-{index:05d}.png" for index in range(config.prior.count)]
    others = sum(is_image(path) and path.name not in names for path in folder.iterdir())
    wanted = [folder / name for name in names[: max(0, config.prior.count - others)]]
    mine = [(index, path) for index, path in enumerate(wanted) if index % store.world == store.rank]
    mine = [(index, path) for index, path in mine if not _is_whole(path)]

    def make() -> None:
        if mine and render is None:
            raise ValueError(f"prior.images: {printable(str(folder))} lacks {len(mine)} of {config.prior.count} images")
        for index, path in mine:
            image = render(config.subject.fill(config.prior.prompt), index)  # type: ignore[misc]
            with atomic(path) as temporary:
                image.save(temporary)
                reach("cache", index)
            store.log(f"class images: {index + 1} of {config.prior.count}")

    store.together(make)
    return collect_prior(config, folder)


def _is_whole(path: Path) -> bool:
    try:
        return path.exists() and open_image(path, path.name) is not None
    except ValueError:
        return False
