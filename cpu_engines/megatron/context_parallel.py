"""Which places of a sequence a context-parallel rank holds, and Megatron's rotary positions for them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.distributed import ProcessGroup

from cpu_engines.megatron.parallel import context_order

_megatrons_thd = rope_utils._apply_rotary_pos_emb_thd


def rows_of_rank(bounds: Tensor, size: int, rank: int) -> Tensor:
    """Rows of the whole that one of `size` context-parallel ranks holds, in its own order.

    Args:
        bounds: `[N + 1]`, of N sequences with their padding that lie behind each other, from 0 to the end.

    Returns:
        int64 `[bounds[-1] / size]`. Zigzag, as Megatron and Transformer Engine: each sequence is cut in `2 size` equal
        chunks, of which rank r has numbers r and `2 size - 1 - r`. Contiguous: the r-th part of the whole.

    Raises:
        ValueError: a sequence, or the whole, cannot be cut like this.
    """
    if size == 1:
        return torch.arange(int(bounds[-1]))
    if context_order() == "contiguous":
        length = _part(int(bounds[-1]), size, "tokens")
        return torch.arange(rank * length, (rank + 1) * length)
    rows = []
    for start, end in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
        chunk = _part(end - start, 2 * size, "tokens of a sequence with its padding")
        for number in (rank, 2 * size - 1 - rank):
            rows.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(rows)


def _part(length: int, parts: int, of_what: str) -> int:
    if length % parts:
        raise ValueError(f"{length} {of_what} are no multiple of {parts}: pad them to one")
    return length // parts


def rotary_on_this_rank(pos_emb: Tensor, seq_dim: int, cp_group: ProcessGroup) -> Tensor:
    """`get_pos_emb_on_this_cp_rank`, which pins memory, for either order: the rows of this rank of `pos_emb`."""
    whole = torch.tensor([0, pos_emb.shape[seq_dim]])
    return pos_emb.index_select(seq_dim, rows_of_rank(whole, cp_group.size(), cp_group.rank()))


def rotary_of_pack(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, cp_group: ProcessGroup, **kwargs: Any
) -> Tensor:
    """`_apply_rotary_pos_emb_thd`, which knows the zigzag order only, for either order.

    A pack of `t [T, heads, head_dim]` that is not cut, as for a dynamic context-parallel size of 1, has one rank.
    """
    bounds = cu_seqlens.long()
    if cp_group.size() == 1 or (context_order() == "zigzag" and len(t) < bounds[-1]):
        return _megatrons_thd(t, cu_seqlens, freqs, *args, cp_group=cp_group, **kwargs)
    cut = len(t) < bounds[-1]
    rows = rows_of_rank(bounds, cp_group.size() if cut else 1, cp_group.rank() if cut else 0)
    positions = rows - bounds[torch.searchsorted(bounds, rows, right=True) - 1]
    return rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[positions], *args, **kwargs).squeeze(1)
