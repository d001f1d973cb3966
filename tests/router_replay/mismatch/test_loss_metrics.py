"""Metrics of the losses, each by hand; over micro-batches they are those of the whole; nothing waits for the device."""

from __future__ import annotations

import functools
import math
import operator

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import LossMetrics, Responses, decoupled_loss, grpo_loss, gspo_loss
from tests.no_waiting import RefuseWaiting
from tests.router_replay.mismatch.pairs import log_ratios

NAN = math.nan
MASK = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]])
RATIOS = [1.5, 1.0, 0.5, 0.75, 1.25]
OLD = torch.full((3, 3), -8.0, dtype=torch.float64).masked_fill(MASK == 0, NAN)
RESPONSES = Responses.padded(MASK)
# Of a batch whose five tokens are in the order of RATIOS.
ADVANTAGES = [1.0, 1.0, -1.0, -2.0, -2.0]
WEIGHTS = [2.0, 0.0, 1.0, 0.5, 1.0]


def _tokens(values: list[float]) -> torch.Tensor:
    """NaN for all but response tokens."""
    full = torch.full(MASK.shape, NAN, dtype=torch.float64)
    full[MASK > 0] = torch.tensor(values, dtype=torch.float64)
    return full


CURRENT = OLD + _tokens(RATIOS).log()


def _expect(metrics: LossMetrics, **expected: float) -> None:
    """All of them, within some roundings of float64 numbers of size 1 that come from logarithms of size 8."""
    found = metrics.flat("")
    assert found == pytest.approx({**expected, "refused_tokens": 0.0}, abs=1e-14)
    for name, value in found.items():
        tensor = getattr(metrics, name)
        assert (tensor.shape, tensor.dtype, tensor.item()) == ((), torch.float64, value)
        assert not tensor.requires_grad


def _kl() -> dict[str, float]:
    logs = [math.log(ratio) for ratio in RATIOS]
    return {
        "kl_k1": -math.fsum(logs) / 5,
        "kl_k3": math.fsum(ratio - 1 - log for ratio, log in zip(RATIOS, logs, strict=True)) / 5,
    }


def test_token_metrics_by_hand():
    """Clipping at 0.8 and 1.2 stops 1.5 with a positive advantage, 0.5 and 0.75 with a negative one, 1.25 not."""
    _, metrics = grpo_loss(
        current=CURRENT.clone().requires_grad_(),
        old=OLD,
        advantages=_tokens(ADVANTAGES),
        responses=RESPONSES,
        weights=_tokens(WEIGHTS),
    )
    _expect(
        metrics,
        clipped_low=2 / 5,
        clipped_high=1 / 5,
        dropped=1 / 5,
        weight_mean=4.5 / 5,
        weight_max=2.0,
        weight_ess=4.5**2 / (5 * 6.25),
        **_kl(),
    )


def test_sides_have_bounds_of_their_own_and_a_token_on_a_bound_is_not_clipped():
    given = {"current": CURRENT, "old": OLD, "advantages": _tokens(ADVANTAGES), "responses": RESPONSES}
    low = grpo_loss(**given, clip_low=0.3, clip_high=0.6)[1]
    assert (low.clipped_low.item(), low.clipped_high.item()) == (1 / 5, 0)
    high = grpo_loss(**given, clip_low=0.6, clip_high=0.4)[1]
    assert (high.clipped_low.item(), high.clipped_high.item()) == (0, 1 / 5)
    # Ratios and bounds without rounding: log-probabilities that differ by 0.
    equal = grpo_loss(**(given | {"current": OLD}), clip_low=0.0, clip_high=0.0)[1]
    assert (equal.clipped_low.item(), equal.clipped_high.item()) == (0, 0)


def test_what_clipping_counts_is_what_has_no_gradient():
    current = CURRENT.clone().requires_grad_()
    loss, metrics = grpo_loss(
        current=current, old=OLD, advantages=_tokens(ADVANTAGES), responses=RESPONSES, clip_high=0.28
    )
    loss.backward()
    stopped = (current.grad[MASK > 0] == 0).double().mean()
    assert stopped > 0 and (metrics.clipped_low + metrics.clipped_high).item() == pytest.approx(stopped.item())


def test_without_weights_every_token_has_weight_one():
    _, metrics = grpo_loss(current=CURRENT, old=OLD, advantages=_tokens(ADVANTAGES), responses=RESPONSES)
    found = metrics.flat()
    assert [found[f"loss/{name}"] for name in ("dropped", "weight_mean", "weight_max", "weight_ess")] == [0, 1, 1, 1]


def test_what_was_taken_out_of_the_responses_is_not_among_the_dropped():
    kept = RESPONSES.keep((_tokens(WEIGHTS) > 0) & (MASK > 0))
    _, metrics = grpo_loss(
        current=CURRENT, old=OLD, advantages=_tokens(ADVANTAGES), responses=kept, weights=_tokens(WEIGHTS)
    )
    assert metrics.dropped.item() == 0 and metrics.weight_mean.item() == pytest.approx(4.5 / 4)
    assert metrics.kl_k1.item() == pytest.approx(-math.log(1.5 * 0.5 * 0.75 * 1.25) / 4)


def test_sequence_metrics_by_hand():
    """Geometric means of 0.75^(1/3) and 0.9375^(1/2); weights of a sequence are means over its tokens."""
    given = {"current": CURRENT, "old": OLD, "responses": RESPONSES, "weights": _tokens([2.0, 0.0, 1.0, 0.0, 0.0])}
    _, metrics = gspo_loss(**given, advantages=torch.tensor([-1.0, 1.0, NAN]), clip_low=0.05, clip_high=0.05)
    _expect(
        metrics,
        clipped_low=1 / 2,
        clipped_high=0,
        dropped=1 / 2,
        weight_mean=1 / 2,
        weight_max=1.0,
        weight_ess=1 / 2,
        **_kl(),
    )
    ahead = {**given, "current": OLD, "old": CURRENT}
    _, metrics = gspo_loss(**ahead, advantages=torch.tensor([-1.0, 1.0, NAN]), clip_low=0.05, clip_high=0.03)
    assert (metrics.clipped_low.item(), metrics.clipped_high.item()) == (0, 1 / 2)


def test_decoupled_weights_are_those_that_were_applied():
    """pi_prox / mu of 4, 1, 1/2, 1 and 3, capped at 2, times further weights."""
    rollout = OLD - _tokens([4.0, 1.0, 0.5, 1.0, 3.0]).log()
    _, metrics = decoupled_loss(
        log_ratios(OLD, rollout, RESPONSES),
        current=CURRENT,
        advantages=_tokens(ADVANTAGES),
        weights=_tokens([1.0, 0.0, 3.0, 1.0, 0.25]),
    )
    applied = [2.0, 0.0, 1.5, 1.0, 0.5]
    _expect(
        metrics,
        clipped_low=2 / 5,
        clipped_high=1 / 5,
        dropped=1 / 5,
        weight_mean=1.0,
        weight_max=2.0,
        weight_ess=sum(applied) ** 2 / (5 * sum(weight**2 for weight in applied)),
        **_kl(),
    )


BY_TOKEN, BY_SEQUENCE, WEIGHED = _tokens(ADVANTAGES), torch.tensor([-1.0, 1.0, 1.0]), _tokens(WEIGHTS)
LOSSES = {
    "grpo": lambda rows, responses: grpo_loss(
        current=CURRENT[rows], old=OLD[rows], advantages=BY_TOKEN[rows], responses=responses,
        weights=WEIGHED[rows],
    ),
    "gspo": lambda rows, responses: gspo_loss(
        current=CURRENT[rows], old=OLD[rows], advantages=BY_SEQUENCE[rows], responses=responses,
        weights=WEIGHED[rows], clip_low=0.05, clip_high=0.05,
    ),
    "decoupled": lambda rows, responses: decoupled_loss(
        log_ratios(OLD[rows], CURRENT[rows], responses), current=CURRENT[rows],
        advantages=BY_TOKEN[rows], weights=WEIGHED[rows],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("split", [[[0], [1], [2]], [[2], [1, 0]]])
def test_metrics_of_micro_batches_add_up_to_those_of_the_batch(name, split):
    """Of different numbers of tokens, one of them without any."""
    whole = LOSSES[name](slice(None), RESPONSES)[1].flat()
    parts = [LOSSES[name](rows, Responses.padded(MASK[rows]))[1] for rows in split]
    # Sums of the same numbers in another order.
    assert functools.reduce(operator.add, parts).flat() == pytest.approx(whole, rel=1e-14)
    assert whole["loss/weight_ess"] < 1 and whole["loss/dropped"] + whole["loss/clipped_low"] > 0


def test_nothing_has_metrics_of_zero():
    _, metrics = grpo_loss(current=OLD, old=OLD, advantages=torch.ones(3), responses=RESPONSES.keep(MASK * 0))
    assert set(metrics.flat().values()) == {0.0}
    assert LossMetrics.total([]).flat() == metrics.flat()
    LossMetrics.total([]).require()
    dropped = grpo_loss(current=OLD, old=OLD, advantages=torch.ones(3), responses=RESPONSES, weights=torch.zeros(3, 3))[
        1
    ]
    assert dropped.flat("") == {
        **dict.fromkeys(("clipped_low", "clipped_high", "weight_mean", "weight_max", "weight_ess"), 0.0),
        **{"dropped": 1.0, "kl_k1": 0.0, "kl_k3": 0.0, "refused_tokens": 0.0},
    }


def test_extremes_are_finite():
    """A token that the current policy never takes counts as a log-ratio of -300, and weights as large as they get."""
    one = Responses.padded(torch.ones(1, 2))
    current = torch.tensor([[-math.inf, -1.0]])
    weights = torch.tensor([[1e19, 3e38]])
    _, metrics = grpo_loss(
        current=current, old=torch.full((1, 2), -1.0), advantages=torch.ones(1), responses=one, weights=weights
    )
    assert metrics.kl_k1.item() == 150 and metrics.kl_k3.item() == 149.5
    assert metrics.weight_max.item() == pytest.approx(3e38) and metrics.weight_ess.item() == pytest.approx(0.5)
    assert all(math.isfinite(value) for value in (metrics + metrics).flat().values())


BAD = {
    "a NaN": lambda given: given.masked_fill(torch.arange(9).view(3, 3) == 4, NAN),
    "an infinity": lambda given: given.masked_fill(torch.arange(9).view(3, 3) == 4, math.inf),
    "probabilities": lambda given: given.exp(),
    "small probabilities": lambda given: given.exp() / 8,
}


@pytest.mark.parametrize("side", ["current", "old"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("weighted", [True, False])
def test_what_has_no_log_ratio_makes_loss_and_gradient_nan_and_is_told_before_the_step(side, kind, weighted):
    given = {"current": torch.full((3, 3), -0.1), "old": torch.full((3, 3), -0.2), "responses": RESPONSES}
    given[side] = BAD[kind](given[side])
    given["current"] = given["current"].requires_grad_()
    weights = torch.zeros(3, 3) if weighted else None
    for loss in (grpo_loss, gspo_loss):
        given["current"].grad = None
        value, metrics = loss(**given, advantages=torch.ones(3), weights=weights)
        with RefuseWaiting():
            value.backward()
        # Of the bad token itself the derivative may be that of a constant.
        others = RESPONSES.mask & (torch.arange(9).view(3, 3) != 4)
        assert value.isnan() and given["current"].grad[others].isnan().all()
        count = 5 if "probabilities" in kind else 1
        for reduced, tokens in ((metrics, 5), (LossMetrics.total([metrics, _fine()]), 10)):
            with pytest.raises(InputError, match=rf"^{count} of {tokens} response tokens of the loss have log-prob"):
                reduced.require()
            # What a logger reads raises nothing.
            assert reduced.flat()["loss/refused_tokens"] == count and math.isnan(reduced.flat()["loss/kl_k3"])


def _fine() -> LossMetrics:
    return grpo_loss(current=OLD, old=OLD, advantages=torch.ones(3), responses=RESPONSES)[1]


@pytest.mark.parametrize("denominator", [0.0, -1.0, NAN])
def test_a_denominator_on_the_device_is_not_read_and_makes_a_bad_loss_nan(denominator):
    with RefuseWaiting():
        loss = grpo_loss(
            current=OLD,
            old=OLD,
            advantages=torch.ones(3),
            responses=RESPONSES,
            denominator=torch.tensor(denominator),
        )[0]
    assert loss.isnan()


def test_the_guard_does_see_a_wait():
    for wait in (lambda: torch.ones(3).sum().item(), lambda: torch.ones(3)[torch.tensor([True, False, True])]):
        with pytest.raises(AssertionError, match="waits for the device"), RefuseWaiting():
            wait()


def test_metrics_are_made_where_nothing_can_be_read():
    """On the meta device a value that is read is an error."""
    tensors = {
        "counted": torch.ones(3, 3, dtype=torch.bool, device="meta"),
        "mask": torch.ones(3, 3, dtype=torch.bool, device="meta"),
        "refused": torch.zeros(3, 3, dtype=torch.bool, device="meta"),
        **{name: torch.ones(3, 3, device="meta") for name in ("ratio", "advantages", "weights", "log_ratio")},
    }
    metrics = LossMetrics.of(**tensors, clip=(0.2, 0.2))
    for each in (metrics, metrics + metrics):
        for name in ("clipped_low", "clipped_high", "dropped", "weight_mean", "weight_max", "weight_ess", "kl_k1"):
            assert getattr(each, name).device.type == "meta"
