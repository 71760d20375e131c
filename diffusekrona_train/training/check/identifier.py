"""Is the identifier a rare word? What the tokenizers make of it, and which rare words they know instead.

Tokenizers alone, from the model's folder, the local hub cache or package data; nothing is fetched.
"""

from __future__ import annotations

import random
import re

from diffusekrona_train.models.contracts import Loadable, Loaded
from diffusekrona_train.models.hub import HubModel
from diffusekrona_train.models.source import ModelSource, class_of

RARE_SHARE = 0.9
"""A byte-pair vocabulary is ordered by frequency: a whole word in its first nine tenths means something already."""


def local_tokenizers(source: ModelSource) -> list[Loaded]:
    """The model's tokenizers, one a text encoder; empty where they are not on this machine."""
    import transformers

    transformers.logging.set_verbosity_error()  # a long caption is told in our own words
    found = []
    for part in source.family.parts.tokenizers:
        try:
            if isinstance(source.place, HubModel):
                found.append(_hub_tokenizer(source.place, part.folder, class_of(part)))
            else:
                found.append(source.place.load_part(part.folder, class_of(part)))
        except (OSError, ValueError):
            return []
    return found


def _hub_tokenizer(place: HubModel, part: str, cls: type[Loadable]) -> Loaded:
    """From the local hub cache, or from the vocabulary in the package for the models whose configs it carries."""
    from huggingface_hub import try_to_load_from_cache

    # without its files transformers would build a tokenizer of single letters
    names = (f"{part}/tokenizer.json", f"{part}/vocab.json")
    if any(isinstance(try_to_load_from_cache(place.name, name, revision=place.revision), str) for name in names):
        return cls.from_pretrained(place.name, subfolder=part, revision=place.revision, local_files_only=True)
    if not place.alias:
        raise ValueError(f"{place.name} has no tokenizer in the local hub cache")
    from diffusekrona_train.models.local import ASSETS
    from diffusekrona_train.models.singlefile import load_tokenizer

    return load_tokenizer(ASSETS / "configs" / str({"sd14": "sd15"}.get(place.alias, place.alias)) / part, cls)


def token_count(tokenizer: Loaded, text: str) -> int:
    """Tokens of `text`, without the start and the end."""
    return len(tokenizer.tokenize(text))


def known_words(tokenizer: Loaded, text: str) -> list[str]:
    """The words of `text` that are one frequent token, so that the model has a meaning for them."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) < 10_000:  # too small for frequencies to mean much; single letters and rare words look alike
        return []
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [word for word in words if vocabulary.get(word + "</w>", len(vocabulary)) < RARE_SHARE * len(vocabulary)]


def rare_words(tokenizer: Loaded, seed: str, count: int = 4) -> list[str]:
    """Words of three letters that are a single, rare token: the same ones for the same `seed`."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) < 10_000:
        return []
    # no vowel: letters that spell nothing are words to nobody
    rare = sorted(
        token.removesuffix("</w>")
        for token, index in vocabulary.items()
        if index > 0.95 * len(vocabulary) and re.fullmatch(r"[bcdfghjklmnpqrstvwxz]{3}</w>", token)
    )
    return sorted(random.Random(seed).sample(rare, min(count, len(rare))))
