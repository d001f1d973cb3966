"""Averages in one process: the rule, where values come from, and swapping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_router_replay.averages import ExponentialMovingAverage
from router_replay.errors import CallOrderError
from tests.megatron_router_replay.averaging import WEIGHT, averages, moved, same_bits
from tests.megatron_router_replay.small_gpt import gpt, logits, rounding, weighted_mean


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("steps", [0, 1, 12])
def test_warm_up_is_the_weighted_mean_of_all_values_seen(decay, steps):
    model = nn.Linear(5, 3)
    ema = ExponentialMovingAverage(model, decay)
    for name, samples in moved(model, steps, ema.update).items():
        average = averages(ema)[name]
        torch.testing.assert_close(average.double(), weighted_mean(samples, decay), rtol=0, atol=rounding(samples))
    # Adam's correction: after t updates on top of the first value, 1 / w = (1 - b) / (1 - b^(t+1)).
    assert ema.total_weight == pytest.approx((1 - decay ** (steps + 1)) / (1 - decay), rel=1e-13)


def test_without_warm_up_the_first_value_keeps_its_weight():
    model = nn.Linear(5, 3)
    ema = ExponentialMovingAverage(model, 0.9, warm_up=False)
    for name, samples in moved(model, 12, ema.update).items():
        # average += (1 - b) (p - average) leaves b^t to p_0 and (1 - b) b^(t-i) to p_i, as if p_0 weighed 1 / (1 - b).
        expected = weighted_mean(samples, 0.9, first_weight=1 / (1 - 0.9))
        torch.testing.assert_close(averages(ema)[name].double(), expected, rtol=0, atol=rounding(samples))
    assert ema.total_weight == pytest.approx(10, rel=1e-13)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        ExponentialMovingAverage(nn.Linear(2, 2), decay)


def bf16_training(*, distributed: bool, learning_rate: float):
    """Megatron's wrappers and optimizer around a bfloat16 model, and a function that takes one step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    bare = gpt(dtype=torch.bfloat16)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    model = DistributedDataParallel(bare.config, ddp_config, Float16Module(bare.config, bare))
    config = OptimizerConfig(
        optimizer="adam",
        lr=learning_rate,
        weight_decay=0.0,
        clip_grad=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, [model])

    def step() -> None:
        model.zero_grad_buffer()
        logits(model).square().mean().backward()
        assert optimizer.step()[0]

    return model, bare, step


def test_main_parameters_are_averaged_where_bfloat16_stands_still():
    # Adam moves a weight by about the learning rate, 2e-6; half a bfloat16 unit of a norm's weight, 1, is 2e-3.
    model, bare, step = bf16_training(distributed=False, learning_rate=2e-6)
    ema = ExponentialMovingAverage(model, 0.5)
    assert ema.uses_main_params
    parameters = dict(bare.named_parameters())
    samples = {name: [value.main_param.detach().clone()] for name, value in parameters.items()}
    for _ in range(4):
        step()
        ema.update()
        for name, value in parameters.items():
            samples[name].append(value.main_param.detach().clone())
    for name, seen in samples.items():
        expected = weighted_mean(seen, 0.5)
        torch.testing.assert_close(averages(ema)[name].double(), expected, rtol=0, atol=rounding(seen))
    norm = bare.decoder.final_layernorm.weight
    assert (norm == 1).all()
    assert not (averages(ema)["decoder.final_layernorm.weight"] == 1).any()


def test_the_distributed_optimizers_slices_are_not_taken_for_parameters():
    model, bare, step = bf16_training(distributed=True, learning_rate=1e-2)
    ema = ExponentialMovingAverage(model, 0.5)
    weight = bare.embedding.word_embeddings.weight
    assert weight.main_param.shape != weight.shape and not ema.uses_main_params
    samples = [weight.detach().clone()]
    for _ in range(3):
        step()
        ema.update()
        samples.append(weight.detach().clone())
    torch.testing.assert_close(
        averages(ema)[WEIGHT].double(), weighted_mean(samples, 0.5), rtol=0, atol=rounding(samples)
    )


def test_one_parameter_without_a_main_parameter_decides_for_all():
    """A layer-wise optimizer gives main parameters to their owner alone: replicas must not differ by that."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    for value in model[0].parameters():
        value.main_param = value.detach().float() + 1
    ema = ExponentialMovingAverage(model, 0.5)
    assert not ema.uses_main_params
    assert torch.equal(averages(ema)["0.weight"], model[0].weight.float())
    for value in model[1].parameters():
        value.main_param = value.detach().float() + 1
    ema.update()
    assert ema.uses_main_params
    expected = model[0].weight.double() + 1 / 1.5
    torch.testing.assert_close(averages(ema)["0.weight"].double(), expected, rtol=0, atol=4 * 2**-24 * 2)


@pytest.mark.parametrize("fails", [False, True])
def test_swapping_in_is_in_place_and_restores_every_bit(fails):
    model, bare, step = bf16_training(distributed=True, learning_rate=1e-2)
    ema = ExponentialMovingAverage(model, 0.5)
    step()
    ema.update()
    parameters = dict(bare.named_parameters())
    with torch.no_grad():
        # A NaN with a payload, an infinity and a negative zero: what arithmetic would not bring back.
        bits = torch.tensor([0x7FA5, 0x7F80, -0x8000], dtype=torch.int16)
        parameters[WEIGHT].view(-1)[:3] = bits.view(torch.bfloat16)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    addresses = {name: value.data_ptr() for name, value in parameters.items()}
    expected = {name: averages(ema)[name].bfloat16() for name in parameters}
    assert any(not same_bits(expected[name], before[name]) for name in parameters)

    def use() -> None:
        with ema.swapped_in():
            for name, value in bare.named_parameters():
                assert value is parameters[name] and value.data_ptr() == addresses[name] and value.requires_grad
                assert same_bits(value.detach(), expected[name]), name
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    for name, value in bare.named_parameters():
        assert value is parameters[name] and value.data_ptr() == addresses[name]
        assert same_bits(value.detach(), before[name]), name
    with ema.swapped_in():  # not in use any more
        pass


def test_no_update_and_no_second_swap_inside():
    model = nn.Linear(3, 2)
    ema = ExponentialMovingAverage(model, 0.5)
    moved(model, 2, ema.update)
    before, state = model.weight.detach().clone(), averages(ema)
    with ema.swapped_in():
        with pytest.raises(CallOrderError, match="leave the block first"):
            ema.update()
        with pytest.raises(CallOrderError, match="the averages already"), ema.swapped_in():
            pass
        assert torch.equal(model.weight, state["weight"])
    assert torch.equal(model.weight, before)
    assert all(torch.equal(value, state[name]) for name, value in averages(ema).items())
    assert ema.total_weight == 1.75
    ema.update()


def test_a_backward_pass_across_the_swap_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    ema = ExponentialMovingAverage(model, 0.5)
    moved(model, 1, ema.update)
    loss = model(torch.ones(1, 3)).sum()
    with ema.swapped_in():
        inside = model(torch.ones(1, 3)).sum()
    for graph in (loss, inside):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()


def test_update_and_swap_never_wait_for_the_device():
    """Tensors on "meta" have no values: whatever reads one on the host fails on them."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())
    with pytest.raises(RuntimeError):
        model[0].weight.sum().item()
    ema = ExponentialMovingAverage(model, 0.9)
    ema.update()
    with ema.swapped_in():
        pass


def test_proximal_policy_of_ppo_ewma():
    """The policy that clips is the running mean: weights b w / (b w + 1) and 1 / (b w + 1), as PPO-EWMA states it."""
    model, decay = gpt(), 0.8
    proximal, total_weight = gpt(), 1.0
    ema = ExponentialMovingAverage(model, decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    actions = torch.arange(16).view(2, 8)[..., None]
    advantages = torch.linspace(-1, 1, 16).view(2, 8, 1)
    for _ in range(4):
        with ema.swapped_in(), torch.no_grad():
            proximal_logprobs = logits(model).log_softmax(-1).gather(-1, actions)
        with torch.no_grad():
            expected = logits(proximal).log_softmax(-1).gather(-1, actions)
        # 4 updates of weights below 1 leave them within 7 * 4 * 2^-24 of each other; 64 bounds the model's slope.
        torch.testing.assert_close(proximal_logprobs, expected, rtol=0, atol=64 * 7 * 4 * 2**-24)
        logprobs = logits(model).log_softmax(-1).gather(-1, actions)
        ratio = (logprobs - proximal_logprobs).exp()
        optimizer.zero_grad()
        (-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).mean().backward()
        optimizer.step()
        ema.update()
        new_weight = decay * total_weight + 1
        with torch.no_grad():
            for average, value in zip(proximal.parameters(), model.parameters(), strict=True):
                average.mul_(decay * total_weight / new_weight).add_(value / new_weight)
        total_weight = new_weight
    assert (proximal_logprobs - logprobs).abs().max() > 1e-2
