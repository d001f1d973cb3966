"""Averages in one process: the rule, where values come from, swapping, what belongs in, and the state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megatron_router_replay.errors import AverageInUseError, AverageSourceError, AverageStateError, SeamError
from megatron_router_replay.mismatch import ExponentialMovingAverage
from tests.trainer.small_gpt import gpt, logits, rounding, weighted_mean

WEIGHT = "embedding.word_embeddings.weight"


def moved(model: nn.Module, steps: int, after_each: Callable[[], object], seed: int = 0) -> dict[str, list[Tensor]]:
    """Add noise to all parameters ``steps`` times; returns their values from before the first step on."""
    generator = torch.Generator().manual_seed(seed)
    seen = {name: [value.detach().clone()] for name, value in model.named_parameters()}
    for _ in range(steps):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.add_(torch.randn(value.shape, generator=generator))
                seen[name].append(value.clone())
        after_each()
    return seen


def averages(ema: ExponentialMovingAverage) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in ema.state_dict()["averages"].items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


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
        with pytest.raises(AverageInUseError, match="leave the block first"):
            ema.update()
        with pytest.raises(AverageInUseError, match="the averages already"), ema.swapped_in():
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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


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


class Mixed(nn.Module):
    """A trained and a frozen weight, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("count", torch.zeros(2), persistent=False)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.long))


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


def test_state_goes_through_torch_save_and_goes_on_alike():
    model = nn.Linear(5, 3)
    ema = ExponentialMovingAverage(model, 0.9)
    moved(model, 3, ema.update)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed_model = copy.deepcopy(model)
    resumed = ExponentialMovingAverage(resumed_model, 0.9)
    resumed.load_state_dict(torch.load(file))
    moved(model, 3, ema.update, seed=1)
    moved(resumed_model, 3, resumed.update, seed=1)
    assert resumed.total_weight == ema.total_weight
    assert all(torch.equal(value, averages(ema)[name]) for name, value in averages(resumed).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("total_weight"), r"lacks \['total_weight'\], it has \['averages', 'decay'\]"),
        (lambda state: state.update(decay=0.8), r"decay 0.8, this average has decay 0.9.*saved decay"),
        (lambda state: state["averages"].pop("bias"), r"has 1 averages, this model 2.*only in the model: bias"),
        (lambda state: state["averages"].update(gate=torch.zeros(1)), r"has 3 averages.*only in the state: gate"),
        (
            lambda state: state["averages"].update(bias=torch.zeros(6)),
            r"bias is float32 \[6\] in the state and float32 \[3\] in this model.*tensor-parallel size",
        ),
        (
            lambda state: state["averages"].update(bias=torch.zeros(3, dtype=torch.bfloat16)),
            r"bias is bfloat16 \[3\] in the state and float32 \[3\]",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = nn.Linear(5, 3)
    ema = ExponentialMovingAverage(model, 0.9)
    other = ExponentialMovingAverage(nn.Linear(5, 3), 0.9)
    other.update()
    state = other.state_dict()
    change(state)
    before = averages(ema)
    with pytest.raises(AverageStateError, match=message):
        ema.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in averages(ema).items())
    assert ema.total_weight == 1.0


def test_sharded_state_of_another_model_is_refused():
    ema = ExponentialMovingAverage(gpt(), 0.9)
    with pytest.raises(AverageStateError, match=r"22 of 22 averaged tensors are not.*and 18 more.*of the very model"):
        ema.sharded_state_dict(gpt().sharded_state_dict())


def test_sharded_state_of_several_chunks():
    chunks = [gpt(), gpt(seed=1)]
    ema = ExponentialMovingAverage(chunks, 0.9)
    sharded = ema.sharded_state_dict(
        {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}, prefix="proximal"
    )
    for index, chunk in enumerate(chunks):
        entry = sharded["averages"][f"chunk{index}.{WEIGHT}"]
        assert entry.key == f"proximal.{WEIGHT}"
        assert entry.data.dtype == torch.float32
        assert torch.equal(entry.data, chunk.embedding.word_embeddings.weight)


def test_sharded_state_checks_the_installed_seams(monkeypatch):
    from megatron.core.dist_checkpointing import optimizer

    model = gpt()
    ema = ExponentialMovingAverage(model, 0.9)
    monkeypatch.setattr(optimizer, "make_sharded_optimizer_tensor", lambda model_param, value: value)
    with pytest.raises(
        SeamError, match=r"make_sharded_optimizer_tensor: expected parameters \(model_param, optim_param"
    ):
        ema.sharded_state_dict(model.sharded_state_dict())


def test_parameters_that_are_stale_after_a_step_are_refused():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    bare = gpt()
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_param_gather=True)
    with pytest.raises(AverageSourceError, match="set overlap_param_gather=False"):
        ExponentialMovingAverage(DistributedDataParallel(bare.config, config, bare), 0.9)


class Quantised(Tensor):
    pass


def test_parameters_that_cannot_be_averaged_are_refused():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Quantised))
    with pytest.raises(AverageSourceError, match="weight is a Quantised, not a plain"):
        ExponentialMovingAverage(model, 0.9)
    with pytest.raises(AverageSourceError, match=r"the 1 model chunk\(s\) have no parameter"):
        ExponentialMovingAverage(nn.Linear(2, 2).requires_grad_(False), 0.9)


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
