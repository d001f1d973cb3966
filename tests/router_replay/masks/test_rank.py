"""Ranks are places in colexicographic order, and every set of small geometries comes back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from router_replay.masks import CODEC_NAMES, RoutingGeometry, get_codec
from router_replay.masks.codecs import reference
from router_replay.masks.codecs.ops import OPS
from router_replay.masks.limits import MAX_EXPERTS, MAX_TOP_K

MOST_SETS = 5000


def small_geometries() -> list[tuple[int, int]]:
    """Every (E, K) with at most `MOST_SETS` expert sets, within the limits of the kernels."""
    found = []
    for top_k in range(1, MAX_TOP_K + 1):
        for num_experts in range(top_k, MAX_EXPERTS + 1):
            if math.comb(num_experts, top_k) > MOST_SETS:
                break
            found.append((num_experts, top_k))
    return found


def all_sets(num_experts: int, top_k: int) -> Tensor:
    """Every set of K experts in colexicographic order, `int64 [C(E, K), 1, K]`."""
    in_order = sorted(itertools.combinations(range(num_experts), top_k), key=lambda experts: experts[::-1])
    return torch.tensor(in_order).unsqueeze(1)


def ranks_of(rows: Tensor) -> list[int]:
    return [int.from_bytes(bytes(row), "little") for row in rows.tolist()]


@pytest.mark.parametrize("top_k", range(1, MAX_TOP_K + 1))
def test_every_set_of_every_small_geometry(top_k: int) -> None:
    for num_experts, k in small_geometries():
        if k != top_k:
            continue
        sets = all_sets(num_experts, top_k)
        rows = OPS.pack(sets, num_experts, "rank")
        assert ranks_of(rows) == list(range(math.comb(num_experts, top_k)))
        for codec in CODEC_NAMES:
            rows = OPS.pack(sets, num_experts, codec)
            assert torch.equal(OPS.unpack_indices(rows, 1, num_experts, top_k, codec), sets.int())
            # The reference takes long for many experts: there only around a bitset's words.
            if num_experts <= 65 or num_experts in (127, 128, 129, 1024):
                assert torch.equal(reference.pack(sets, num_experts, codec), rows)
                assert torch.equal(reference.unpack_indices(rows, 1, num_experts, top_k, codec), sets.int())


def test_there_are_many_small_geometries() -> None:
    assert len(small_geometries()) > 1000
    assert {(8, 2), (16, 4), (1024, 1), (64, 64), (65, 64), (100, 2)} <= set(small_geometries())


@pytest.mark.parametrize(
    ("num_experts", "top_k", "bits"),
    [
        (128, 8, 41),
        (256, 8, 49),
        (384, 8, 54),
        (64, 32, 61),
        (67, 33, 64),
        (512, 10, 69),
        (512, 22, 128),
        (1024, 8, 65),
    ],
)
def test_the_ends_of_large_geometries(num_experts: int, top_k: int, bits: int) -> None:
    """The first and the last sets, whose neighbours differ by a carry through the whole rank."""
    geometry, codec = RoutingGeometry(1, (0,), num_experts, top_k), get_codec("rank")
    num_sets = math.comb(num_experts, top_k)
    assert codec.bits_per_layer(geometry) == bits
    first = list(range(top_k))
    last = list(range(num_experts - top_k, num_experts))
    sets = torch.tensor([first, [*first[:-1], top_k], [last[0] - 1, *last[1:]], last]).unsqueeze(1)
    rows = codec.pack(sets, geometry)
    assert ranks_of(rows) == [0, 1, num_sets - 2, num_sets - 1]
    assert torch.equal(codec.unpack_indices(rows, geometry), sets.int())
    beyond = torch.tensor([list(num_sets.to_bytes(rows.shape[1] + 1, "little"))[: rows.shape[1]]], dtype=torch.uint8)
    if num_sets < 2**bits:
        assert not OPS.legal_rows(beyond, 1, num_experts, top_k, "rank").any()


@pytest.mark.parametrize(("num_experts", "num_layers"), [(128, 48), (128, 94), (256, 58)])
def test_rank_is_within_two_percent_of_the_bound(num_experts: int, num_layers: int) -> None:
    geometry = RoutingGeometry(num_layers, tuple(range(num_layers)), num_experts, 8)
    bound = num_layers * math.log2(math.comb(num_experts, 8)) / 8
    assert bound <= get_codec("rank").row_bytes(geometry) <= 1.02 * bound
