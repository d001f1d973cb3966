"""Which tokens are replayed by the weights that computed their routes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from router_replay.errors import InputError
from router_replay.replay import FreshWeights, place
from tests.router_replay.replay.batches import GEOMETRY, padded, recorded

CPU = torch.device("cpu")
NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("lag", "expected"),
    [(0, [0, 0, 0, 0, 0, 0, 0]), (1, [0, 0, 0, 0, 1, 1, 0]), (2, [0, 0, 1, 1, 1, 1, 0]), (9, [0, 0, 1, 1, 1, 1, 0])],
)
def test_weights_of_few_updates_ago_are_fresh(lag, expected):
    """Rows 0 and 1 are of weights that nobody named, 2 and 3 of b, 4 and 5 of c, 6 of weights not in the list."""
    _, (masks,), _ = recorded([8], 0)
    masks = replace(masks, weight_versions=((2, "b"), (4, "c"), (6, "z")))
    assert FreshWeights(NAMES, lag).of(masks).int().tolist() == expected


def test_masks_that_begin_later():
    _, (masks,), _ = recorded([8], 0)
    part = replace(masks, weight_versions=((0, "a"), (5, "d")))[3:]
    assert FreshWeights(NAMES, 0).of(part).int().tolist() == [0, 0, 1, 1]


def test_rows_of_weights_that_nobody_named_are_stale():
    _, (masks,), _ = recorded([8], 0)
    assert not FreshWeights(NAMES, 9).of(replace(masks, weight_versions=())).any()


def test_stale_tokens_are_native_and_counted_apart_from_invalid_ones():
    ids, masks, _ = recorded([9, 6], 3)
    masks = [replace(masks[0], weight_versions=((0, "a"), (4, "d"))), replace(masks[1], weight_versions=((0, "d"),))]
    routes = place(masks, padded(ids), GEOMETRY, CPU, fresh=FreshWeights(NAMES, 1))
    stale = int(masks[0].valid[:4].sum())
    assert stale > 0
    invalid = sum(int((~one.valid).sum()) for one in masks)
    assert routes.native_causes == {"invalid": invalid, "stale": stale, "no routes": 0, "not in the rollout": 0}
    # Padded [S, B]: the place of token t of sequence 0 is 2 t.
    assert set((masks[0].valid[:4].nonzero().flatten() * 2).tolist()) <= set(routes.own_places.tolist())
    everything = place(masks, padded(ids), GEOMETRY, CPU)
    assert everything.num_replayed == routes.num_replayed + stale
    assert everything.fingerprint != routes.fingerprint


@pytest.mark.parametrize(
    ("names", "lag", "message"),
    [
        ([], 0, "one or more different names"),
        (["a", "a"], 0, "one or more different names"),
        ("step 7", 0, "must be a list"),
        (None, 0, "must be a list"),
        ([1, 2], 0, "must be a list"),
        (["a"], -1, "routes cannot be newer than the weights"),
    ],
)
def test_what_is_no_list_of_weights(names, lag, message):
    with pytest.raises(InputError, match=message):
        FreshWeights(names, lag)
