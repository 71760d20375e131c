"""Check that the identifier is a rare token: how the tokenizers split it, and which rare words they know instead.

Uses only tokenizers, from the model's folder, the local hub cache or package data; nothing is fetched.
"""

from __future__ import annotations

import random
import re

from diffusekrona_train.models.contracts import Loaded
from diffusekrona_train.models.tokenizers import local_tokenizers

__all__ = ["known_words", "local_tokenizers", "rare_words", "token_count"]

RARE_SHARE = 0.9
"""A byte-pair vocabulary is ordered by frequency: a whole word in its first nine tenths means something already."""


def token_count(tokenizer: Loaded, text: str) -> int:
    """Count the tokens of `text`, without the start and the end."""
    return len(tokenizer.tokenize(text))


def known_words(tokenizer: Loaded, text: str) -> list[str]:
    """Return the words of `text` that are one frequent token, so that the model has a meaning for them."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) < 10_000:  # too small for frequencies to mean much; single letters and rare words look alike
        return []
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [word for word in words if vocabulary.get(word + "</w>", len(vocabulary)) < RARE_SHARE * len(vocabulary)]


def rare_words(tokenizer: Loaded, seed: str, count: int = 4) -> list[str]:
    """Return words of three letters that are a single, rare token: the same ones for the same `seed`."""
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
