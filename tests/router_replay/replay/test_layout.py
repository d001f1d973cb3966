"""Places of padded and packed batches, written out by hand; parts of them; and lengths that do not add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router_replay.errors import InputError
from router_replay.replay import BatchLayout


def tokens(layout: BatchLayout) -> list[list[int]]:
    return [ids.tolist() for ids in layout.by_sequence(layout.token_ids)]


def test_padded_places_run_over_the_batch_first():
    layout = BatchLayout.padded(torch.tensor([[1, 2, 3], [4, 5, 0]]), [3, 2])
    assert layout.sequence.tolist() == [0, 1, 0, 1, 0, -1]
    assert layout.position.tolist() == [0, 0, 1, 1, 2, -1]
    assert tokens(layout) == [[1, 2, 3], [4, 5]]
    assert layout.is_padding.nonzero().flatten().tolist() == [5]
    assert (layout.num_places, layout.num_sequences) == (6, 2)


def test_padding_on_the_left():
    layout = BatchLayout.padded(torch.tensor([[1, 2, 3], [0, 4, 5]]), [3, 2], side="left")
    assert layout.sequence.tolist() == [0, -1, 0, 1, 0, 1]
    assert layout.position.tolist() == [0, -1, 1, 0, 2, 1]
    assert tokens(layout) == [[1, 2, 3], [4, 5]]


def test_packed_places_are_those_of_the_pack():
    layout = BatchLayout.packed(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([0, 3, 5], dtype=torch.int32))
    assert layout.sequence.tolist() == [0, 0, 0, 1, 1]
    assert layout.position.tolist() == [0, 1, 2, 0, 1]
    assert tokens(layout) == [[1, 2, 3], [4, 5]]
    assert layout.is_padding.nonzero().flatten().tolist() == []


def test_packed_with_alignment():
    layout = BatchLayout.packed(torch.tensor([1, 2, 3, 0, 4, 5, 0, 0]), [0, 4, 8], lengths=torch.tensor([3, 2]))
    assert layout.sequence.tolist() == [0, 0, 0, -1, 1, 1, -1, -1]
    assert layout.position.tolist() == [0, 1, 2, -1, 0, 1, -1, -1]
    assert tokens(layout) == [[1, 2, 3], [4, 5]]
    assert layout.is_padding.nonzero().flatten().tolist() == [3, 6, 7]


def test_padding_at_the_end_of_a_pack_is_no_sequence():
    """With bounds of its own, as slime and miles have it, or behind the last bound; with length 0 it is one again."""
    ids = torch.tensor([1, 2, 3, 0, 4, 5, 0, 0, 0])
    for cu_seqlens in ([0, 4, 6, 9], [0, 4, 6]):
        layout = BatchLayout.packed(ids, cu_seqlens, [3, 2])
        assert layout.sequence.tolist() == [0, 0, 0, -1, 1, 1, -1, -1, -1]
        assert layout.position.tolist() == [0, 1, 2, -1, 0, 1, -1, -1, -1]
        assert tokens(layout) == [[1, 2, 3], [4, 5]]
        assert layout.cut_bounds.tolist() == [0, 4, 6, 9]
    pseudo = BatchLayout.packed(ids, [0, 4, 6, 9], [3, 2, 0])
    assert (pseudo.num_sequences, pseudo.lengths.tolist()) == (3, [3, 2, 0])
    assert torch.equal(pseudo.sequence, layout.sequence)


@pytest.mark.parametrize(
    "sequences",
    [
        [torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.long), torch.tensor([4, 5, 6, 7]), torch.tensor([8])],
        torch.nested.nested_tensor_from_jagged(torch.arange(1, 9), torch.tensor([0, 3, 3, 7, 8])),
        # The 9 is between two sequences: values that are of none.
        torch.nested.nested_tensor_from_jagged(
            torch.tensor([1, 2, 3, 9, 4, 5, 6, 7, 8]), torch.tensor([0, 4, 4, 8, 9]), torch.tensor([3, 0, 4, 1])
        ),
        torch.nested.nested_tensor([torch.tensor(each) for each in ([1, 2, 3], [], [4, 5, 6, 7], [8])]).long(),
    ],
    ids=["list", "jagged", "jagged with gaps", "strided"],
)
def test_jagged_sequences_are_aligned_one_by_one(sequences):
    layout = BatchLayout.jagged(sequences, 4)
    assert layout.sequence.tolist() == [0, 0, 0, -1, 2, 2, 2, 2, 3, -1, -1, -1]
    assert layout.position.tolist() == [0, 1, 2, -1, 0, 1, 2, 3, 0, -1, -1, -1]
    assert tokens(layout) == [[1, 2, 3], [], [4, 5, 6, 7], [8]]
    assert layout.cut_bounds.tolist() == [0, 4, 4, 8, 12]
    assert BatchLayout.jagged(sequences).position.tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    ended = BatchLayout.jagged(sequences, cu_seqlens=[0, 4, 4, 8, 9, 11])
    assert ended.called_ids().tolist() == [[1, 2, 3, -1, 4, 5, 6, 7, 8, -1, -1]]
    assert (ended.num_sequences, ended.cut_bounds.tolist()) == (4, [0, 4, 4, 8, 9, 11])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda ids: BatchLayout.jagged(ids),
            r"is a nested tensor \[B, j\] .* got torch.int64 \[2, 3\]",
        ),
        (lambda ids: BatchLayout.jagged([]), "a vector of token ids for each sequence, got none"),
        (lambda ids: BatchLayout.jagged([ids]), r"for each sequence, got torch.int64 \[2, 3\]"),
        (lambda ids: BatchLayout.jagged([[1, 2]]), "for each sequence, got list"),
        (lambda ids: BatchLayout.jagged([ids[0].float()]), "token ids must be an int tensor"),
        (lambda ids: BatchLayout.jagged([ids[0]], 0), "at least 1, or by cu_seqlens, got multiple_of=0"),
        (lambda ids: BatchLayout.jagged([ids[0]], 2, cu_seqlens=[0, 4]), "got multiple_of=2 and cu_seqlens"),
        (lambda ids: BatchLayout.jagged([ids[0]], cu_seqlens=[0, 2]), "to have 3 tokens, its bounds have room for 2"),
        (lambda ids: BatchLayout.jagged([ids[0]], cu_seqlens=[1, 4]), "must bound the 1 sequences from 0 on"),
        (lambda ids: BatchLayout.jagged([ids[0]], cu_seqlens=[0]), "must bound the 1 sequences from 0 on"),
        (lambda ids: BatchLayout.jagged([ids[0]], cu_seqlens=[0, 3, 4, 5]), "bound 3 sequences, .* given for 1"),
        (lambda ids: BatchLayout.jagged([ids[0], ids[1]], cu_seqlens=[0, 6, 3]), "must not fall"),
    ],
)
def test_what_is_no_jagged_batch(build, message):
    with pytest.raises(InputError, match=message):
        build(torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_ids_that_the_model_is_called_with():
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    assert BatchLayout.padded(ids, [3, 2]).called_ids().tolist() == [[1, 2, 3], [4, 5, -1]]
    assert BatchLayout.padded(ids.flip(1), [3, 2], side="left").called_ids().tolist() == [[3, 2, 1], [-1, 5, 4]]
    assert BatchLayout.packed(torch.tensor([7, 0, 8]), [0, 2, 3], [1, 1]).called_ids().tolist() == [[7, -1, 8]]
    assert BatchLayout.padded(ids, [0, 0]).called_ids().tolist() == [[-1] * 3] * 2
    assert BatchLayout.padded(ids[:, :0], [0, 0]).called_ids().shape == (2, 0)
    assert BatchLayout.padded(ids[:0], []).called_ids().shape == (0, 3)
    with pytest.raises(InputError, match="not called with the 2 places of this layout, which are some of a batch"):
        BatchLayout.padded(ids, [3, 2]).at([0, 1]).called_ids()


def test_how_a_batch_can_be_cut():
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    padded = BatchLayout.padded(ids, [3, 2])
    assert (padded.called_shape, padded.cut_bounds.tolist()) == ((2, 3), [0, 3])
    packed = BatchLayout.packed(ids[0], [0, 1, 3])
    assert (packed.called_shape, packed.cut_bounds.tolist()) == ((1, 3), [0, 1, 3])
    part = padded.at(slice(0, 6))
    assert (part.called_shape, part.cut_bounds) == (None, None)


@pytest.mark.parametrize(
    ("called_shape", "cut_bounds", "message"),
    [
        ((2, 2), None, r"called with \[2, 2\] ids has no 2 places"),
        ((1, 2), [0, 1], "must rise from 0 to the length of the called shape"),
        ((1, 2), [1, 2], "must rise from 0"),
        ((1, 2), [0, 2, 1, 2], "must rise from 0"),
        ((1, 2), [], "must rise from 0"),
        (None, [0, 2], "the called shape None"),
    ],
)
def test_cuts_by_hand_are_checked(called_shape, cut_bounds, message):
    cuts = None if cut_bounds is None else torch.tensor(cut_bounds, dtype=torch.int64)
    vectors = torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([8, 9]), torch.tensor([0, 2])
    with pytest.raises(InputError, match=message):
        BatchLayout(*vectors, called_shape=called_shape, cut_bounds=cuts)


def test_empty_sequences_and_empty_packs():
    layout = BatchLayout.packed(torch.tensor([7]), [0, 0, 1, 1])
    assert (layout.lengths.tolist(), layout.sequence.tolist()) == ([0, 1, 0], [1])
    assert BatchLayout.packed(torch.tensor([], dtype=torch.long), [0, 0]).num_places == 0
    assert BatchLayout.padded(torch.zeros(2, 0, dtype=torch.long), [0, 0]).num_places == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda ids: BatchLayout.padded(ids, [3]), "2 sequences, lengths are given for 1"),
        (
            lambda ids: BatchLayout.padded(ids, [3, 4]),
            "sequence 1 is said to have 4 tokens, its row of token ids has 3",
        ),
        (lambda ids: BatchLayout.padded(ids[0], [3]), r"needs token ids of shape \[B, S\], got \[3\]"),
        (lambda ids: BatchLayout.packed(ids, [0, 3, 6]), r"needs token ids of shape \[T\] or \[1, T\], got \[2, 3\]"),
        (lambda ids: BatchLayout.packed(ids[0], [0, 2]), "from 0 to the pack's 3 tokens, but go from 0 to 2"),
        (lambda ids: BatchLayout.packed(ids[0], [1, 3]), "but go from 1 to 3"),
        (lambda ids: BatchLayout.packed(ids[0], []), "but go from nothing to nothing"),
        (lambda ids: BatchLayout.packed(ids[0], [0, 5, 3]), r"must not fall, got \[0, 5, 3\]"),
        (lambda ids: BatchLayout.packed(ids[0], [0, 4], [3]), "from 0 to the pack's 3 tokens, but go from 0 to 4"),
        (lambda ids: BatchLayout.packed(ids[0], [0, 1, 2, 3], [1]), "bound 3 sequences, lengths are given for 1"),
        (lambda ids: BatchLayout.packed(ids[0], [0, 1], [1, 2]), "bound 1 sequences, lengths are given for 2"),
        (lambda ids: BatchLayout.packed(ids[0], [0, 1, 3], [2]), "said to have 2 tokens, its bounds have room for 1"),
        (
            lambda ids: BatchLayout.packed(ids[0], [0, 1, 3], [2, 1]),
            "said to have 2 tokens, its bounds have room for 1",
        ),
    ],
)
def test_lengths_that_do_not_add_up(build, message):
    with pytest.raises(InputError, match=message):
        build(torch.tensor([[1, 2, 3], [4, 5, 6]]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda ids: BatchLayout.padded(ids.float(), [3, 3]),
            r"token ids must be an int tensor, got torch.float32 \[2",
        ),
        (lambda ids: BatchLayout.padded(ids.tolist(), [3, 3]), "token ids must be an int tensor, got list"),
        (
            lambda ids: BatchLayout.padded(ids, [3.0, 2.0]),
            r"lengths must be a vector of integers, got torch.float32 \[2\]",
        ),
        (lambda ids: BatchLayout.padded(ids, torch.ones(2, dtype=torch.bool)), "lengths must be a vector of integers"),
        (lambda ids: BatchLayout.padded(ids, 3), r"lengths must be a vector of integers, got torch.int64 \[\]"),
        (lambda ids: BatchLayout.padded(ids, None), "lengths must be integers, got NoneType"),
        (lambda ids: BatchLayout.padded(ids, [3, -1]), "sequence 1 is said to have -1 tokens"),
        (lambda ids: BatchLayout.padded(ids, [3, 3], side="top"), "'right' or 'left', got 'top'"),
        (lambda ids: BatchLayout.packed(ids[0], torch.tensor([0.0, 3.0])), "cu_seqlens must be a vector of integers"),
        (lambda ids: BatchLayout.packed(ids[0], [0, 3], [-1]), "sequence 0 is said to have -1 tokens"),
    ],
)
def test_what_is_no_batch(build, message):
    with pytest.raises(InputError, match=message):
        build(torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_numpy_lengths():
    layout = BatchLayout.padded(torch.tensor([[1, 2], [3, 4]]), np.array([2, 1]))
    assert layout.lengths.tolist() == [2, 1]


def test_vectors_by_hand_are_checked():
    one, bounds = torch.tensor([0, 0]), torch.tensor([0, 2])
    assert BatchLayout(one, torch.tensor([1, 0]), torch.tensor([8, 9]), bounds).num_places == 2
    for sequence, position, message in (
        (one, torch.tensor([0, 0]), "a token has two places"),
        (one, torch.tensor([0, 2]), "a position outside of its sequence"),
        (torch.tensor([0, -1]), torch.tensor([0, 1]), "-1 in both vectors"),
        (torch.tensor([0, 1]), torch.tensor([0, 1]), "of the sequences 0 to 0"),
        (one, torch.tensor([0]), "one entry for each place"),
        (torch.tensor([0, -2]), torch.tensor([0, -1]), "of the sequences 0 to 0"),
        (one, torch.tensor([0, 1], dtype=torch.int32), "position must be an int64 vector on the CPU, got torch.int32"),
        (one, torch.tensor([0, 1], device="meta"), "position must be an int64 vector on the CPU, got .* on meta"),
    ):
        with pytest.raises(InputError, match=message):
            BatchLayout(sequence, position, torch.tensor([8, 9]), bounds)


@pytest.mark.parametrize("bounds", [[], [0], [0, 1], [1, 2], [0, 2, 1, 2], [0, 3]])
def test_bounds_by_hand_are_checked(bounds):
    places = torch.tensor([-1])
    with pytest.raises(InputError, match="cu_seqlens must rise from 0 to the 2 tokens of all sequences"):
        BatchLayout(places, places, torch.tensor([8, 9]), torch.tensor(bounds, dtype=torch.int64))


def test_some_of_the_places():
    layout = BatchLayout.padded(torch.tensor([[1, 2, 3], [4, 5, 0]]), [3, 2])
    part = layout.at([4, -1, 1, 5])
    assert (part.sequence.tolist(), part.position.tolist()) == ([0, -1, 1, -1], [2, -1, 0, -1])
    # Masks are checked against whole sequences, whatever part of them is here.
    assert tokens(part) == tokens(layout)
    assert layout.at(slice(2, 4)).position.tolist() == [1, 1]
    assert layout.at(slice(4, 2)).num_places == 0
    assert layout.at(slice(1, 99, 3)).position.tolist() == [0, 2]
    assert layout.at(slice(None, None, -1)).position.tolist() == [-1, 2, 1, 1, 0, 0]
    assert layout.at(layout.sequence == 1).position.tolist() == [0, 1]
    assert layout.at([]).num_places == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([6], "goes from 6 to 6, and this layout has the places 0 to 5"),
        ([0, -2], "goes from -2 to 0"),
        ([1, 1], "a token has two places"),
        ([0.5], "an index of places must be a vector of integers"),
        (torch.ones(3, dtype=torch.bool), r"a mask of places must be bool \[6\], got \[3\]"),
    ],
)
def test_places_that_are_not_there(index, message):
    layout = BatchLayout.padded(torch.tensor([[1, 2, 3], [4, 5, 0]]), [3, 2])
    with pytest.raises(InputError, match=message):
        layout.at(index)


@given(st.data())
def test_an_index_of_an_index_is_an_index(data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    width = max(lengths)
    layout = BatchLayout.padded(torch.arange(len(lengths) * width).view(len(lengths), width), lengths)
    places = data.draw(st.permutations(range(layout.num_places)))
    first = places[: data.draw(st.integers(0, len(places)))]
    second = data.draw(st.permutations(range(len(first))))
    once, twice = layout.at([first[each] for each in second]), layout.at(first).at(second)
    assert torch.equal(once.sequence, twice.sequence)
    assert torch.equal(once.position, twice.position)
    values = torch.arange(once.num_places)
    found = once.of_tokens(values, -1)
    for place, (sequence, position) in enumerate(zip(once.sequence.tolist(), once.position.tolist(), strict=True)):
        if sequence >= 0:
            assert int(found[int(once.cu_seqlens[sequence]) + position]) == place
    assert int((found >= 0).sum()) == int((~once.is_padding).sum())
