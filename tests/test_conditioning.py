"""Prompts of unequal length in one batch; what has no fraction is never cast."""

from __future__ import annotations

import pytest
import torch

from diffusekrona_train.common.device import moved
from diffusekrona_train.models.sd import collate


def test_rows_of_one_length_are_stacked_and_unequal_ones_padded_and_masked():
    rows = [{"embeds": torch.ones(n, 3), "pooled": torch.full((4,), float(n))} for n in (2, 5)]
    batch = collate(rows)
    assert batch["embeds"].shape == (2, 5, 3) and batch["embeds"][0, 2:].abs().max() == 0
    assert batch["embeds_mask"].dtype == torch.bool and batch["embeds_mask"].sum(1).tolist() == [2, 5]
    assert batch["embeds_mask"][0].tolist() == [True, True, False, False, False]
    assert batch["pooled"].shape == (2, 4) and "pooled_mask" not in batch
    assert collate(rows[:1]).keys() == {"embeds", "pooled"}


def test_a_mask_of_its_own_is_padded_with_false():
    rows = [
        {"embeds": torch.ones(n, 3), "embeds_mask": torch.tensor([False] + [True] * (n - 1)), "ids": torch.arange(n)}
        for n in (2, 4)
    ]
    batch = collate(rows)
    assert batch["embeds_mask"].tolist() == [[False, True, False, False], [False, True, True, True]]
    assert batch["ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]] and batch["ids"].dtype == torch.int64


def test_rows_with_other_names_are_refused():
    with pytest.raises(ValueError, match="prompts with b cannot be batched with a"):
        collate([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


def test_integers_and_booleans_keep_their_type():
    row = {"x": torch.ones(2), "ids": torch.tensor([512, 3]), "x_mask": torch.tensor([True, False])}
    found = moved(row, "cpu", torch.bfloat16)
    assert [value.dtype for value in found.values()] == [torch.bfloat16, torch.int64, torch.bool]
    assert found["ids"].tolist() == [512, 3]


def test_the_cache_keeps_the_type_of_what_a_family_gives(tmp_path):
    from diffusekrona_train.data.cache import Entry, Store, read_entry

    tensors = {
        "embeds": torch.randn(3, 4).bfloat16(),
        "ids": torch.tensor([1, 2]),
        "embeds_mask": torch.tensor([True, False, True]),
    }
    entry = Entry("text", {"a": 1}, "x", "not finite")
    (found,), made = Store(tmp_path, None, lambda text: None).get([entry], lambda: lambda what: tensors)
    again = read_entry(entry.path(tmp_path))
    assert made and again is not None
    for name, value in tensors.items():
        assert again[name].dtype == found[name].dtype == value.dtype and torch.equal(again[name], value)
