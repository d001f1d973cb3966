"""A fourth codec, which Python knows and the kernels do not."""

from __future__ import annotations

from torch import Tensor

from router_replay.masks.codecs.bits import bits_of_integers, integers_of_bits
from router_replay.masks.codecs.layer_code import LayerCode, are_different_experts


class BytesCode(LayerCode):
    """K indices of 16 bits, in the router's column order."""

    name = "bytes"
    keeps_order = True
    illegal_bit = True

    def bits(self, num_experts: int, top_k: int) -> int:
        return 16 * top_k

    def refusal(self, num_experts: int, top_k: int) -> str | None:
        return "codec 'bytes' is for more than one expert" if num_experts == 1 else None

    def encode(self, indices: Tensor, num_experts: int) -> Tensor:
        return bits_of_integers(indices, 16).flatten(2)

    def decode(self, fields: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        indices = integers_of_bits(fields.unflatten(2, (top_k, 16)))
        return indices, are_different_experts(indices, num_experts)
