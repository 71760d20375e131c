"""Find a model's tokenizers on this machine (its folder, the hub cache, package data); download nothing."""

from __future__ import annotations

from diffusekrona_train.config.known import known_models
from diffusekrona_train.models.contracts import Loadable, Loaded
from diffusekrona_train.models.hub import HubModel
from diffusekrona_train.models.local import ASSETS
from diffusekrona_train.models.singlefile import load_tokenizer
from diffusekrona_train.models.source import ModelSource, class_of


def local_tokenizers(source: ModelSource) -> list[Loaded]:
    """Return the model's tokenizers, one per text encoder; empty if they are not on this machine."""
    import transformers

    transformers.logging.set_verbosity_error()  # long captions have our own warning
    found, place = [], getattr(source.place, "base", source.place)
    for part in source.family.parts.tokenizers:
        try:
            if isinstance(place, HubModel):
                found.append(_hub_tokenizer(place, part.folder, class_of(part)))
            else:
                found.append(place.load_part(part.folder, class_of(part)))
        except (OSError, ValueError):
            return []
    return found


def _hub_tokenizer(place: HubModel, part: str, cls: type[Loadable]) -> Loaded:
    """Load from the local hub cache, or from the vocabulary in the package for the models whose configs it carries."""
    from huggingface_hub import try_to_load_from_cache

    # without its files transformers would build a tokenizer of single letters
    names = (f"{part}/tokenizer.json", f"{part}/vocab.json")
    if any(isinstance(try_to_load_from_cache(place.name, name, revision=place.revision), str) for name in names):
        return cls.from_pretrained(place.name, subfolder=part, revision=place.revision, local_files_only=True)
    if not place.alias or place.alias in known_models():
        raise ValueError(f"{place.name} has no tokenizer in the local hub cache")
    return load_tokenizer(ASSETS / "configs" / str({"sd14": "sd15"}.get(place.alias, place.alias)) / part, cls)
