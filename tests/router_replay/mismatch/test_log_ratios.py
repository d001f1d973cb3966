"""Log-ratios: levels and precision by hand, names that cannot be swapped, and what is refused by name."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

from router_replay import mismatch
from router_replay.errors import InputError
from router_replay.masks import RouteTally, compare_routes
from router_replay.mismatch import (
    LogRatios,
    Responses,
    apply_sampling_mask,
    balance_heuristic_weights,
    decoupled_loss,
    exact_trust_region_mask,
    group_relative_advantages,
    grpo_loss,
    gspo_loss,
    log_ratio,
)
from router_replay.run import RunStep

TWO = Responses.padded(torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]))
NAN = math.nan
ROLLOUT = torch.tensor([[-2.0, -4.0, NAN], [NAN, -1.0, NAN], [NAN, NAN, NAN]])
TRAINER = ROLLOUT + torch.tensor([[0.5, -1.0, 7.0], [7.0, -math.inf, 7.0], [7.0, 7.0, 7.0]])


def test_levels_are_the_token_the_sum_and_the_mean_in_the_tokens_shape():
    ratios = LogRatios.of(trainer=TRAINER, rollout=ROLLOUT, responses=TWO)
    nothing = -math.inf
    assert ratios.token.tolist() == [[0.5, -1.0, 0.0], [0.0, nothing, 0.0], [0.0, 0.0, 0.0]]
    assert ratios.at("token") is ratios.token
    assert ratios.sequence.tolist() == [-0.5, nothing, 0.0]
    assert ratios.at("sequence").tolist() == [[-0.5, -0.5, 0.0], [0.0, nothing, 0.0], [0.0, 0.0, 0.0]]
    assert ratios.geometric.tolist() == [-0.25, nothing, 0.0]
    assert ratios.at("geometric").tolist() == [[-0.25, -0.25, 0.0], [0.0, nothing, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(InputError, match="level must be 'token', 'sequence' or 'geometric', got 'batch'"):
        ratios.at("batch")


@pytest.mark.parametrize(
    ("trainer", "rollout", "dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_dtype_is_the_wider_one_and_double_is_float64_from_the_start(trainer, rollout, dtype):
    one = Responses.padded(torch.ones(1, 1))
    ratios = LogRatios.of(
        trainer=torch.full((1, 1), -1e4, dtype=trainer), rollout=torch.full((1, 1), -0.1, dtype=rollout), responses=one
    )
    assert (ratios.token.dtype, ratios.double.dtype) == (dtype, torch.float64)
    expected = ratios.trainer.double() - ratios.rollout.double()
    assert ratios.double.equal(expected)
    # The difference in float32 is another number.
    assert ratios.token.double().equal(expected) is (dtype == torch.float64)


def test_they_are_detached_and_what_masked_tokens_hold_is_ignored():
    trainer = torch.full((1, 2), -1.0, requires_grad=True)
    ratios = LogRatios.of(trainer=trainer, rollout=trainer, responses=Responses.padded(torch.tensor([[1, 0]])))
    assert not (ratios.token.requires_grad or ratios.trainer.requires_grad or ratios.rollout.requires_grad)


SIDES = {
    *("trainer", "rollout", "current", "old", "proximal", "behaviours", "trainer_logits", "rollout_logits"),
    *("trainer_routes", "rollout_routes", "trainer_logprobs", "rollout_logprobs"),
}


def test_no_two_policies_can_be_swapped_without_notice():
    functions = {name: getattr(mismatch, name) for name in mismatch.__all__}
    functions = {name: each for name, each in functions.items() if inspect.isfunction(each)}
    functions |= {"LogRatios.of": LogRatios.of, "RouteTally.of": RouteTally.of, "RunStep.of": RunStep.of}
    functions |= {"compare_routes": compare_routes}
    named = [
        (name, parameter)
        for name, function in functions.items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name in SIDES
    ]
    assert {"LogRatios.of", "grpo_loss", "gspo_loss", "decoupled_loss", "diagnose"} <= {name for name, _ in named}
    assert [each for each in named if each[1].kind is not inspect.Parameter.KEYWORD_ONLY] == []


LOGS, ONES = -torch.ones(3, 3), torch.ones(3)
RATIOS = LogRatios.of(trainer=LOGS, rollout=LOGS, responses=TWO)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bad: LogRatios.of(trainer=bad, rollout=LOGS, responses=TWO), "trainer"),
        (lambda bad: LogRatios.of(trainer=LOGS, rollout=bad, responses=TWO), "rollout"),
        (lambda bad: log_ratio(current=bad, old=LOGS, responses=TWO), "current"),
        (lambda bad: log_ratio(current=LOGS, old=bad, responses=TWO), "old"),
        (lambda bad: grpo_loss(current=bad, old=LOGS, advantages=ONES, responses=TWO), "current"),
        (lambda bad: grpo_loss(current=LOGS, old=bad, advantages=ONES, responses=TWO), "old"),
        (lambda bad: grpo_loss(current=LOGS, old=LOGS, advantages=bad, responses=TWO), "advantages"),
        (lambda bad: grpo_loss(current=LOGS, old=LOGS, advantages=ONES, responses=TWO, weights=bad), "weights"),
        (lambda bad: gspo_loss(current=LOGS, old=bad, advantages=ONES, responses=TWO), "old"),
        (lambda bad: gspo_loss(current=LOGS, old=LOGS, advantages=bad, responses=TWO), "advantages"),
        (lambda bad: decoupled_loss(RATIOS, current=bad, advantages=ONES), "current"),
        (
            lambda bad: balance_heuristic_weights(trainer=bad, behaviours=LOGS[None], shares=ONES[:1], responses=TWO),
            "trainer",
        ),
        (
            lambda bad: balance_heuristic_weights(trainer=LOGS, behaviours=bad, shares=ONES[:1], responses=TWO),
            "behaviours",
        ),
        (
            lambda bad: exact_trust_region_mask(trainer_logits=bad, rollout_logits=LOGS[..., None], responses=TWO),
            "trainer_logits",
        ),
        (lambda bad: group_relative_advantages(bad, TWO), "rewards"),
        (lambda bad: apply_sampling_mask(bad, torch.zeros(3, 1).long()), "logits"),
    ],
)
def test_arrays_and_lists_are_named_with_the_way_out(call, message):
    for bad, kind in ((LOGS.tolist(), "list"), (LOGS.numpy(), r"numpy\.ndarray"), (np.float64(1), r"numpy\.float64")):
        with pytest.raises(InputError, match=rf"^{message} must be a torch.Tensor, got {kind}: torch.as_tensor"):
            call(bad)


@pytest.mark.parametrize(
    "call",
    [
        lambda mask: LogRatios.of(trainer=LOGS, rollout=LOGS, responses=mask),
        lambda mask: log_ratio(current=LOGS, old=LOGS, responses=mask),
        lambda mask: grpo_loss(current=LOGS, old=LOGS, advantages=ONES, responses=mask),
        lambda mask: gspo_loss(current=LOGS, old=LOGS, advantages=ONES, responses=mask),
        lambda mask: balance_heuristic_weights(trainer=LOGS, behaviours=LOGS, shares=ONES, responses=mask),
        lambda mask: exact_trust_region_mask(trainer_logits=LOGS, rollout_logits=LOGS, responses=mask),
        lambda mask: mismatch.aggregate(LOGS, mask),
        lambda mask: group_relative_advantages(ONES, mask),
        lambda mask: mismatch.doubly_robust_advantages(ONES, LOGS, LOGS, mask),
        lambda mask: mismatch.optimal_token_baseline_advantages(ONES, LOGS, LOGS, mask),
    ],
)
def test_a_mask_is_no_responses(call):
    with pytest.raises(InputError, match=r"responses must be a Responses, got a tensor \[3, 3\]: make one with"):
        call(torch.ones(3, 3))


def test_messages_name_the_argument_as_the_caller_knows_it():
    positive = torch.full((3, 3), 0.7)
    for call, name in (
        (lambda: LogRatios.of(trainer=positive, rollout=LOGS, responses=TWO), "trainer"),
        (lambda: log_ratio(current=positive, old=LOGS, responses=TWO), "current"),
    ):
        with pytest.raises(InputError, match=rf"3 of 3 response tokens have a log-probability above 0 in {name}, up"):
            call()
    with pytest.raises(InputError, match=r"at \[0, 0\], has log-probability nan in current over -1 in old"):
        log_ratio(current=LOGS * NAN, old=LOGS, responses=TWO)


@pytest.mark.parametrize(
    "takes_ratios",
    [
        mismatch.truncated_importance_weights,
        mismatch.masked_importance_weights,
        mismatch.icepop_weights,
        mismatch.self_normalized_weights,
        mismatch.catastrophic_token_veto,
        mismatch.trust_region_mask,
        mismatch.metropolis_chain,
        mismatch.diagnose,
        lambda given: mismatch.off_policy_sequence_mask(given, torch.zeros(2, 3)),
        lambda given: decoupled_loss(given, current=torch.zeros(2, 3), advantages=torch.zeros(2, 3)),
    ],
)
def test_log_probabilities_are_no_log_ratios(takes_ratios):
    with pytest.raises(InputError, match=r"ratios must be a LogRatios, got a Tensor: make one with LogRatios\.of"):
        takes_ratios(torch.zeros(2, 3))


@pytest.mark.parametrize("bounds", [[0, 2.7, 4], torch.tensor([0.0, 2.0, 4.0]), "04", None, torch.zeros(2, 2).long()])
def test_bounds_of_sequences_are_integers(bounds):
    with pytest.raises(InputError, match=r"cu_seqlens must be S \+ 1 integers"):
        Responses.packed(torch.ones(4), bounds)
