"""Geometries and routes for tests, and the layout of a row spelt out once more with Python integers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from routing_masks import CODEC_NAMES, RoutingGeometry

codec_names = st.sampled_from(CODEC_NAMES)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def geometries(draw: st.DrawFn, max_experts: int = 1024, max_layers: int = 9) -> RoutingGeometry:
    num_experts = draw(st.one_of(st.integers(1, 20), st.integers(1, max_experts), st.sampled_from([128, 256])))
    top_k = draw(st.integers(1, min(num_experts, 64)))
    num_layers = draw(st.integers(1, max_layers))
    routed = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    return RoutingGeometry(num_layers, tuple(sorted(routed)), num_experts, top_k)


def random_indices(geometry: RoutingGeometry, num_tokens: int, seed: int) -> Tensor:
    """Distinct experts in random order, `int64 [num_tokens, L, K]`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, geometry.num_moe_layers, geometry.num_experts, generator=generator)
    return scores.argsort(-1)[..., : geometry.top_k]


def expected_row(codec: str, token: list[list[int]], geometry: RoutingGeometry) -> bytes:
    """One token's row, `token[layer]` being its experts."""
    bits_per_index = (geometry.num_experts - 1).bit_length()
    number, bit = 0, 0
    for experts in token:
        if codec == "bitset":
            number |= sum(1 << expert for expert in experts) << bit
            bit += geometry.num_experts
        else:
            for expert in experts:
                number |= expert << bit
                bit += bits_per_index
    return number.to_bytes((bit + 7) // 8, "little")


def legal_row(codec: str, row: bytes, geometry: RoutingGeometry) -> bool:
    """Whether some choice of experts is written as this row."""
    number = int.from_bytes(row, "little")
    bits_per_index = (geometry.num_experts - 1).bit_length()
    for _ in geometry.moe_layers:
        if codec == "bitset":
            if (number & ((1 << geometry.num_experts) - 1)).bit_count() != geometry.top_k:
                return False
            number >>= geometry.num_experts
        else:
            experts = set()
            for _ in range(geometry.top_k):
                experts.add(number & ((1 << bits_per_index) - 1))
                number >>= bits_per_index
            if len(experts) != geometry.top_k or max(experts) >= geometry.num_experts:
                return False
    return number == 0
