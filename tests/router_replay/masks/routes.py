"""Geometries and routes for tests, and the layout of a row spelt out once more with Python integers."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from router_replay.masks import CODEC_NAMES, RoutingGeometry, get_codec

seeds = st.integers(0, 2**32 - 1)


@st.composite
def geometries(draw: st.DrawFn, max_experts: int = 1024, max_layers: int = 9) -> RoutingGeometry:
    num_experts = draw(st.one_of(st.integers(1, 20), st.integers(1, max_experts), st.sampled_from([128, 256])))
    top_k = draw(st.integers(1, min(num_experts, 64)))
    num_layers = draw(st.integers(1, max_layers))
    routed = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    return RoutingGeometry(num_layers, tuple(sorted(routed)), num_experts, top_k)


@st.composite
def coded_geometries(draw: st.DrawFn, max_experts: int = 1024, max_layers: int = 9) -> tuple[RoutingGeometry, str]:
    """A geometry, and the name of a codec that can write it."""
    geometry = draw(geometries(max_experts, max_layers))
    return geometry, draw(st.sampled_from([name for name in CODEC_NAMES if get_codec(name).can_write(geometry)]))


def random_indices(geometry: RoutingGeometry, num_tokens: int, seed: int) -> Tensor:
    """Distinct experts in random order, `int64 [num_tokens, L, K]`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, geometry.num_moe_layers, geometry.num_experts, generator=generator)
    return scores.argsort(-1)[..., : geometry.top_k]


def field_bits(codec: str, geometry: RoutingGeometry) -> int:
    """Bits of one layer, from the codecs' definitions."""
    bits_per_index = math.ceil(math.log2(geometry.num_experts))
    num_sets = math.comb(geometry.num_experts, geometry.top_k)
    return {
        "bitset": geometry.num_experts,
        "rank": (num_sets - 1).bit_length(),
        "ordered": geometry.top_k * bits_per_index,
    }[codec]


def expected_row(codec: str, token: list[list[int]], geometry: RoutingGeometry) -> bytes:
    """One token's row, `token[layer]` being its experts."""
    width = field_bits(codec, geometry)
    row = sum(_field(codec, experts, geometry) << layer_index * width for layer_index, experts in enumerate(token))
    return row.to_bytes((len(token) * width + 7) // 8, "little")


def legal_row(codec: str, row: bytes, geometry: RoutingGeometry) -> bool:
    """Whether some choice of experts is written as this row."""
    number, width = int.from_bytes(row, "little"), field_bits(codec, geometry)
    for _ in geometry.moe_layers:
        field = number & ((1 << width) - 1)
        number >>= width
        if codec == "bitset":
            legal = field.bit_count() == geometry.top_k
        elif codec == "rank":
            legal = field < math.comb(geometry.num_experts, geometry.top_k)
        else:
            bits = width // geometry.top_k
            experts = {field >> bits * k & ((1 << bits) - 1) for k in range(geometry.top_k)}
            legal = len(experts) == geometry.top_k and max(experts) < geometry.num_experts
        if not legal:
            return False
    return number == 0


def _field(codec: str, experts: list[int], geometry: RoutingGeometry) -> int:
    if codec == "bitset":
        return sum(1 << expert for expert in experts)
    if codec == "rank":
        return sum(math.comb(expert, place) for place, expert in enumerate(sorted(experts), start=1))
    bits = field_bits(codec, geometry) // geometry.top_k
    return sum(expert << bits * k for k, expert in enumerate(experts))
