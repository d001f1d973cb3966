"""RoutingMasks: tied to their tokens, silent about what is unknown, joined only where they fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import InputError, PairingError, RouterReplayError
from router_replay.masks import CODEC_NAMES, RoutingGeometry, RoutingMasks, get_codec, token_digest
from tests.router_replay.masks.routes import coded_geometries, random_indices, seeds

GEOMETRY = RoutingGeometry(5, (1, 2, 4), 16, 3)
TOKENS = list(range(100, 120))


def make_masks(start=0, end=10, versions=(), valid=None, geometry=GEOMETRY, codec="bitset", tokens=TOKENS):
    """Rows [start, end) of one fixed sequence, the same rows however it is cut."""
    indices = random_indices(geometry, len(tokens), seed=0)[start:end]
    valid = torch.ones(end - start, dtype=torch.bool) if valid is None else valid
    return RoutingMasks.from_indices(
        indices, valid, start=start, geometry=geometry, codec=codec, token_ids=tokens, weight_versions=versions
    )


@given(coded_geometries(max_experts=64), st.lists(st.booleans(), max_size=8), st.integers(0, 5), seeds)
@settings(max_examples=60, deadline=None)
def test_valid_rows_come_back_and_others_are_minus_one(coded, valid, start, seed):
    geometry, codec = coded
    indices = random_indices(geometry, len(valid), seed)
    known = torch.tensor(valid, dtype=torch.bool)
    given_indices = torch.where(known[:, None, None], indices, 9999)
    masks = RoutingMasks.from_indices(
        given_indices, known, start=start, geometry=geometry, codec=codec, token_ids=range(start + len(valid))
    )
    expected = indices if get_codec(codec).keeps_order else indices.sort(-1).values
    assert torch.equal(masks.indices(), torch.where(known[:, None, None], expected, -1).int())
    assert (masks.num_tokens, masks.end) == (len(valid), start + len(valid))


def test_a_valid_row_with_an_illegal_index_is_refused():
    indices = random_indices(GEOMETRY, 2, seed=0)
    indices[1, 0, 0] = 16
    valid = torch.tensor([False, True])
    with pytest.raises(InputError, match=r"token 1, decoder layer 1: .*\[0, 16\)"):
        RoutingMasks.from_indices(indices, valid, start=0, geometry=GEOMETRY, codec="auto", token_ids=TOKENS)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_the_same_tokens_are_accepted_in_every_form(codec):
    masks = make_masks(2, 10, codec=codec)
    prefix = np.array(TOKENS)
    for tokens in (TOKENS, tuple(TOKENS), prefix, torch.tensor(TOKENS), torch.tensor(TOKENS, dtype=torch.int32)):
        masks.check_tokens(tokens)
    masks.check_tokens(torch.tensor(TOKENS * 2)[:20])
    masks.check_tokens(TOKENS[:10])
    masks.check_tokens([*TOKENS[:10], 7, 7, 7])


@given(st.integers(0, 9), st.integers(-(2**31), 2**31))
@settings(max_examples=30, deadline=None)
def test_any_other_token_is_refused(position, other):
    tokens = list(TOKENS)
    tokens[position] = other
    masks = make_masks(4, 10)
    if other == TOKENS[position]:
        masks.check_tokens(tokens)
        return
    with pytest.raises(PairingError, match=rf"{masks.token_digest}.*{token_digest(tokens[:10])}"):
        masks.check_tokens(tokens)


def test_shifted_and_short_sequences_are_refused():
    masks = make_masks()
    with pytest.raises(PairingError, match=masks.token_digest):
        masks.check_tokens(TOKENS[1:])
    with pytest.raises(PairingError, match=r"\[0, 10\), but the sequence has only 9 tokens"):
        masks.check_tokens(TOKENS[:9])
    with pytest.raises(PairingError, match=r"position 10 .* only 9 token ids"):
        RoutingMasks.from_indices(
            random_indices(GEOMETRY, 10, 0),
            torch.ones(10, dtype=torch.bool),
            start=0,
            geometry=GEOMETRY,
            codec="auto",
            token_ids=TOKENS[:9],
        )


def test_the_digest_tells_prefixes_orders_and_boundaries_apart():
    digests = {token_digest(ids) for ids in ([], [0], [0, 0], [1, 0], [0, 1], [256], [1], [2**32], [-1])}
    assert len(digests) == 9
    assert token_digest([1, 2]) == "f59df9f51bfcb52f7ae49756810ec78b"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.zeros(10, 3, dtype=torch.uint8)},
        {"rows": torch.zeros(9, 6, dtype=torch.uint8)},
        {"valid": torch.ones(10, dtype=torch.uint8)},
        {"valid": torch.ones(10, 1, dtype=torch.bool)},
        {"geometry": RoutingGeometry(5, (1, 2), 16, 3)},
        {"codec": "ordered"},
        {"codec": "zip"},
        {"start": -1},
        {"weight_versions": ((0, "a"), (0, "b"))},
        {"weight_versions": ((5, "a"), (2, "b"))},
        {"weight_versions": ((10, "a"),)},
        {"weight_versions": ((-1, "a"),)},
    ],
)
def test_fields_that_contradict_each_other_are_refused(change):
    with pytest.raises(RouterReplayError):
        replace(make_masks(), **change)


@given(
    st.lists(st.integers(0, 20), max_size=4),
    st.lists(st.tuples(st.integers(0, 19), st.sampled_from("abc")), max_size=4),
    st.lists(st.booleans(), min_size=20, max_size=20),
    st.sampled_from(CODEC_NAMES),
)
@settings(max_examples=60, deadline=None)
def test_joined_deltas_are_the_whole(cuts, changes, valid, codec):
    by_position = {0: "a", **dict(changes)}
    version_at = [by_position[max(p for p in by_position if p <= position)] for position in range(20)]
    known = torch.tensor(valid)

    def part(start: int, end: int) -> RoutingMasks:
        runs = [(p, version_at[p]) for p in range(start, end) if p == start or version_at[p] != version_at[p - 1]]
        return make_masks(start, end, tuple(runs), known[start:end], codec=codec)

    bounds = [0, *sorted(cuts), 20]
    joined = RoutingMasks.join([part(a, b) for a, b in pairwise(bounds)], TOKENS)
    whole = part(0, 20)
    assert torch.equal(joined.rows, whole.rows)
    assert torch.equal(joined.valid, whole.valid)
    for field in ("start", "geometry", "codec", "weight_versions", "token_digest"):
        assert getattr(joined, field) == getattr(whole, field)


def test_a_join_may_begin_anywhere():
    joined = RoutingMasks.join([make_masks(3, 5), make_masks(5, 9)], TOKENS)
    assert (joined.start, joined.end, joined.token_digest) == (3, 9, token_digest(TOKENS[:9]))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], RouterReplayError, "no masks"),
        ([make_masks(0, 5), make_masks(6, 9)], RouterReplayError, "ends at position 5, part 1 begins at 6"),
        ([make_masks(0, 5), make_masks(4, 9)], RouterReplayError, "ends at position 5, part 1 begins at 4"),
        ([make_masks(5, 9), make_masks(0, 5)], RouterReplayError, "ends at position 9, part 1 begins at 0"),
        (
            [make_masks(0, 5), make_masks(5, 9, geometry=RoutingGeometry(5, (1, 2, 3), 16, 3))],
            PairingError,
            r"\[4\] route in part 0 .*\[3\] route in part 1",
        ),
        (
            [make_masks(0, 5), make_masks(5, 9, codec="ordered")],
            PairingError,
            "'bitset', part 1 has 'ordered'",
        ),
        ([make_masks(0, 5), make_masks(5, 9, tokens=[*TOKENS[:8], 1, 1])], PairingError, "digest"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, error, message):
    with pytest.raises(error, match=message):
        RoutingMasks.join(parts, TOKENS)


def test_rows_of_unknown_weights_do_not_inherit_the_version_before_them():
    known, unknown = make_masks(0, 5, ((0, "a"),)), make_masks(5, 9)
    with pytest.raises(RouterReplayError, match="part 1 does not say which weights"):
        RoutingMasks.join([known, unknown], TOKENS)
    nothing_recorded = make_masks(5, 9, valid=torch.zeros(4, dtype=torch.bool))
    assert RoutingMasks.join([known, nothing_recorded], TOKENS).weight_versions == ((0, "a"),)
    late = make_masks(5, 9, ((7, "b"),), valid=torch.tensor([False, False, True, True]))
    assert RoutingMasks.join([known, late], TOKENS).weight_versions == ((0, "a"), (7, "b"))


RUNS = ((2, "a"), (4, "b"), (7, "c"))


@pytest.mark.parametrize(
    ("first", "runs"),
    [
        (None, RUNS),
        (0, RUNS),
        (1, ((3, "a"), (4, "b"), (7, "c"))),
        (2, ((4, "b"), (7, "c"))),
        (6, ((8, "c"),)),
        (8, ()),
        (99, ()),
        (np.int64(4), ((6, "b"), (7, "c"))),
    ],
)
def test_a_slice_leaves_the_first_rows_out_and_keeps_the_digest(first, runs):
    valid = torch.tensor([True, False] * 4)
    masks = make_masks(2, 10, RUNS, valid)
    left, dropped = masks[first:], min(first or 0, 8)
    assert torch.equal(left.rows, masks.rows[dropped:]) and torch.equal(left.valid, valid[dropped:])
    assert (left.start, left.end, len(left)) == (2 + dropped, 10, 8 - dropped)
    assert (left.token_digest, left.geometry, left.codec) == (masks.token_digest, masks.geometry, masks.codec)
    assert left.weight_versions == runs
    left.check_tokens(TOKENS)


def test_rows_before_the_first_named_weights_stay_unnamed_in_a_slice():
    assert make_masks(0, 10, ((5, "a"),))[3:].weight_versions == ((5, "a"),)


@pytest.mark.parametrize("valid_rows", [0, 3, 8])
def test_a_sequence_is_the_join_of_its_head_and_the_rest(valid_rows):
    masks = make_masks(2, 10, RUNS, torch.arange(8) < valid_rows)
    for n in range(2, 11):
        joined = RoutingMasks.join([masks.cut(n, TOKENS), masks[n - 2 :]], TOKENS)
        assert torch.equal(joined.rows, masks.rows) and torch.equal(joined.valid, masks.valid)
        assert (joined.start, joined.weight_versions, joined.token_digest) == (2, RUNS, masks.token_digest)


@pytest.mark.parametrize(
    "index",
    [
        slice(None, 5), slice(0, 10), slice(2, 99), slice(-3, None), slice(None, None, 2), slice(None, None, -1),
        slice(1.0, None), slice("a", None), 0, -1, [0, 1], torch.tensor([0]), "rows", None,
    ],
    ids=str,
)  # fmt: skip
def test_other_indices_name_what_cuts(index):
    with pytest.raises(InputError, match=r"only masks\[a:\] with a >= 0 .*masks.cut\(n, token_ids\)"):
        make_masks()[index]


def test_masks_are_no_sequence_of_rows():
    with pytest.raises(InputError, match=r"masks.indices\(\)"):
        list(make_masks())
    assert len(make_masks(3, 10)) == 7 and len(make_masks(3, 3)) == 0


@pytest.mark.parametrize(
    ("n", "end", "runs"),
    [(2, 2, ()), (3, 3, RUNS[:1]), (4, 4, RUNS[:1]), (7, 7, RUNS[:2]), (10, 10, RUNS), (15, 10, RUNS)],
)
def test_a_cut_is_what_a_shorter_sequence_has(n, end, runs):
    valid = torch.tensor([True, True, False, True] * 2)
    masks = make_masks(2, 10, RUNS, valid)
    for token_ids in (TOKENS, TOKENS[:10], torch.tensor(TOKENS), np.array(TOKENS)):
        left = masks.cut(n, token_ids)
        assert torch.equal(left.rows, masks.rows[: end - 2]) and torch.equal(left.valid, valid[: end - 2])
        assert (left.start, left.end, left.weight_versions) == (2, end, runs)
        assert left.token_digest == token_digest(TOKENS[:end])
    left.check_tokens(TOKENS[:n])
    left.check_tokens([*TOKENS[:end], 1, 2, 3])
    if end > 2:
        with pytest.raises(PairingError, match="digest"):
            left.check_tokens([1, *TOKENS[1:end]])


def test_a_cut_checks_the_tokens_that_it_is_given():
    masks = make_masks(2, 10)
    with pytest.raises(PairingError, match=rf"{masks.token_digest}.*pair each sequence with its own masks"):
        masks.cut(5, [*TOKENS[:9], 7])
    with pytest.raises(PairingError, match=r"only 5 token ids are given: pass those .* before the cut"):
        masks.cut(5, TOKENS[:5])
    with pytest.raises(InputError, match="cut to 1 tokens, but these masks begin at position 2: leave them out"):
        masks.cut(1, TOKENS)
    for n in (5.0, "5", None, True):
        with pytest.raises(InputError, match=r"n is .* but must be an integer"):
            masks.cut(n, TOKENS)


def test_a_sequence_that_was_cut_short_is_told_of_the_cut():
    with pytest.raises(PairingError, match=r"has only 9 tokens: .* take masks.cut\(n, token_ids\)"):
        make_masks().check_tokens(TOKENS[:9])


def test_the_repr_is_one_line():
    masks = make_masks(2, 10, RUNS, torch.tensor([True, False] * 4))
    assert repr(masks) == (
        "RoutingMasks(8 tokens [2, 10), 4 valid, 3 MoE layers of 3 of 16 experts, codec 'bitset', 48 bytes)"
    )
