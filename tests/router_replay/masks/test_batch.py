"""Masks of many sequences are one tensor of rows, and each sequence's own again."""

from __future__ import annotations

import pickle
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import InputError, PairingError, RouterReplayError
from router_replay.masks import RoutingGeometry, RoutingMasks, RoutingMasksBatch, from_bytes, to_bytes
from tests.router_replay.masks.routes import coded_geometries, random_indices, seeds

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)


def make(
    length: int, seed: int, start: int = 0, *, geometry: RoutingGeometry = GEOMETRY, codec: str = "rank"
) -> RoutingMasks:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(length, generator=generator) < 0.7
    runs = ((start, f"step {seed}"),) if length else ()
    return RoutingMasks.from_indices(
        random_indices(geometry, length, seed),
        valid,
        start=start,
        geometry=geometry,
        codec=codec,
        token_ids=[seed] * (start + length),
        weight_versions=runs,
    )


def require_same(one: RoutingMasks | None, other: RoutingMasks | None) -> None:
    assert (one is None) == (other is None)
    if one is None or other is None:
        return
    assert torch.equal(one.rows, other.rows) and torch.equal(one.valid, other.valid)
    for field in ("start", "geometry", "codec", "weight_versions", "token_digest"):
        assert getattr(one, field) == getattr(other, field)


def require_batch_of(batch: RoutingMasksBatch, masks: list[RoutingMasks | None]) -> None:
    assert len(batch) == len(masks)
    for index, (found, expected) in enumerate(zip(batch, masks, strict=True)):
        require_same(found, expected)
        require_same(batch[index - len(masks)], expected)
    rows = [b"" if one is None else one.rows.numpy().tobytes() for one in masks]
    assert batch.rows.numpy().tobytes() == b"".join(rows)
    assert batch.checksums == tuple(zlib.crc32(each) for each in rows)
    bounds = [0, *np.cumsum([0 if one is None else len(one) for one in masks]).tolist()]
    assert batch.cu_seqlens.tolist() == bounds and batch.cu_seqlens.dtype == torch.int64


sequences = st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 6), st.integers(0, 3))), max_size=5)


@given(coded_geometries(max_experts=40, max_layers=3), sequences, seeds, st.data())
@settings(max_examples=30, deadline=None)
def test_a_batch_is_its_sequences_and_so_is_every_part(coded, wanted, seed, data):
    geometry, codec = coded
    masks: list[RoutingMasks | None] = [
        None if one is None else make(one[0], seed % 1000 + index, one[1], geometry=geometry, codec=codec)
        for index, one in enumerate([*wanted, (3, 0)])
    ]
    batch = RoutingMasksBatch.of(masks)
    require_batch_of(batch, masks)
    part = data.draw(st.slices(len(masks)))
    require_batch_of(batch[part], masks[part])
    chosen = data.draw(st.lists(st.integers(-len(masks), len(masks) - 1), max_size=6))
    require_batch_of(batch.select(chosen), [masks[one] for one in chosen])
    require_batch_of(batch[part][::-1], masks[part][::-1])
    for other in (pickle.loads(pickle.dumps(batch[part])), batch[part].to("cpu")):
        require_batch_of(other, masks[part])
    if any(one is not None for one in masks[part]):
        require_batch_of(RoutingMasksBatch.of(batch[part]), masks[part])


def test_a_slice_and_a_sequence_share_the_batchs_memory():
    batch = RoutingMasksBatch.of([make(4, 0), None, make(5, 1), make(3, 2)])
    one = batch[2]
    assert one is not None and one.rows.data_ptr() == batch.rows[4:].data_ptr()
    assert batch[1:].rows.data_ptr() == one.rows.data_ptr() and batch[1:].valid.data_ptr() == one.valid.data_ptr()


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_little_more_than_its_rows(protocol):
    batch = RoutingMasksBatch.of([make(4000, seed) for seed in range(5)])
    one = batch[2]
    assert one is not None
    for small in (batch[1:2], one[3900:], one.cut(100, [2] * 4000)):
        data = pickle.dumps(small, protocol)
        assert len(data) < 1.6 * (small.rows.nbytes + small.valid.nbytes) + 800
        read = pickle.loads(data)
        assert torch.equal(read.rows, small.rows) and read.rows.is_contiguous()
        # Rows that came out of a pickle can be written to like any others.
        read.rows[:] = 0
    wide = torch.zeros(4, 9, dtype=torch.uint8)
    wide[:, ::3][:, : one.rows.shape[1]] = make(4, 0).rows[:, :3]
    strided = replace(make(4, 0), rows=wide[:, ::3][:, : one.rows.shape[1]])
    require_same(pickle.loads(pickle.dumps(strided, protocol)), make(4, 0))


def test_rows_in_buffers_beside_a_pickle_are_not_copied_into_it():
    """As Ray moves them."""
    batch, buffers = RoutingMasksBatch.of([make(4000, seed) for seed in range(5)]), []
    data = pickle.dumps(batch, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    assert len(data) < 2000
    # Ray's are read-only: what is made of them owns its memory.
    read = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    read.rows[:] = batch.rows
    require_batch_of(read, list(batch))


def test_a_batch_goes_through_a_container_sequence_by_sequence():
    masks = [make(4, 0), make(2, 1, start=3)]
    for found, expected in zip(RoutingMasksBatch.of(masks), masks, strict=True):
        assert found is not None
        require_same(from_bytes(to_bytes(found)), expected)


@pytest.mark.parametrize(
    ("masks", "error", "says"),
    [
        ([], InputError, "none of 0 sequences has masks"),
        ([None, None], InputError, "none of 2 sequences has masks"),
        ([make(2, 0), 3], InputError, "masks of sequence 1 are a int"),
        (make(2, 0), InputError, "got a RoutingMasks alone"),
        (
            [None, make(2, 0), make(2, 1, codec="bitset")],
            PairingError,
            "sequence 1 has codec 'rank', sequence 2 has 'b",
        ),
        (
            [make(2, 0), make(2, 1, geometry=RoutingGeometry(3, (1, 2), 9, 2))],
            PairingError,
            "sequence 0 has 8 experts, sequence 1 has 9",
        ),
    ],
)
def test_what_is_no_batch(masks, error, says):
    with pytest.raises(error, match=says):
        RoutingMasksBatch.of(masks)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": torch.zeros(5, 2, dtype=torch.uint8)}, r"valid is .*\(6,\) and rows are \(5, 2\)"),
        ({"rows": torch.zeros(6, 3, dtype=torch.uint8)}, "do not fit"),
        ({"valid": torch.ones(6)}, "must be torch.bool"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 5])}, "rise from 0 to the 6 rows"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 6])}, "rise from 0 to the 6 rows"),
        ({"cu_seqlens": torch.tensor([1, 4, 4, 6])}, "rise from 0 to the 6 rows"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 6], dtype=torch.int32)}, "must be int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "must be int64"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "starts has 3 entries, cu_seqlens is of 1 sequences"),
        ({"starts": (0, 0)}, "starts has 2 entries"),
        ({"starts": (0, 0, -1)}, "start of sequence 2 is -1"),
        ({"starts": (0, 1, 0)}, "sequence 1 has 0 rows from 1 on, but no digest"),
        ({"token_digests": (None, None, "b")}, "sequence 0 has 4 rows from 0 on, but no digest"),
        ({"token_digests": ("a", None, 3)}, "token_digest of sequence 2"),
        ({"weight_versions": ((), (), ((2, "a"),))}, "must ascend within"),
        ({"codec": "zip"}, "unknown codec"),
        ({"geometry": 3}, "geometry"),
    ],
)
def test_attributes_that_contradict_each_other_are_refused(change, says):
    batch = RoutingMasksBatch.of([make(4, 0), None, make(2, 1)])
    with pytest.raises(RouterReplayError, match=says):
        replace(batch, **change)


def test_other_rows_have_other_checksums():
    """Also where those of the rows before were computed already."""
    batch = RoutingMasksBatch.of([make(4, 0), make(4, 1)])
    before = batch.checksums
    assert replace(batch, rows=batch.rows.flip(0)).checksums != before


@pytest.mark.parametrize("index", [3, -4, 1.0, "a", None, True])
def test_a_sequence_that_is_not_there(index):
    batch = RoutingMasksBatch.of([make(4, 0), None, make(2, 1)])
    with pytest.raises(InputError):
        batch[index]
    with pytest.raises(InputError):
        batch.select([index])


@pytest.mark.gpu
def test_rows_go_to_a_device_and_the_rest_stays():
    masks = [make(4, 0), None, make(2, 1)]
    moved = RoutingMasksBatch.of(masks).pin_memory().to("cuda", non_blocking=True)
    assert moved.rows.is_cuda and not moved.valid.is_cuda and not moved.cu_seqlens.is_cuda
    assert moved.checksums == RoutingMasksBatch.of(masks).checksums
    require_batch_of(moved[1:].to("cpu"), masks[1:])
    require_batch_of(pickle.loads(pickle.dumps(moved)), masks)
