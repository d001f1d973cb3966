"""Whole training steps on two gloo ranks against one rank, through Megatron's schedules and its own all-reduces."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from cpu_engines.megatron import model_parallel
from tests.cpu_engines.megatron import small_step

# Without these, which Megatron's own arguments demand of two stages, sends to the next and the previous rank cross.
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
TP_EP = {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1}

CONTIGUOUS = {"context_parallel": 2, "context_order": "contiguous"}

CASES: dict[str, tuple[dict[str, Any], small_step.Kind, dict[str, Any]]] = {
    "data": ({}, "padded", {}),
    "tensor+sequence": ({"tensor_parallel": 2}, "padded", {}),
    "tensor+sequence, LayerNorm": ({"tensor_parallel": 2}, "padded", {"normalization": "LayerNorm"}),
    "tensor+sequence, packed": ({"tensor_parallel": 2}, "packed", {}),
    "pipeline": ({"pipeline_parallel": 2}, "padded", {}),
    "interleaved pipeline": ({"pipeline_parallel": 2, "virtual_pipeline": 2}, "padded", INTERLEAVED),
    "experts, all-gather": ({"expert_parallel": 2}, "padded", {}),
    "experts, all-to-all": ({"expert_parallel": 2}, "padded", ALL_TO_ALL),
    "tensor+sequence, whole experts, all-gather": (TP_EP, "padded", {}),
    "tensor+sequence, whole experts, all-to-all": (TP_EP, "padded", ALL_TO_ALL),
    "tensor+sequence, split experts, all-to-all": ({"tensor_parallel": 2}, "padded", ALL_TO_ALL),
    "context, zigzag": ({"context_parallel": 2}, "padded", {}),
    "context, zigzag, packed": ({"context_parallel": 2}, "packed", {}),
    "context, zigzag, uncut packs": ({"context_parallel": 2}, "uncut packs", {}),
    "context, contiguous": (CONTIGUOUS, "padded", {}),
    "context, contiguous, packed": (CONTIGUOUS, "packed", {}),
    "context, contiguous, uncut packs": (CONTIGUOUS, "uncut packs", {}),
    "context and experts": ({"context_parallel": 2, "expert_parallel": 2}, "packed", ALL_TO_ALL),
}

Step = tuple[dict[int, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def one_rank(megatron) -> dict[tuple[str, str], Step]:
    """`small_step.step` of this process, by kind of batch and normalization."""
    kinds: list[tuple[small_step.Kind, str]] = [("padded", "RMSNorm"), ("padded", "LayerNorm"), ("packed", "RMSNorm")]
    return {(kind, norm): small_step.step(kind, {"normalization": norm}) for kind, norm in kinds}


def bound(reference: Tensor) -> float:
    """What another order of sums may leave of float64's rounding in a loss or gradient.

    Its way leads through at most 8 products a layer, forward and back, each a sum of at most LONGEST_SUM terms, which
    rounds by at most LONGEST_SUM eps of their absolute sum: the largest gradient, or a normed activation's 1.
    """
    products = 2 * 8 * small_step.NUM_LAYERS
    size = max(1.0, float(reference.abs().max()))
    return products * small_step.LONGEST_SUM * torch.finfo(torch.float64).eps * size


@pytest.mark.parametrize("case", CASES)
def test_step_is_that_of_one_rank(case, ranks, one_rank):
    layout, kind, overrides = CASES[case]
    reference_kind = "padded" if kind == "padded" else "packed"
    losses, gradients = one_rank[reference_kind, overrides.get("normalization", "RMSNorm")]
    found = ranks.run(layout, small_step.step, kind, overrides)
    for number, loss in losses.items():
        parts = [rank_losses[number] for rank_losses, _ in found if number in rank_losses]
        if layout.get("tensor_parallel"):
            # Each has the loss of the gathered logits.
            assert torch.equal(*parts)
            parts.pop()
        assert (torch.stack(parts).sum() - loss).abs() <= bound(loss), f"microbatch {number}"
    covered: dict[str, Tensor] = {}
    for _, rank_gradients in found:
        for name, gradient in rank_gradients.items():
            own = ~gradient.isnan()
            difference = (gradient - gradients[name])[own].abs().max()
            assert difference <= bound(gradients[name]), f"{name}: {difference}"
            covered[name] = covered.get(name, torch.tensor(False)) | own
    assert covered.keys() == gradients.keys() and all(each.all() for each in covered.values())


def test_gradients_are_far_above_the_bound(one_rank):
    for _, gradients in one_rank.values():
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e6 * bound(gradient), name


def test_many_layouts_in_one_world_leave_no_socket(ranks):
    before = ranks.run({}, _open_files)
    for layout in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}) * 3:
        ranks.run(layout, _nothing)
    assert ranks.run({}, _open_files) == before


def _nothing() -> None:
    pass


def _open_files() -> int:
    # Models of earlier calls are circles that hold their groups.
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_second_layout_is_refused(megatron):
    with pytest.raises(RuntimeError, match="leave that one first"), model_parallel(tensor_parallel=1):
        pass
    assert parallel_state.model_parallel_is_initialized()
