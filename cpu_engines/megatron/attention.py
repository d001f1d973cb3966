"""Core attention for packed sequences without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention


class PackedDotProductAttention(DotProductAttention):
    """Megatron's unfused attention, run once per sequence of a packed (`thd`) batch.

    Megatron's own local attention refuses packed sequences; looping over it keeps its arithmetic, and a token
    attends causally inside its own sequence only. Unpacked batches go to the parent unchanged.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query, key, value: `[T, heads, head_dim]` (key and value: query groups) when packed, else
                `[S, B, heads, head_dim]`.
            attention_mask: bool, True where attention is forbidden; ignored when packed.
            packed_seq_params: its `cu_seqlens_q` are the bounds of the sequences, the last one being T.

        Returns:
            `[T, 1, hidden]` when packed, else `[S, B, hidden]`.
        """
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        outputs = []
        sequences = zip(*(torch.split(tensor, lengths) for tensor in (query, key, value)), strict=True)
        for parts in sequences:
            q, k, v = (part.unsqueeze(1).contiguous() for part in parts)
            size = q.shape[0]
            causal = torch.ones(1, 1, size, size, dtype=torch.bool, device=q.device).triu(1)
            outputs.append(super().forward(q, k, v, causal))
        return torch.cat(outputs)
