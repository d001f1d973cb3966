"""What belongs in an average: tied weights, buffers, routers' biases; and what cannot be averaged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_router_replay.averages import ExponentialMovingAverage
from router_replay.errors import UnsupportedError
from tests.megatron_router_replay.averaging import Mixed, Quantised, Tied, averages, moved
from tests.megatron_router_replay.small_gpt import gpt, logits, rounding, weighted_mean


@pytest.mark.parametrize("split", [False, True])
def test_a_tied_weight_is_averaged_once(split):
    tied = Tied()
    chunks = [tied.first, tied.second] if split else tied
    ema = ExponentialMovingAverage(chunks, 0.5)
    (samples,) = moved(tied, 3, ema.update).values()
    assert list(averages(ema)) == ["chunk0.weight" if split else "first.weight"]
    (average,) = averages(ema).values()
    torch.testing.assert_close(average.double(), weighted_mean(samples, 0.5), rtol=0, atol=rounding(samples))
    before = tied.first.weight.detach().clone()
    with ema.swapped_in():
        assert torch.equal(tied.second.weight, average)
    assert torch.equal(tied.first.weight, before)


def test_what_belongs_in_an_average():
    model = Mixed()
    ema = ExponentialMovingAverage(model, 0.5)
    everything = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for tensor in everything:
            tensor += 3
    ema.update()
    assert averages(ema).keys() == {"trained", "bias"}
    with ema.swapped_in():
        # (0.5 * 0 + 3) / 1.5
        assert [int(tensor[0]) for tensor in everything] == [2, 3, 2, 3, 3]
    assert all(bool((tensor == 3).all()) for tensor in everything)


def test_a_routers_expert_bias_is_averaged_and_its_counts_are_left():
    model = gpt()
    router = model.decoder.layers[1].mlp.router
    ema = ExponentialMovingAverage(model, 0.5)
    router.expert_bias.copy_(torch.tensor([3.0, 0.0, -3.0, 6.0]))
    router.local_tokens_per_expert.fill_(7)
    ema.update()
    with ema.swapped_in():
        assert router.expert_bias.tolist() == [2.0, 0.0, -2.0, 4.0]
        assert router.local_tokens_per_expert.tolist() == [7.0] * 4
        with torch.no_grad():
            logits(model)
    assert router.expert_bias.tolist() == [3.0, 0.0, -3.0, 6.0]
    assert router.local_tokens_per_expert.tolist() == [7.0] * 4


def test_buffers_are_followed_when_the_module_replaces_them():
    model = Mixed()
    ema = ExponentialMovingAverage(model, 0.5)
    old = model.bias
    model.double()
    assert model.bias is not old
    model.bias += 3
    ema.update()
    assert averages(ema)["bias"].tolist() == [2.0, 2.0]


def test_parameters_that_are_stale_after_a_step_are_refused():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    bare = gpt()
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_param_gather=True)
    with pytest.raises(UnsupportedError, match="set overlap_param_gather=False"):
        ExponentialMovingAverage(DistributedDataParallel(bare.config, config, bare), 0.9)


def test_parameters_that_cannot_be_averaged_are_refused():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Quantised))
    with pytest.raises(UnsupportedError, match="weight is a Quantised, not a plain"):
        ExponentialMovingAverage(model, 0.9)
    with pytest.raises(UnsupportedError, match=r"the 1 model chunk\(s\) have no parameter"):
        ExponentialMovingAverage(nn.Linear(2, 2).requires_grad_(False), 0.9)
