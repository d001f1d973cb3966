"""Rows of context-parallel ranks, and attention on them against whole sequences."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from cpu_engines.megatron import PackedDotProductAttention
from cpu_engines.megatron.context_parallel import rows_of_rank
from tests.cpu_engines.megatron import small_step

LENGTH, BATCH, HEADS, GROUPS, WIDTH = 12, 2, 4, 2, 8
ORDERS = ("zigzag", "contiguous")
# Row by row of the whole: what a query may not see; a sequence with two tokens of padding on its left.
LEFT_PADDED = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
LEFT_PADDED[1, :, :, :2] = True
MASKS: dict[str, Tensor | None] = {"causal": None, "whole mask": LEFT_PADDED, "own rows of a mask": LEFT_PADDED}


def attend(mask: str) -> dict[str, Tensor]:
    """Output and gradients of one attention, at this rank's rows of the whole; zero elsewhere."""
    generator = torch.Generator().manual_seed(0)
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    rows = rows_of_rank(torch.tensor([0, LENGTH]), size, rank)
    wholes = {
        name: torch.randn(LENGTH, BATCH, heads, WIDTH, generator=generator, dtype=torch.float64)
        for name, heads in (("query", HEADS), ("key", GROUPS), ("value", GROUPS), ("weights", HEADS))
    }
    parts = {name: whole[rows].requires_grad_(name != "weights") for name, whole in wholes.items()}
    core = PackedDotProductAttention(small_step.config(), 1, AttnMaskType.causal, "self")
    whole_mask = MASKS[mask]
    given = whole_mask[..., rows, :] if whole_mask is not None and mask.startswith("own") else whole_mask
    output = core(parts["query"], parts["key"], parts["value"], given)
    (output * parts.pop("weights").flatten(2)).sum().backward()
    found = {"output": output.detach().unflatten(2, (HEADS, WIDTH)), **{name: p.grad for name, p in parts.items()}}
    return {name: torch.zeros_like(own).repeat(size, 1, 1, 1).index_copy(0, rows, own) for name, own in found.items()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_that_of_whole_sequences(ranks, mask, order):
    reference = attend(mask)
    found = ranks.run({"context_parallel": 2, "context_order": order}, attend, mask)
    for name, whole in reference.items():
        # A softmax and two products, forward and back, over at most LENGTH + WIDTH terms, rounded in any order.
        bound = 2 * 3 * (LENGTH + WIDTH) * torch.finfo(torch.float64).eps * float(whole.abs().max())
        torch.testing.assert_close(found[0][name] + found[1][name], whole, rtol=0, atol=bound, msg=name)


def rows(bounds: list[int]) -> list[int]:
    ranks = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return rows_of_rank(torch.tensor(bounds), *ranks).tolist()


@pytest.mark.parametrize(
    ("order", "bounds", "expected"),
    [
        ("zigzag", [0, 8], ([0, 1, 6, 7], [2, 3, 4, 5])),
        ("zigzag", [0, 4, 4, 12], ([0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9])),
        ("contiguous", [0, 8], ([0, 1, 2, 3], [4, 5, 6, 7])),
        ("contiguous", [0, 3, 10], ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])),
    ],
)
def test_rows_of_two_ranks(ranks, order, bounds, expected):
    assert ranks.run({"context_parallel": 2, "context_order": order}, rows, bounds) == list(expected)


def test_sequences_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="6 tokens of a sequence with its padding are no multiple of 4"):
        rows_of_rank(torch.tensor([0, 4, 10]), 2, 0)


def megatrons_rows() -> list[int]:
    batch = {"tokens": torch.arange(LENGTH)[None]}
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)["tokens"][0].tolist()


def test_zigzag_is_megatrons_own(ranks):
    layout = {"context_parallel": 2}
    assert ranks.run(layout, megatrons_rows) == ranks.run(layout, rows, [0, LENGTH])
