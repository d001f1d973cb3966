"""Packed rows: their bits, their sizes, and the way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import InputError, PairingError, RouterReplayError, UnsupportedError
from router_replay.masks import CODEC_NAMES, RoutingGeometry, choose_codec, get_codec
from tests.router_replay.masks.routes import coded_geometries, expected_row, geometries, random_indices, seeds

QWEN3_30B = RoutingGeometry(48, tuple(range(48)), 128, 8)
MIXTRAL = RoutingGeometry(32, tuple(range(32)), 8, 2)
DTYPES = {torch.uint8: 255, torch.int16: 32767, torch.uint16: 65535, torch.int32: 2**31, torch.int64: 2**31}


@given(coded_geometries(), st.integers(0, 5), seeds)
@settings(max_examples=120, deadline=None)
def test_rows_are_the_documented_bits(coded, num_tokens, seed):
    geometry, name = coded
    indices = random_indices(geometry, num_tokens, seed)
    rows = get_codec(name).pack(indices, geometry)
    assert rows.dtype == torch.uint8
    assert rows.shape == (num_tokens, get_codec(name).row_bytes(geometry))
    assert [bytes(row.tolist()) for row in rows] == [expected_row(name, t, geometry) for t in indices.tolist()]


@given(geometries(), st.integers(0, 5), seeds)
@settings(max_examples=40, deadline=None)
def test_bitset_rows_are_numpys_packbits(geometry, num_tokens, seed):
    indices = random_indices(geometry, num_tokens, seed)
    mask = np.zeros((num_tokens, geometry.num_moe_layers, geometry.num_experts), dtype=bool)
    np.put_along_axis(mask, indices.numpy(), True, axis=-1)
    bits = mask.reshape(num_tokens, geometry.num_moe_layers * geometry.num_experts)
    expected = np.packbits(bits, axis=1, bitorder="little")
    np.testing.assert_array_equal(get_codec("bitset").pack(indices, geometry).numpy(), expected)


@given(coded_geometries(), st.integers(0, 5), seeds)
@settings(max_examples=120, deadline=None)
def test_round_trip(coded, num_tokens, seed):
    geometry, name = coded
    codec = get_codec(name)
    indices = random_indices(geometry, num_tokens, seed)
    rows = codec.pack(indices, geometry)
    expected = indices if codec.keeps_order else indices.sort(-1).values
    unpacked = codec.unpack_indices(rows, geometry)
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked, expected.int())
    mask = torch.zeros(num_tokens, geometry.num_moe_layers, geometry.num_experts, dtype=torch.bool)
    mask.scatter_(-1, indices, True)
    for layer_index in range(geometry.num_moe_layers):
        assert torch.equal(codec.unpack_layer(rows, geometry, layer_index), unpacked[:, layer_index])
        assert torch.equal(codec.unpack_bitset(rows, geometry, layer_index), mask[:, layer_index])
    codec.check_rows(rows, geometry)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [8, 128, 256, 512, 1024])
def test_every_integer_dtype_packs_the_same(name, dtype, num_experts):
    geometry = RoutingGeometry(3, (0, 2), num_experts, 8)
    # A narrow dtype may meet a larger number of experts, as long as each index fits into it.
    within_dtype = RoutingGeometry(3, (0, 2), min(num_experts, DTYPES[dtype] + 1), 8)
    indices = random_indices(within_dtype, 6, seed=0)
    codec = get_codec(name)
    assert torch.equal(codec.pack(indices.to(dtype), geometry), codec.pack(indices, geometry))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_strides_do_not_matter(name):
    geometry, codec = RoutingGeometry(5, (1, 2, 4), 60, 4), get_codec(name)
    indices = random_indices(geometry, 10, seed=1)
    packed = codec.pack(indices, geometry)
    transposed = indices.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    padded = torch.full((10, 3, 9), -5)
    padded[..., 2:6] = indices
    repeated = torch.full((20, 3, 4), -5)
    repeated[::2] = indices
    for view in (transposed, padded[..., 2:6], repeated[::2]):
        assert not view.is_contiguous()
        assert torch.equal(codec.pack(view, geometry), packed)
    wide = torch.full((10, packed.shape[1] + 3), 255, dtype=torch.uint8)
    wide[:, 1:-2] = packed
    assert torch.equal(codec.unpack_indices(wide[:, 1:-2], geometry), codec.unpack_indices(packed, geometry))
    assert torch.equal(codec.pack(indices[:1].expand(7, -1, -1), geometry), packed[:1].expand(7, -1))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_more_rows_than_one_thread_takes(name):
    geometry, codec = RoutingGeometry(1, (0,), 9, 3), get_codec(name)
    indices = random_indices(geometry, 9000, seed=2)
    rows = codec.pack(indices, geometry)
    assert [bytes(row.tolist()) for row in rows] == [expected_row(name, t, geometry) for t in indices.tolist()]


def test_sizes():
    assert get_codec("bitset").row_bytes(QWEN3_30B) == 48 * 128 // 8
    assert get_codec("ordered").row_bytes(QWEN3_30B) == 48 * 8 * 7 // 8
    assert get_codec("bitset").row_bytes(MIXTRAL) == 32
    assert get_codec("ordered").row_bytes(MIXTRAL) == 24
    assert get_codec("rank").row_bytes(QWEN3_30B) == 48 * 41 // 8
    assert get_codec("rank").row_bytes(MIXTRAL) == 32 * 5 // 8
    assert get_codec("bitset").row_bytes(RoutingGeometry(3, (0, 1, 2), 3, 1)) == 2


def test_auto_takes_the_smallest():
    for geometry in (QWEN3_30B, MIXTRAL, RoutingGeometry(4, (0, 1, 2, 3), 8, 7)):
        smallest = min(get_codec(name).row_bytes(geometry) for name in CODEC_NAMES)
        assert choose_codec("auto", geometry).row_bytes(geometry) == smallest
    assert choose_codec("bitset", QWEN3_30B).name == "bitset"


@pytest.mark.parametrize("geometry", [QWEN3_30B, MIXTRAL, RoutingGeometry(1, (0,), 1024, 64)])
def test_auto_keeps_the_order_where_it_is_needed(geometry):
    assert choose_codec("auto", geometry, order=True).keeps_order
    assert choose_codec("ordered", geometry, order=True).name == "ordered"
    with pytest.raises(RouterReplayError, match=r"'rank' does not keep the top-k column order.*'ordered'"):
        choose_codec("rank", geometry, order=True)


def test_rank_refuses_what_does_not_fit_in_128_bits_and_auto_goes_elsewhere():
    fits, too_many = RoutingGeometry(2, (0, 1), 512, 22), RoutingGeometry(2, (0, 1), 512, 23)
    assert get_codec("rank").bits_per_layer(fits) == 128
    with pytest.raises(UnsupportedError, match=r"'rank' .*at most 128 bits.* 23 of 512 experts need 132.*'bitset'"):
        choose_codec("rank", too_many)
    with pytest.raises(UnsupportedError, match="'rank'"):
        get_codec("rank").pack(random_indices(too_many, 1, 0), too_many)
    assert choose_codec("auto", too_many).name == "ordered"
    assert choose_codec("auto", RoutingGeometry(1, (0,), 1024, 64)).name == "ordered"
    assert choose_codec("auto", RoutingGeometry(1, (0,), 192, 60)).name == "bitset"


def test_unknown_codec_is_named_with_those_known():
    with pytest.raises(RouterReplayError, match=r"'zip'.*bitset.*ordered"):
        get_codec("zip")


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("shape", [(4, 48, 7), (4, 47, 8), (8,), (1, 4, 47, 8)])
def test_other_shapes_are_refused(name, shape):
    with pytest.raises(PairingError, match=r"48 MoE layers, top-k 8"):
        get_codec(name).pack(torch.zeros(shape, dtype=torch.int64), QWEN3_30B)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_rows_of_another_width_or_dtype_are_refused(name):
    codec = get_codec(name)
    width = codec.row_bytes(QWEN3_30B)
    for rows in (torch.zeros(3, width + 1), torch.zeros(()), torch.zeros(3, width, dtype=torch.int8)):
        with pytest.raises(PairingError, match=rf"{name}.*\[tokens, {width}\].*8 of 128"):
            codec.unpack_indices(rows.to(torch.uint8) if rows.dtype == torch.float32 else rows, QWEN3_30B)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 60, 300])
def test_an_index_out_of_range_is_located(name, dtype, wrong):
    geometry = RoutingGeometry(9, (1, 4, 7), 60, 4)
    indices = random_indices(geometry, 8, seed=3).to(dtype)
    indices[5, 2, 1] = wrong
    with pytest.raises(InputError, match=rf"token 5, decoder layer 7: .*{wrong}.*\[0, 60\)"):
        get_codec(name).pack(indices, geometry)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_an_unsigned_index_out_of_range_is_located(name, dtype):
    geometry = RoutingGeometry(9, (1, 4, 7), 60, 4)
    indices = random_indices(geometry, 8, seed=3)
    indices[0, 1, 3] = 60
    with pytest.raises(InputError, match="token 0, decoder layer 4"):
        get_codec(name).pack(indices.to(dtype), geometry)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_an_index_that_narrows_to_a_legal_one_is_refused(name):
    geometry = RoutingGeometry(2, (0, 1), 16, 2)
    indices = random_indices(geometry, 3, seed=4)
    indices[1, 0, 0] = 2**32 + 3
    with pytest.raises(InputError, match="token 1, decoder layer 0"):
        get_codec(name).pack(indices, geometry)


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_twice_is_located(name, dtype):
    geometry = RoutingGeometry(9, (1, 4, 7), 60, 4)
    indices = random_indices(geometry, 8, seed=5)
    indices[3, 1, 0] = indices[3, 1, 3]
    with pytest.raises(InputError, match=r"token 3, decoder layer 4: .* twice"):
        get_codec(name).pack(indices.to(dtype), geometry)
