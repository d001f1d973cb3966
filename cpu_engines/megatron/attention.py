"""Core attention for packed and context-parallel sequences without Transformer Engine."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from cpu_engines.megatron.context_parallel import rows_of_rank


class PackedDotProductAttention(DotProductAttention):
    """Megatron's unfused attention, run once per sequence of a packed (`thd`) batch, and on parts of sequences.

    Megatron's own local attention refuses packed sequences and context parallelism; looping over it keeps its
    arithmetic. A token attends causally inside its own sequence only; under context parallelism this rank's queries
    meet the keys and values of all ranks. Other batches go to the parent unchanged.
    """

    def __init__(self, config: TransformerConfig, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        on_one_rank = copy.copy(config)
        on_one_rank.context_parallel_size = 1
        super().__init__(on_one_rank, *args, pg_collection=pg_collection, **kwargs)
        self.config = config
        self._cp_group: ProcessGroup = (
            pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        )

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
                `[S, B, heads, head_dim]`; T and S are this rank's.
            attention_mask: bool, True where attention is forbidden; causal when None, ignored when packed. Of whole
                sequences, or of this rank's rows of them as `get_batch_on_this_cp_rank` cuts it.
            packed_seq_params: its `cu_seqlens_q_padded`, or `cu_seqlens_q`, are the bounds of the whole sequences, the
                last one being T of all ranks. Its `cp_group`, or a `local_cp_size` of 1, wins over the model's.

        Returns:
            `[T, 1, hidden]` when packed, else `[S, B, hidden]`.

        Raises:
            ValueError: the sequences cannot be cut over the ranks.
        """
        size, rank, group = self._ranks(packed_seq_params)
        if packed_seq_params is not None:
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            padded = packed_seq_params.cu_seqlens_q_padded
            bounds = (packed_seq_params.cu_seqlens_q if padded is None else padded).long()
            attention_mask = None
        elif size == 1:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        else:
            bounds = torch.tensor([0, len(query) * size])
        rows = rows_of_rank(bounds, size, rank)
        if size > 1:
            # One gather for both, so that all ranks meet in the same order in the backward pass.
            both = gather_from_sequence_parallel_region(torch.cat((key, value), -1), group=group)
            of_all = torch.cat([rows_of_rank(bounds, size, each) for each in range(size)])
            key, value = both[of_all.argsort()].split((key.shape[-1], value.shape[-1]), -1)
        outputs = []
        for start, end in pairwise(bounds.tolist()):
            here = (rows >= start) & (rows < end)
            if not here.any():
                continue
            mask = attention_mask
            if mask is None:
                mask = (torch.arange(start, end) > rows[here, None])[None, None]
            elif mask.shape[-2] == end:
                mask = mask[..., rows, :]
            q, k, v = query[here], key[start:end].contiguous(), value[start:end].contiguous()
            outputs.append(super().forward(q, k, v, mask))
        return torch.cat(outputs)

    def _ranks(self, packed: PackedSeqParams | None) -> tuple[int, int, ProcessGroup]:
        """Size of the context-parallel group that shares this batch, this rank in it, and the group."""
        group = self._cp_group
        if packed is not None and packed.cp_group is not None:
            group = packed.cp_group
        elif packed is not None and packed.local_cp_size == 1:
            return 1, 0, group
        return group.size(), group.rank(), group
