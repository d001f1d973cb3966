"""Averages of a Megatron model on two tensor-parallel ranks, against the mean of the gathered parameters by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_router_replay.averages import ExponentialMovingAverage
from tests.megatron_router_replay.small_gpt import gpt, rounding, tracked, weighted_mean
from tests.megatron_router_replay.tensor_parallel_rank import DECAY, NUM_UPDATES
from tests.rank_processes import run_ranks

RANKS = range(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks left what they saw."""
    shared = tmp_path_factory.mktemp("tensor_parallel")
    run_ranks(Path(__file__).with_name("tensor_parallel_rank.py"), shared)
    return shared


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in RANKS]


def gathered(shards: list[dict[str, Tensor]], partition_dims: dict[str, int]) -> dict[str, Tensor]:
    """Full tensors: shards joined as tensor parallelism splits them, replicas checked to be equal."""
    full = {}
    for name, first in shards[0].items():
        parts = [rank[name] for rank in shards]
        if name not in partition_dims:
            assert torch.equal(*parts), name
            full[name] = first
        elif name.endswith("linear_fc1.weight"):
            # Each rank holds rows of the gate above rows of the input that it gates.
            gates, inputs = zip(*(part.chunk(2) for part in parts), strict=True)
            full[name] = torch.cat([*gates, *inputs])
        else:
            full[name] = torch.cat(parts, partition_dims[name])
    return full


def test_averages_are_the_mean_of_the_gathered_parameters(ranks):
    dims = ranks[0]["partition_dims"]
    assert {dims[name] for name in dims} == {0, 1}
    averages = gathered([rank["averages"] for rank in ranks], dims)
    steps = [gathered([rank["trajectory"][i] for rank in ranks], dims) for i in range(NUM_UPDATES + 1)]
    assert averages.keys() == steps[0].keys()
    for name, average in averages.items():
        samples = [step[name] for step in steps]
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), weighted_mean(samples, DECAY), rtol=0, atol=rounding(samples))
        # Far from every sample, or the comparison would say little.
        assert min((average - sample).abs().max() for sample in samples) > 10 * rounding(samples), name
    for rank in ranks:
        assert rank["total_weight"] == pytest.approx((1 - DECAY ** (NUM_UPDATES + 1)) / (1 - DECAY), rel=1e-14)


@pytest.mark.parametrize("rank", RANKS)
def test_the_model_computes_with_the_averages_inside_and_is_restored(ranks, rank):
    found = ranks[rank]
    assert torch.equal(found["logits_inside"], found["logits_by_hand"])
    assert (found["logits_inside"] - found["logits_before"]).abs().max() > 1e-3
    assert torch.equal(found["logits_after"], found["logits_before"])
    last = found["trajectory"][-1]
    assert found["after_swap"].keys() == last.keys()
    for name, value in found["after_swap"].items():
        assert torch.equal(value.view(torch.int32), last[name].view(torch.int32)), name


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("source", ["from_shards", "from_own_file"])
def test_averages_survive_save_and_load(ranks, rank, source):
    state = ranks[rank][source]
    assert (state["decay"], state["total_weight"]) == (DECAY, ranks[rank]["total_weight"])
    assert state["averages"].keys() == ranks[rank]["averages"].keys()
    for name, average in state["averages"].items():
        assert torch.equal(average, ranks[rank]["averages"][name]), name


def test_saved_by_two_ranks_loaded_by_one(ranks, folder):
    from megatron.core import dist_checkpointing

    model = gpt(seed=1)
    ema = ExponentialMovingAverage(model, DECAY)
    template = {"ema": ema.sharded_state_dict(model.sharded_state_dict())}
    ema.load_state_dict(dist_checkpointing.load(template, str(folder / "checkpoint"))["ema"])
    expected = gathered([rank["averages"] for rank in ranks], ranks[0]["partition_dims"])
    state = ema.state_dict()
    assert state["total_weight"] == ranks[0]["total_weight"]
    assert state["averages"].keys() == expected.keys() == tracked(model).keys()
    for name, average in state["averages"].items():
        assert torch.equal(average, expected[name]), name
