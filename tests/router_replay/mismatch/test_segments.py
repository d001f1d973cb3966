"""Recurrences along segments against loops; what one segment holds reaches no other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.mismatch.segments import Segments
from tests.router_replay.mismatch.loops import EPS

CPU = torch.device("cpu")
LENGTHS = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 33]), min_size=0, max_size=9)


def _loop(lengths, factors, terms, reverse):
    """x_t and the same with absolute values; infinities and NaN as IEEE has them."""
    found, magnitudes, begin = [0.0] * len(terms), [0.0] * len(terms), 0
    for length in lengths:
        places, x, magnitude = range(begin, begin + length), 0.0, 0.0
        for number, place in enumerate(reversed(places) if reverse else places):
            x = terms[place] + (factors[place] * x if number else 0.0)
            magnitude = abs(terms[place]) + (abs(factors[place]) * magnitude if number else 0.0)
            found[place], magnitudes[place] = x, magnitude
        begin += length
    return found, magnitudes


@settings(deadline=None, max_examples=200)
@given(LENGTHS, st.booleans(), st.integers(0, 2**16))
def test_a_recurrence_is_its_loop(lengths, reverse, seed):
    generator = torch.Generator().manual_seed(seed)
    factors, terms = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    factors[torch.rand(len(factors), generator=generator) < 0.2] = 0
    segments = Segments.following(lengths, CPU)
    found = segments.recurrence(factors, terms, reverse=reverse)
    expected, magnitude = _loop(lengths, factors.tolist(), terms.tolist(), reverse)
    # Two operations a token in each of the two, of 33 tokens at most, and the scan's own six levels.
    bound = (4 * 33 + 12) * EPS * torch.tensor(magnitude, dtype=torch.float64)
    assert ((found - torch.tensor(expected, dtype=torch.float64)).abs() <= bound).all()
    running = segments.running_sum(terms, reverse=reverse)
    expected, magnitude = _loop(lengths, [1.0] * len(terms), terms.tolist(), reverse)
    bound = (2 * 33 + 12) * EPS * torch.tensor(magnitude, dtype=torch.float64)
    assert ((running - torch.tensor(expected, dtype=torch.float64)).abs() <= bound).all()


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.booleans(), st.sampled_from([math.nan, math.inf, -math.inf, 1e308]))
def test_what_a_segment_holds_reaches_no_other(lengths, reverse, poison):
    segments = Segments.following(lengths, CPU)
    ones = torch.ones(sum(lengths), dtype=torch.float64)
    clean = segments.recurrence(ones, ones, reverse=reverse)
    for bad in range(len(lengths)):
        of_bad = segments.segment == bad
        for factors, terms in ((ones, torch.where(of_bad, poison, ones)), (torch.where(of_bad, poison, ones), ones)):
            found = segments.recurrence(factors, terms, reverse=reverse)
            assert found[~of_bad].equal(clean[~of_bad])


def test_products_that_overflow_reach_nothing_that_is_zero():
    """A loop multiplies 0 by 1e300 as often as there are tokens; so many at once would be infinite."""
    factors = torch.full((64,), 1e300, dtype=torch.float64)
    terms = torch.zeros(64, dtype=torch.float64)
    terms[-1] = 2.0
    segments = Segments.following([64], CPU)
    assert segments.recurrence(factors, terms).equal(terms)
    assert segments.recurrence(factors, terms.flip(0), reverse=True).equal(terms.flip(0))


def test_a_factor_of_zero_forgets_what_was_before():
    factors = torch.tensor([1.0, 1.0, 0.0, 2.0])
    terms = torch.tensor([math.inf, 1.0, 3.0, 1.0])
    assert Segments.following([4], CPU).recurrence(factors, terms).tolist() == [math.inf, math.inf, 3.0, 7.0]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), max_size=20))
def test_sums_and_maxima_of_segments_in_any_order(segment):
    values = torch.randn(len(segment), generator=torch.Generator().manual_seed(0))
    segments = Segments.of(torch.tensor(segment, dtype=torch.int64), 6)
    for number in range(6):
        mine = [value for value, each in zip(values.tolist(), segment, strict=True) if each == number]
        # Summed in float64 and rounded once.
        assert segments.sum(values)[number].item() == pytest.approx(math.fsum(mine), rel=1e-7, abs=1e-15)
        assert segments.max(values)[number].item() == max(mine, default=-math.inf)
        assert segments.counts[number].item() == len(mine)
    assert segments.of_items(segments.counts).tolist() == [segment.count(each) for each in segment]


def test_the_item_after_each():
    items = torch.tensor([1.0, 2.0, math.nan, 4.0])
    assert Segments.following([2, 0, 1, 1], CPU).next_of(items).tolist() == [2.0, 0.0, 0.0, 0.0]
    assert Segments.following([], CPU).next_of(items[:0]).tolist() == []
