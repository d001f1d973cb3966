"""Log-ratios of two policies' probabilities, per token, per sequence, or per sequence as a geometric mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.responses import Responses, require_responses

Level = Literal["token", "sequence", "geometric"]

LARGEST = 1e30

SATURATION = 300.0
"""In figures, ratios beyond exp(+-300) count as that: far beyond any use, and their squares still add up in float64."""


@dataclass(frozen=True, eq=False)
class LogRatios:
    """Log-ratios log r_t = log pi - log mu of response tokens, pi the trainer's policy, mu the rollout's; detached.

    It is made with `LogRatios.of`, which checks the log-probabilities; what takes it checks them no more.

    Attributes:
        trainer, rollout: log-probabilities of the sampled tokens in nats, tokens' shape, as they were given.
        responses: which tokens are response tokens, of which sequence, of which prompt.
        token: log r_t in the tokens' shape, in the wider dtype of both sides and at least float32: 0 for all but
            response tokens, -inf where the trainer's probability is 0, and at most 1e30, so that no sum of a batch
            becomes infinite and meets that.
    """

    trainer: Tensor
    rollout: Tensor
    responses: Responses
    token: Tensor

    @classmethod
    def of(cls, *, trainer: Tensor, rollout: Tensor, responses: Responses) -> LogRatios:
        """From the log-probabilities that both sides give to the tokens that the rollout sampled.

        Args:
            trainer: log-probabilities in nats under the policy that is corrected for (the old or the proximal one, or
                the one that is being optimised), tokens' shape, any float dtype.
            rollout: the same under the policy that sampled.
            responses: the tokens' sequences and prompts; what log-probabilities hold outside it is ignored.

        Raises:
            InputError: no tensors, or shapes or devices that differ; a response token has NaN or +inf, or probability
                0 under the rollout, under which it cannot have been sampled; or every value of a side is above 0 and
                one above 0.1, or one is above 0.5, which rounding does not do to logarithms of probabilities.
        """
        require_log_probabilities(trainer, rollout, responses, ("trainer", "rollout"))
        trainer, rollout = trainer.detach(), rollout.detach()
        return cls(trainer, rollout, responses, difference(trainer, rollout, responses))

    @cached_property
    def double(self) -> Tensor:
        """`token` computed and kept in float64: of the logarithm of a whole sequence float32 leaves few digits."""
        if self.token.dtype == torch.float64:
            return self.token
        return difference(self.trainer, self.rollout, self.responses, torch.float64)

    @property
    def sequence(self) -> Tensor:
        """Sum over t of log r_t for each sequence, `[S]`, 0 for those without response tokens."""
        return self.responses.sum(self.token)

    @property
    def geometric(self) -> Tensor:
        """Mean over t of log r_t for each sequence, `[S]`, 0 for those without response tokens."""
        return self.responses.mean(self.token)

    def at(self, level: Level) -> Tensor:
        """The log-ratio of a level in the tokens' shape, every token with its sequence's: `token`, sum, or mean.

        Raises:
            InputError: another level.
        """
        if level == "token":
            return self.token
        if level == "sequence":
            return self.responses.expand(self.sequence)
        if level == "geometric":
            return self.responses.expand(self.geometric)
        raise InputError(f"level must be 'token', 'sequence' or 'geometric', got {level!r}")


def require_log_ratios(ratios: object) -> None:
    """Raise InputError unless it is a `LogRatios`: log-probabilities alone do not say whose they are."""
    if not isinstance(ratios, LogRatios):
        raise InputError(
            f"ratios must be a LogRatios, got a {type(ratios).__name__}: make one with"
            " LogRatios.of(trainer=..., rollout=..., responses=...)"
        )


def log_ratio(*, current: Tensor, old: Tensor, responses: Responses) -> Tensor:
    """Log-ratio log(pi_theta / pi_old) of each response token, with gradients to both: for losses of your own.

    Args:
        current, old: log-probabilities of the sampled tokens in nats, tokens' shape, any float dtype.

    Returns:
        As `LogRatios.token`.

    Raises:
        InputError: as `LogRatios.of`, with `old` in the rollout's place.
    """
    require_log_probabilities(current, old, responses, ("current", "old"))
    return difference(current, old, responses)


def difference(
    numerator: Tensor, denominator: Tensor, responses: Responses, at_least: torch.dtype = torch.float32
) -> Tensor:
    """The log-ratio of log-probabilities that were checked; as `LogRatios.token`, with gradients to both."""
    dtype = torch.promote_types(torch.promote_types(numerator.dtype, denominator.dtype), at_least)
    # What padding holds may not reach the difference, whose gradient would be NaN, too.
    top = numerator.to(dtype).masked_fill(~responses.mask, 0)
    bottom = denominator.to(dtype).masked_fill(~responses.mask, 0)
    return (top - bottom).clamp(max=LARGEST)


def saturating_exp(log_values: Tensor) -> Tensor:
    """An exp that saturates at the square root of the dtype's largest number, and has no gradient beyond.

    An infinite one would be NaN times an advantage or weight of 0; the root leaves room for products and sums.
    """
    return log_values.clamp(max=math.log(torch.finfo(log_values.dtype).max) / 2).exp()


def exponential(log_weights: Tensor, responses: Responses) -> Tensor:
    """`saturating_exp`, 0 for all but response tokens."""
    return saturating_exp(log_weights).masked_fill(~responses.mask, 0)


def require_log_probabilities(
    numerator: Tensor, denominator: Tensor, responses: Responses, names: tuple[str, str]
) -> None:
    """Raise InputError, as `LogRatios.of`, for arguments that the caller knows by `names`; reads the device once."""
    require_responses(responses)
    responses.require(**dict(zip(names, (numerator, denominator), strict=True)))
    for name, values in zip(names, (numerator, denominator), strict=True):
        if not values.is_floating_point():
            raise InputError(f"{name} must be floating point, got {values.dtype}: it is of logarithms of probabilities")
    numerator, denominator = numerator.detach(), denominator.detach()
    top, bottom = (values.masked_fill(~responses.mask, 0) for values in (numerator, denominator))
    bad = top.isnan() | (top == torch.inf) | ~bottom.isfinite()
    # Rounding lifts the logarithm of a probability of 1 a little above 0, in bfloat16 by up to 0.25 for logits below
    # 64. Probabilities, taken for logarithms, are all above 0 even if none is large.
    positive = [
        (values > 0.5).any() | (((values > 0) | ~responses.mask).all() & (values > 0.1).any())
        for values in (top, bottom)
    ]
    # One transfer from the device, not three.
    any_bad, *too_high = torch.stack([bad.any(), *positive]).tolist()
    count = int(responses.mask.sum()) if any_bad or any(too_high) else 0
    if any_bad:
        place = tuple(bad.nonzero()[0].tolist())
        raise InputError(
            f"{int(bad.sum())} of {count} response tokens have no log-ratio; the first, at {list(place)}, has"
            f" log-probability {top[place]:g} in {names[0]} over {bottom[place]:g} in {names[1]}. A token that was"
            " sampled has a probability above 0 under the policy that sampled it: look for tokens that the mask should"
            " leave out, and for log-probabilities taken after a top-p or top-k mask that was not the sampler's"
        )
    for name, values, wrong in zip(names, (top, bottom), too_high, strict=True):
        if wrong:
            raise InputError(
                f"{int((values > 0).sum())} of {count} response tokens have a log-probability above 0 in {name}, up to"
                f" {float(values.max()):g}: pass natural logarithms of probabilities, not probabilities and not losses"
            )
