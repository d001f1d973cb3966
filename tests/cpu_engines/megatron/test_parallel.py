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

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data": ({}, {}),
    "tensor+sequence": ({"tensor_parallel": 2}, {}),
    "tensor+sequence, LayerNorm": ({"tensor_parallel": 2}, {"normalization": "LayerNorm"}),
    "pipeline": ({"pipeline_parallel": 2}, {}),
    "interleaved pipeline": ({"pipeline_parallel": 2, "virtual_pipeline": 2}, INTERLEAVED),
    "experts, all-gather": ({"expert_parallel": 2}, {}),
    "experts, all-to-all": ({"expert_parallel": 2}, ALL_TO_ALL),
    "tensor+sequence, whole experts, all-gather": (TP_EP, {}),
    "tensor+sequence, whole experts, all-to-all": (TP_EP, ALL_TO_ALL),
    "tensor+sequence, split experts, all-to-all": ({"tensor_parallel": 2}, ALL_TO_ALL),
}

Step = tuple[dict[int, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def one_rank(megatron) -> dict[str, Step]:
    """`small_step.step` of this process, by normalization."""
    return {kind: small_step.step({"normalization": kind}) for kind in ("RMSNorm", "LayerNorm")}


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
    layout, overrides = CASES[case]
    losses, gradients = one_rank[overrides.get("normalization", "RMSNorm")]
    found = ranks.run(layout, small_step.step, overrides)
    seen: dict[str, Tensor] = {}
    for rank_losses, rank_gradients in found:
        for number, loss in rank_losses.items():
            assert (loss - losses[number]).abs() <= bound(losses[number]), f"microbatch {number}"
        for name, gradient in rank_gradients.items():
            own = ~gradient.isnan()
            difference = (gradient - gradients[name])[own].abs().max()
            assert difference <= bound(gradients[name]), f"{name}: {difference}"
            seen[name] = seen.get(name, False) | own
    assert {number for rank_losses, _ in found for number in rank_losses} == losses.keys()
    assert seen.keys() == gradients.keys() and all(covered.all() for covered in seen.values())


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
