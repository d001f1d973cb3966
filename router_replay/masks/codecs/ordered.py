"""Codec 'ordered': the indices as the router gave them, so that their order comes back."""

from __future__ import annotations

from torch import Tensor

from router_replay.masks.codecs.bits import bits_of_integers, integers_of_bits
from router_replay.masks.codecs.layer_code import LayerCode, are_different_experts


class OrderedCode(LayerCode):
    """K indices of ceil(log2 E) bits, in the router's column order."""

    name = "ordered"
    keeps_order = True
    illegal_bit = True

    def bits(self, num_experts: int, top_k: int) -> int:
        return top_k * _index_bits(num_experts)

    def encode(self, indices: Tensor, num_experts: int) -> Tensor:
        return bits_of_integers(indices, _index_bits(num_experts)).flatten(2)

    def decode(self, fields: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        indices = integers_of_bits(fields.reshape(*fields.shape[:-1], top_k, _index_bits(num_experts)))
        return indices, are_different_experts(indices, num_experts)


def _index_bits(num_experts: int) -> int:
    return (num_experts - 1).bit_length()
