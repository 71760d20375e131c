"""factors.py against LyCORIS, brute force, and the budgets' promises."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.functional.general import factorization as lycoris_factorization

from diffusekrona_train.adapters.kron import kron_macs
from diffusekrona_train.config.factors import (
    divisors,
    factorization,
    fit_budget,
    nearest_divisors,
    pair_cost,
    pair_count,
)

WIDTHS = [(320, 320), (768, 320), (640, 640), (2048, 1280), (1280, 1280), (60, 7)]


@given(st.integers(1, 3000))
def test_divisors(width):
    assert list(divisors(width)) == [d for d in range(1, width + 1) if width % d == 0]


@given(st.integers(1, 3000), st.integers(1, 4000))
def test_nearest_divisor_is_nearest(width, wanted):
    first = nearest_divisors(width, wanted)[0]
    assert abs(first - wanted) == min(abs(d - wanted) for d in divisors(width))
    assert all(width % d == 0 for d in nearest_divisors(width, wanted))


@settings(max_examples=300)
@given(st.integers(1, 5000), st.one_of(st.just(-1), st.integers(1, 200)))
def test_factorization_is_that_of_lycoris(width, factor):
    assert factorization(width, factor) == lycoris_factorization(width, factor)


@pytest.mark.parametrize("factor", [0, -2])
def test_impossible_factor_is_named(factor):
    with pytest.raises(ValueError, match=f"factor: {factor}"):
        factorization(640, factor)


@given(st.sampled_from(WIDTHS), st.data())
def test_cost_is_that_of_the_cheaper_order(widths, data):
    a1, a2 = (data.draw(st.sampled_from(divisors(width))) for width in widths)
    assert pair_cost(*widths, a1, a2) == min(kron_macs(a1, a2, widths[0] // a1, widths[1] // a2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=8), st.integers(100, 5_000_000))
def test_budget_is_kept_or_said_to_be_impossible(widths, budget):
    least = sum(min(pair_count(i, o, a1, a2) for a1 in divisors(i) for a2 in divisors(o)) for i, o in widths)
    if least > budget:
        with pytest.raises(ValueError, match=f"budget allows {budget:,}.*need {least:,}"):
            fit_budget(widths, budget, "budget")
        return
    chosen = fit_budget(widths, budget, "budget")
    assert sum(pair_count(*width, *chosen[width]) for width in widths) <= budget
    assert all(i % chosen[i, o][0] == 0 and o % chosen[i, o][1] == 0 for i, o in widths)
    assert chosen == fit_budget(list(reversed(widths)), budget, "budget")


def test_ample_budgets_split_the_output_finer_than_the_input():
    widths = [(640, 640)] * 10 + [(1280, 1280)] * 40
    for budget in (200_000, 400_000, 2_000_000):
        assert all(4 <= a1 < a2 for a1, a2 in fit_budget(widths, budget, "budget").values())
