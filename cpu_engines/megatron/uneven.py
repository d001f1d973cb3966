"""Gathers and reduce-scatters of parts that differ in length, which gloo refuses and NCCL takes.

An expert that is cut over tensor-parallel ranks gets what each of them dispatched to it: other numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor
from torch.distributed import ProcessGroup

_gather = mappings._gather_along_first_dim
_reduce_scatter = mappings._reduce_scatter_along_first_dim


def gather_along_first_dim(
    input_: Tensor,
    group: ProcessGroup,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """`mappings._gather_along_first_dim`; parts of several lengths travel padded to the longest."""
    if output_split_sizes is None or group.size() == 1:
        return _gather(input_, group, None, use_global_buffer)
    longest = max(output_split_sizes)
    own = input_.new_zeros(longest, *input_.shape[1:])
    own[: len(input_)] = input_
    parts = [torch.empty_like(own) for _ in output_split_sizes]
    dist.all_gather(parts, own, group=group)
    return torch.cat([part[:length] for part, length in zip(parts, output_split_sizes, strict=True)])


def reduce_scatter_along_first_dim(
    input_: Tensor,
    group: ProcessGroup,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """`mappings._reduce_scatter_along_first_dim`; with parts of several lengths, this rank's part of the whole sum."""
    if input_split_sizes is None or group.size() == 1:
        return _reduce_scatter(input_, group, None, use_global_buffer)
    whole = input_.clone()
    dist.all_reduce(whole, group=group)
    return whole.split(list(input_split_sizes))[group.rank()].clone()
