"""Parts of batches against their definitions, written out with lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import InputError
from router_replay.replay import BatchLayout, Shards

# Every example cuts a batch for up to twelve ranks, which a busy machine does not do in a fixed time.
EXAMPLES = settings(deadline=None, max_examples=50)

SIZES = [(context, sequence) for context in (1, 2, 3, 4) for sequence in (1, 2, 3)]


def halves(places: list[Any], size: int, rank: int) -> list[Any]:
    """Part `rank` and, from the end, part `rank` again, of 2 * size."""
    assert len(places) % (2 * size) == 0
    part = len(places) // (2 * size)
    first = places[part * rank : part * (rank + 1)]
    mirrored = places[::-1][part * rank : part * (rank + 1)]
    return first + mirrored[::-1]


def run(places: list[Any], size: int, rank: int) -> list[Any]:
    """The `rank`-th of `size` equal runs."""
    assert len(places) % size == 0
    part = len(places) // size
    return places[part * rank : part * (rank + 1)]


def ids_of(layout: BatchLayout) -> list[int]:
    """Token id of every place, -1 for padding."""
    known = layout.token_ids.tolist()
    starts = layout.cu_seqlens.tolist()
    places = zip(layout.sequence.tolist(), layout.position.tolist(), strict=True)
    return [known[starts[sequence] + position] if sequence >= 0 else -1 for sequence, position in places]


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[list[int]], int, int, int]:
    """Sequences of unlike lengths with ids of their own, two sizes, and how much padding ends the pack."""
    context, sequence = draw(st.sampled_from(SIZES))
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    ids = iter(range(1, 1000))
    return [[next(ids) for _ in range(each)] for each in lengths], context, sequence, draw(st.integers(0, 3))


@EXAMPLES
@given(packs())
def test_zigzag_packs_are_those_of_slime(pack):
    """There each sequence becomes 2 * C chunks of ceil(n / 2C), and each rank's joined halves are padded at the end."""
    sequences, context, sequence, tail = pack
    chunks = [-(-len(each) // (2 * context)) for each in sequences]
    whole = [each + [-1] * (2 * context * chunk - len(each)) for each, chunk in zip(sequences, chunks, strict=True)]
    # Each rank's length is even before it is padded, and so is what a trainer pads it to: 128 by default.
    local = sum(map(len, whole)) // context
    tail = (-local) % sequence + 2 * sequence * tail
    tail += sequence if tail % 2 else 0
    ids = [each for padded in whole for each in padded] + [-1] * (tail * context)
    bounds = torch.tensor([0, *map(len, whole), *([tail * context] if tail else [])]).cumsum(0)
    layout = BatchLayout.packed(torch.tensor(ids, dtype=torch.int64), bounds, [len(each) for each in sequences])
    for rank in range(context):
        expected = [each for padded in whole for each in halves(padded, context, rank)] + [-1] * tail
        called = Shards(context, rank).called(layout)
        assert called.called_ids().tolist() == [expected] == [ids_of(called)]
        for part in range(sequence):
            shards = Shards(context, rank, sequence_size=sequence, sequence_rank=part)
            assert ids_of(shards.routed(layout)) == run(expected, sequence, part)


@EXAMPLES
@given(packs())
def test_contiguous_packs_are_runs_of_the_whole_stream(pack):
    """As slime's and miles' allgather_cp cut them: sequences are not aligned, the stream is padded as a whole."""
    sequences, context, sequence, _ = pack
    ids = [each for one in sequences for each in one]
    ids += [-1] * (-len(ids) % (context * sequence))
    layout = BatchLayout.packed(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor([0, *map(len, sequences)]).cumsum(0),
        [len(each) for each in sequences],
    )
    for rank in range(context):
        expected = run(ids, context, rank)
        called = Shards(context, rank, "contiguous").called(layout)
        assert called.called_ids().tolist() == [expected]
        for part in range(sequence):
            routed = Shards(context, rank, "contiguous", sequence, part).routed(layout)
            assert ids_of(routed) == run(expected, sequence, part)


@EXAMPLES
@given(
    st.sampled_from(SIZES),
    st.lists(st.integers(0, 24), min_size=1, max_size=4),
    st.sampled_from(["zigzag", "contiguous"]),
    st.sampled_from(["left", "right"]),
)
def test_padded_batches(sizes, lengths, order, side):
    context, sequence = sizes
    multiple = 2 * context * sequence
    width = -(-max(lengths) // multiple) * multiple
    ids = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    layout = BatchLayout.padded(ids, lengths, side=side)
    rows = [
        [each if (place < length if side == "right" else place >= width - length) else -1 for place, each in row]
        for length, row in zip(lengths, (enumerate(row) for row in ids.tolist()), strict=True)
    ]
    cut = halves if order == "zigzag" else run
    for rank in range(context):
        expected = [cut(row, context, rank) for row in rows]
        assert Shards(context, rank, order).called(layout).called_ids().tolist() == expected
        steps = list(zip(*expected, strict=True))
        for part in range(sequence):
            routed = Shards(context, rank, order, sequence, part).routed(layout)
            assert ids_of(routed) == [each for step in run(steps, sequence, part) for each in step]


@EXAMPLES
@given(st.sampled_from(SIZES), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.sampled_from([1, 3]))
def test_ranks_share_out_every_place_once_and_in_order(sizes, parts, batch):
    """Every place is of a token here, so that none can hide among padding."""
    context, sequence = sizes
    multiple = 2 * context * sequence
    if batch == 1:
        bounds = torch.tensor([0, *parts]).cumsum(0) * multiple
        layout = BatchLayout.packed(torch.arange(int(bounds[-1])), bounds)
    else:
        width = parts[0] * multiple
        layout = BatchLayout.padded(torch.arange(batch * width).view(batch, width), [width] * batch)
    place_of = layout.of_tokens(torch.arange(layout.num_places), -1)
    for order in ("zigzag", "contiguous"):
        seen = []
        for rank in range(context):
            for part in range(sequence):
                routed = Shards(context, rank, order, sequence, part).routed(layout)
                places = place_of[layout.cu_seqlens[routed.sequence] + routed.position].tolist()
                assert places == sorted(places)
                assert len(places) * context * sequence == layout.num_places
                seen += places
        assert sorted(seen) == list(range(layout.num_places))


def test_two_ranks_by_hand():
    layout = BatchLayout.packed(torch.arange(12), [0, 8, 12])
    assert Shards(2, 0).called(layout).called_ids().tolist() == [[0, 1, 6, 7, 8, 11]]
    assert Shards(2, 1).called(layout).called_ids().tolist() == [[2, 3, 4, 5, 9, 10]]
    assert ids_of(Shards(2, 0, "zigzag", 2, 1).routed(layout)) == [7, 8, 11]
    assert Shards(2, 1, "contiguous").called(layout).called_ids().tolist() == [[6, 7, 8, 9, 10, 11]]


def test_whole_sequences_stay_for_the_pairing():
    layout = BatchLayout.packed(torch.tensor([1, 2, 3, 0, 4, 5, 6, 7]), [0, 4, 8], [3, 4])
    part = Shards(2, 1, "zigzag", 2, 1).routed(layout)
    assert [each.tolist() for each in part.by_sequence(part.token_ids)] == [[1, 2, 3], [4, 5, 6, 7]]
    assert ids_of(part) == [5, 6]


def test_one_rank_sees_everything():
    layout = BatchLayout.packed(torch.arange(3), [0, 3])
    assert Shards().routed(layout) is layout
    # Nothing is to be cut, so places that were picked by hand are fine.
    assert Shards().routed(layout.at([2])).position.tolist() == [2]


def test_what_was_cut_is_not_cut_again():
    layout = BatchLayout.packed(torch.arange(16), [0, 16])
    for part in (layout.at(slice(None)), Shards(2, 0).called(layout), Shards(sequence_size=2).routed(layout)):
        for shards in (Shards(2, 0), Shards(2, 0, "contiguous"), Shards(2, 1, "zigzag", 2, 1)):
            for cut in (shards.called, shards.routed):
                with pytest.raises(InputError, match=r"some of a batch already .* context parallelism over 2 ranks"):
                    cut(part)
    for part in (layout.at(slice(None)), Shards(sequence_size=2).routed(layout)):
        with pytest.raises(InputError, match=r"are some of a batch already .* sequence parallelism over 2 ranks"):
            Shards(sequence_size=2).routed(part)
    with pytest.raises(InputError, match="some of a batch: take the layout before"):
        Shards(sequence_size=2).routed(layout).called_ids()
    with pytest.raises(InputError, match="the layout of a microbatch is None"):
        Shards().called(None)


@pytest.mark.parametrize(
    ("shards", "layout", "message"),
    [
        (
            Shards(2, 0),
            BatchLayout.packed(torch.arange(14), [0, 8, 14]),
            r"sequence 1 of the pack has 6 places, which 2 ranks of context parallelism cannot cut into 4 parts"
            r" \(zigzag\): pad every sequence to a multiple of 4,",
        ),
        (
            Shards(3, 0, "zigzag", 2, 0),
            BatchLayout.padded(torch.zeros(2, 8, dtype=torch.long), [8, 8]),
            r"the batch has 8 places, .* into 6 parts \(zigzag\): pad it to a multiple of 12",
        ),
        (
            Shards(3, 0, "contiguous"),
            BatchLayout.packed(torch.arange(8), [0, 6, 8]),
            r"the batch has 8 places, .* into 3 parts \(contiguous\): pad it to a multiple of 3",
        ),
        (
            Shards(2, 0, "zigzag", 4, 0),
            BatchLayout.packed(torch.arange(12), [0, 4, 12]),
            "called with 6 places of the sequence dimension cannot share them among 4 ranks of sequence parallelism:"
            " pad every sequence to a multiple of 16",
        ),
        (
            Shards(sequence_size=2),
            BatchLayout.padded(torch.zeros(2, 3, dtype=torch.long), [3, 3]),
            "called with 3 places .* among 2 ranks .* pad the batch to a multiple of 2",
        ),
    ],
)
def test_sizes_that_do_not_divide(shards, layout, message):
    with pytest.raises(InputError, match=message):
        shards.routed(layout)


@pytest.mark.parametrize(
    ("given_as", "message"),
    [
        ({"context_size": 2, "context_rank": 2}, r"context_rank must be one of 0 .* got rank 2 of 2 rank\(s\)"),
        ({"context_size": 0}, "got rank 0 of 0"),
        ({"sequence_size": 2, "sequence_rank": -1}, "sequence_rank must be one of 0 .* got rank -1 of 2"),
        ({"sequence_size": 2.0}, "got rank 0 of 2.0"),
        ({"context_order": "ring"}, "context_order is zigzag or contiguous, got 'ring'"),
    ],
)
def test_ranks_that_are_not_there(given_as, message):
    with pytest.raises(InputError, match=message):
        Shards(**given_as)


@EXAMPLES
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from(["right", "left"]))
def test_trainers_that_flatten_sequence_by_sequence(lengths, side):
    width = max(max(lengths), 1)
    ids = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    layout = BatchLayout.padded(ids, lengths, side=side)
    expected = []
    for row, length in zip(ids.tolist(), lengths, strict=True):
        row = row[:length] if side == "right" else row[width - length :]
        padding = [-1] * (width - length)
        expected += row + padding if side == "right" else padding + row
    shards = Shards(batch_first=True)
    # Layouts take the first `length` columns' ids, or the last ones.
    assert ids_of(shards.routed(layout)) == expected
    assert shards.called(layout).called_ids().flatten().tolist() == expected


def test_sequence_by_sequence_under_both_cuts():
    ids = torch.arange(1, 33).view(2, 16)
    layout = BatchLayout.padded(ids, [16, 16])
    shards = Shards(2, 1, "contiguous", sequence_size=2, sequence_rank=1, batch_first=True)
    assert ids_of(shards.routed(layout)) == [13, 14, 15, 16, 29, 30, 31, 32]
    # Places that were taken by hand are in the routers' order already.
    part = layout.at([3, 1, 2])
    assert ids_of(Shards(batch_first=True).routed(part)) == ids_of(part)
