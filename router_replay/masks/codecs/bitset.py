"""Codec 'bitset': the mask itself."""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.masks.codecs.layer_code import LayerCode


class BitsetCode(LayerCode):
    """E bits, expert e at bit e."""

    name = "bitset"
    keeps_order = False
    illegal_bit = False

    def bits(self, num_experts: int, top_k: int) -> int:
        return num_experts

    def encode(self, indices: Tensor, num_experts: int) -> Tensor:
        mask = torch.zeros((*indices.shape[:-1], num_experts), dtype=torch.bool, device=indices.device)
        return mask.scatter_(-1, indices, True)

    def decode(self, fields: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
        experts = torch.arange(num_experts, dtype=torch.int32, device=fields.device)
        indices = torch.where(fields, experts, num_experts).sort(-1).values[..., :top_k]
        return indices, fields.sum(-1) == top_k
