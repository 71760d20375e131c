"""Rare and known words, in CLIP's own vocabulary."""

from __future__ import annotations

import pytest

from diffusekrona_train.models import open_model
from diffusekrona_train.training.check.identifier import (
    known_words,
    local_tokenizers,
    rare_words,
    token_count,
)


@pytest.fixture(scope="module")
def clip():
    return local_tokenizers(open_model("sd15"))[0]


def test_tokens_are_counted_as_clip_does(clip):
    # ids of the original tokenizer: sks</w> is 48136
    assert clip("sks dog").input_ids == [49406, 48136, 1929, 49407]
    assert [token_count(clip, text) for text in ("sks", "a photo of sks dog", "")] == [1, 5, 0]


def test_known_and_rare_words(clip):
    assert known_words(clip, "sks") == [] and known_words(clip, "Puppy sks") == ["puppy"]
    rare = rare_words(clip, "puppy")
    assert len(rare) == 4 and rare == rare_words(clip, "puppy")
    assert all(token_count(clip, word) == 1 and known_words(clip, word) == [] for word in rare)


def test_sdxl_has_two_and_a_missing_hub_model_none():
    assert len(local_tokenizers(open_model("sdxl"))) == 2
    source = open_model("sd15")
    source.place.alias, source.place.name = None, "nobody/nothing"
    assert local_tokenizers(source) == []


def test_small_vocabulary_makes_no_claims():
    toybox = local_tokenizers(open_model("toybox"))[0]
    assert token_count(toybox, "sks") == 1 and known_words(toybox, "dog") == [] and rare_words(toybox, "dog") == []
