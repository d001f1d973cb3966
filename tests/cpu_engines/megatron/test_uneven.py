"""Gathers and reduce-scatters of parts of several lengths, and their gradients, on two ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

LENGTHS = [3, 1]


def _parts(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 2, generator=generator, dtype=torch.float64) for length in LENGTHS]


def gathered() -> tuple[torch.Tensor, torch.Tensor]:
    """The whole, and the gradient of what this rank put in where each rank weighs the whole otherwise."""
    group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
    own = _parts(0)[rank].requires_grad_()
    whole = gather_from_sequence_parallel_region(own, group=group, output_split_sizes=LENGTHS)
    (whole * torch.cat(_parts(1 + rank))).sum().backward()
    return whole.detach(), own.grad


def reduced() -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the sum, and the gradient of what it put in."""
    group, rank = parallel_state.get_tensor_model_parallel_group(), dist.get_rank()
    own = torch.cat(_parts(1 + rank)).requires_grad_()
    part = reduce_scatter_to_sequence_parallel_region(own, group=group, input_split_sizes=LENGTHS)
    (part * _parts(3)[rank]).sum().backward()
    return part.detach(), own.grad


def test_parts_of_several_lengths_are_gathered(ranks):
    expected_gradients = (torch.cat(_parts(1)) + torch.cat(_parts(2))).split(LENGTHS)
    for (whole, gradient), expected in zip(
        ranks.run({"tensor_parallel": 2}, gathered), expected_gradients, strict=True
    ):
        assert torch.equal(whole, torch.cat(_parts(0)))
        assert torch.equal(gradient, expected)


def test_parts_of_several_lengths_are_reduced(ranks):
    expected_parts = (torch.cat(_parts(1)) + torch.cat(_parts(2))).split(LENGTHS)
    found = ranks.run({"tensor_parallel": 2}, reduced)
    for (part, gradient), expected in zip(found, expected_parts, strict=True):
        assert torch.equal(part, expected)
        assert torch.equal(gradient, torch.cat(_parts(3)))
