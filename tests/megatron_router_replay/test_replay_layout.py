"""Rows of padded and packed batches, written out by hand, and lengths that do not add up."""

from __future__ import annotations

import pytest
import torch

from megatron_router_replay import BatchLayout
from router_replay.errors import InputError


def test_padded_rows_run_over_the_batch_first():
    layout = BatchLayout.padded(torch.tensor([[1, 2, 3], [4, 5, 0]]), [3, 2])
    assert [rows.tolist() for rows in layout.rows] == [[0, 2, 4], [1, 3]]
    assert [ids.tolist() for ids in layout.token_ids] == [[1, 2, 3], [4, 5]]
    assert layout.padding_rows.tolist() == [5]
    assert (layout.num_rows, layout.num_sequences) == (6, 2)


def test_packed_rows_are_places():
    layout = BatchLayout.packed(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([0, 3, 5], dtype=torch.int32))
    assert [rows.tolist() for rows in layout.rows] == [[0, 1, 2], [3, 4]]
    assert [ids.tolist() for ids in layout.token_ids] == [[1, 2, 3], [4, 5]]
    assert layout.padding_rows.tolist() == []


def test_packed_with_alignment():
    layout = BatchLayout.packed(torch.tensor([1, 2, 3, 0, 4, 5, 0, 0]), [0, 4, 8], lengths=torch.tensor([3, 2]))
    assert [rows.tolist() for rows in layout.rows] == [[0, 1, 2], [4, 5]]
    assert layout.padding_rows.tolist() == [3, 6, 7]


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
        (lambda ids: BatchLayout.packed(ids[0], [0, 1, 3], [1]), "bound 2 sequences, lengths are given for 1"),
        (
            lambda ids: BatchLayout.packed(ids[0], [0, 1, 3], [2, 1]),
            "said to have 2 tokens, its bounds have room for 1",
        ),
    ],
)
def test_lengths_that_do_not_add_up(build, message):
    with pytest.raises(InputError, match=message):
        build(torch.tensor([[1, 2, 3], [4, 5, 6]]))
