"""Log-ratios of two policies' probabilities, per token, per sequence, or per sequence as a geometric mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.faults import joint_faults, require_log_probabilities
from router_replay.mismatch.responses import Responses, require_responses

Level = Literal["token", "sequence", "geometric"]

LARGEST = 1e30

SATURATION = 300.0
"""In figures, ratios beyond exp(+-300) count as that: far beyond any use, and their squares still add up in float64."""


@dataclass(frozen=True, eq=False)
class LogRatios:
    """Log-ratios log r_t = log pi - log mu of response tokens, pi the trainer's policy, mu the rollout's; detached.

    It is made with `LogRatios.of`, which checks the log-probabilities, once, and waits for the device for that; what
    takes it checks them no more, and does not wait.

    Attributes:
        trainer, rollout: log-probabilities of the sampled tokens in nats, tokens' shape, as they were given.
        responses: which tokens are response tokens, of which sequence, of which prompt.
        token: log r_t in the tokens' shape, in the wider dtype of both sides and at least float32: 0 for all but
            response tokens, -inf where the trainer's probability is 0, and at most 1e30, so that no sum of a batch
            becomes infinite and meets that.
        sequence: sum over t of log r_t for each sequence, `[S]`, 0 for those without response tokens.
        dropped: int64 0-d, responses that were taken out of `responses` for a token that cannot be used.
        told: global ranks on which a token that cannot be used is an error wherever it is found; None where none is,
            since the response is dropped.
    """

    trainer: Tensor
    rollout: Tensor
    responses: Responses
    token: Tensor
    sequence: Tensor
    dropped: Tensor
    told: frozenset[int] | None

    @classmethod
    def of(
        cls,
        *,
        trainer: Tensor,
        rollout: Tensor,
        responses: Responses,
        process_group: dist.ProcessGroup | None = None,
        bad_responses: Literal["raise", "drop"] = "raise",
    ) -> LogRatios:
        """From the log-probabilities that both sides give to the tokens that the rollout sampled.

        Args:
            trainer: log-probabilities in nats under the policy that is corrected for (the old or the proximal one, or
                the one that is being optimised), tokens' shape, any float dtype.
            rollout: the same under the policy that sampled.
            responses: the tokens' sequences and prompts; what log-probabilities hold outside it is ignored.
            process_group: data-parallel ranks, each with a batch of its own; those of the `context_group` of
                `responses` need not be named again. What is refused on one of them is raised on all, where it would
                leave the others waiting for it in their next collective. Every rank calls.
            bad_responses: "drop" takes a response with a token that cannot be used out of `responses`, all of it, and
                counts it in `dropped`; nothing waits for the device then, unless there are ranks to wait for. So it
                does with a token that the trainer gives probability 0, over which no later policy has a ratio. Go on
                with the `responses` of the result: losses and denominators, too, must not see the response. Look at
                `dropped`: of log-probabilities that are none at all every response is.

        Raises:
            InputError: no tensors, or shapes or devices that differ; a response token has NaN or +inf, or probability
                0 under the rollout, under which it cannot have been sampled; every value of a side is above 0 and one
                above 0.1, or one is above 0.5, which rounding does not do to logarithms of probabilities; or a process
                group with other ranks of the context group.
        """
        require_responses(responses)
        names = ("trainer", "rollout")
        if bad_responses not in ("raise", "drop"):
            raise InputError(f"bad_responses must be 'raise' or 'drop', got {bad_responses!r}")
        if bad_responses == "raise":
            require_log_probabilities(trainer, rollout, responses, names, process_group)
            dropped = responses.lengths.new_zeros(())
            told = frozenset(() if process_group is None else dist.get_process_group_ranks(process_group))
        else:
            faults = joint_faults(trainer, rollout, responses, names, responses.groups_with(process_group))
            tokens = faults.tokens | (faults.sides[0] == -torch.inf)
            bad = responses.max(tokens.float()) > 0
            responses, dropped, told = responses.keep(~responses.expand(bad)), bad.sum(), None
        trainer, rollout = trainer.detach(), rollout.detach()
        token = difference(trainer, rollout, responses)
        return cls(trainer, rollout, responses, token, responses.sum(token), dropped, told)

    def groups_with(
        self, process_group: dist.ProcessGroup | None
    ) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """The data-parallel ranks, and the `context_group`: the two groups over which a batch is joined.

        Raises:
            InputError: the first have other ranks of the second among them; or they are not those that these ratios
                were made with, so that a bad token on one of them leaves the others waiting.
        """
        groups = self.responses.groups_with(process_group)
        if process_group is not None and self.told is not None:
            ranks = dist.get_process_group_ranks(process_group)
            if len(ranks) > 1 and not self.told.issuperset(ranks):
                raise InputError(
                    f"these ratios were made with ranks {sorted(self.told)}, and are now joined over ranks {ranks}: a"
                    " token that cannot be used raises on its own rank alone, and the others wait for it; give"
                    " LogRatios.of the same process_group"
                )
        return groups

    @cached_property
    def double(self) -> Tensor:
        """`token` computed and kept in float64: of the logarithm of a whole sequence float32 leaves few digits."""
        if self.token.dtype == torch.float64:
            return self.token
        return difference(self.trainer, self.rollout, self.responses, torch.float64)

    @property
    def geometric(self) -> Tensor:
        """Mean over t of log r_t for each sequence, `[S]`, 0 for those without response tokens."""
        return self.sequence / self.responses.lengths.clamp(min=1)

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


def require_log_ratios(ratios: object) -> LogRatios:
    """The same, or InputError unless it is a `LogRatios`: log-probabilities alone do not say whose they are."""
    if not isinstance(ratios, LogRatios):
        raise InputError(
            f"ratios must be a LogRatios, got a {type(ratios).__name__}: make one with"
            " LogRatios.of(trainer=..., rollout=..., responses=...)"
        )
    return ratios


def log_ratio(*, current: Tensor, old: Tensor, responses: Responses) -> Tensor:
    """Log-ratio log(pi_theta / pi_old) of each response token, with gradients to both: for losses of your own.

    It waits for the device, to check the log-probabilities; the losses of this package do not.

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
