"""What all weights and masks have in common: shape, dtype, no gradient, 0 for padding, and the extremes of ratios."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch import (
    Responses,
    balance_heuristic_weights,
    catastrophic_token_veto,
    icepop_weights,
    log_ratio,
    masked_importance_weights,
    off_policy_sequence_mask,
    self_normalized_weights,
    truncated_importance_weights,
    trust_region_mask,
)
from tests.router_replay.mismatch.pairs import log_ratios


def _of(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    return lambda trainer, rollout, responses: function(log_ratios(trainer, rollout, responses), **options)


def _balance(trainer: Tensor, rollout: Tensor, responses: Responses, **options) -> Tensor:
    shares = torch.ones(1)
    return balance_heuristic_weights(
        trainer=trainer, behaviours=rollout[None], shares=shares, responses=responses, **options
    )


ALL: dict[str, Callable[..., Tensor]] = {
    "tis": _of(truncated_importance_weights),
    "tis of sequences": _of(truncated_importance_weights, level="sequence"),
    "tis geometric": _of(truncated_importance_weights, level="geometric"),
    "mis": _of(masked_importance_weights, upper=math.inf),
    "icepop": _of(icepop_weights),
    "snis": _of(self_normalized_weights),
    "snis of tokens": _of(self_normalized_weights, level="token", over="batch"),
    "balance": _balance,
    "balance of tokens": lambda *given: _balance(*given, level="token"),
    "veto": _of(catastrophic_token_veto),
    "off-policy": lambda t, r, responses: off_policy_sequence_mask(log_ratios(t, r, responses), -torch.ones(r.shape)),
    "trust region": _of(trust_region_mask, max_k2=1.0, mean_k3=0.05),
}
MASKS = ("veto", "off-policy", "trust region")


def _batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Responses]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    mask[2] = False
    rollout = -2 * torch.rand(6, 5, generator=generator) - 1
    trainer = rollout + 0.3 * torch.randn(6, 5, generator=generator)
    given = (each.to(dtype).masked_fill(~mask, math.nan) for each in (trainer, rollout))
    return (*given, Responses.padded(mask, [0, 1, 0, 0, 1, 1]))


@pytest.mark.parametrize("name", ALL)
def test_padding_holds_anything_and_gets_nothing_and_no_gradient_flows(name):
    trainer, rollout, responses = _batch()
    found = ALL[name](trainer.requires_grad_(), rollout.requires_grad_(), responses)
    assert found.shape == responses.mask.shape and not found.requires_grad
    assert not found[~responses.mask].any() and found[responses.mask].any() and not found.isnan().any()
    assert found.dtype == (torch.bool if name in MASKS else torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_packed_tokens_get_what_padded_ones_get(name):
    trainer, rollout, responses = _batch()
    expected = ALL[name](trainer, rollout, responses)
    kept = torch.ones(6, 5, dtype=torch.bool)
    # Rows of different lengths: the last columns are cut where no response reaches them.
    kept[:, 3:] = responses.mask[:, 3:]
    bounds = [0, *kept.sum(-1).cumsum(0).tolist()]
    packed = Responses.packed(responses.mask[kept], bounds, [0, 1, 0, 0, 1, 1])
    found = ALL[name](trainer[kept], rollout[kept], packed)
    # Sums of five numbers in another order.
    torch.testing.assert_close(found.double(), expected[kept].double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_computed_in_float32(name):
    trainer, rollout, responses = _batch(torch.bfloat16)
    found = ALL[name](trainer, rollout, responses)
    assert found.dtype == (torch.bool if name in MASKS else torch.float32)
    assert found.equal(ALL[name](trainer.float(), rollout.float(), responses))


@pytest.mark.parametrize("name", ALL)
def test_a_token_that_the_trainer_never_takes_gets_no_weight(name):
    trainer, rollout, responses = _batch()
    trainer[0, responses.mask[0]] = -math.inf
    found = ALL[name](trainer, rollout, responses)
    assert not found[0].any() and not found.isnan().any() and found[1].any()


@pytest.mark.parametrize("name", [each for each in ALL if each not in MASKS])
def test_weights_beyond_the_range_of_floats_saturate(name):
    trainer, rollout = torch.full((2, 2), -1.0), torch.full((2, 2), -2000.0)
    assert ALL[name](trainer, rollout, Responses.padded(torch.ones(2, 2), [0, 0])).isfinite().all()
    one = Responses.padded(torch.ones(2, 2))
    # Room for products and sums of them.
    saturated = truncated_importance_weights(log_ratios(trainer, rollout, one), cap=math.inf)
    assert (saturated > 1e19).all() and (1e6 * saturated).sum().isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *given: truncated_importance_weights(log_ratios(*given), cap=0.0), "cap"),
        (lambda *given: truncated_importance_weights(log_ratios(*given), cap=math.nan), "cap"),
        (lambda *given: truncated_importance_weights(log_ratios(*given), level="batch"), "level must be"),
        (lambda *given: masked_importance_weights(log_ratios(*given), lower=2.0, upper=1.0), "bounds"),
        (lambda *given: masked_importance_weights(log_ratios(*given), lower=-1.0), "bounds"),
        (lambda *given: masked_importance_weights(log_ratios(*given), lower=0.0, upper=0.0), "bounds"),
    ],
)
def test_bounds_out_of_order_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(*_batch())


def test_the_log_ratio_has_a_gradient_of_plus_and_minus_one_on_response_tokens():
    trainer, rollout, responses = _batch()
    log_ratio(current=trainer.requires_grad_(), old=rollout.requires_grad_(), responses=responses).sum().backward()
    assert trainer.grad.equal(responses.mask.double()) and rollout.grad.equal(-responses.mask.double())


def test_no_weight_exceeds_the_cap():
    """The cap's float32 logarithm, exponentiated, may round to more than the cap."""
    far = torch.full((1, 1), -1.0), torch.full((1, 1), -9.0), Responses.padded(torch.ones(1, 1))
    caps = torch.arange(10, 1000) / 100
    weights = torch.cat([truncated_importance_weights(log_ratios(*far), cap=cap) for cap in caps.tolist()]).flatten()
    # Below by a few eps of the logarithm is rounding, above would be another bound.
    torch.testing.assert_close(weights, caps, rtol=4 * 1.2e-7, atol=0)
    assert (weights <= caps).all()
