"""All figures of the mismatch between rollout and trainer, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks.agreement import RouteAgreement, RouteTally
from router_replay.mismatch.figures.tally import SUMS, Tally
from router_replay.mismatch.log_ratios import SATURATION, LogRatios, require_log_ratios
from router_replay.mismatch.ranks import of_all, together

DEFAULT_TAUS = (1.01, 1.1, 1.5, 2.0)


@dataclass(frozen=True)
class Diagnostics:
    """Figures over response tokens and sequences that mu, the rollout, sampled; r = pi / mu, pi the trainer's policy.

    Every expectation is over the rollout's samples, because there are no others. Ratios saturate at exp(+-300).

    Attributes:
        num_tokens: response tokens.
        num_sequences: sequences that have any.
        zero_probability_tokens: tokens that the trainer gives probability 0. KL(mu || pi) is infinite if there is one;
            k1, k2, k3, mean_abs_difference and correlation are over the others, perplexity_trainer and _ratio over the
            sequences without one (exp(300) if there is none), everything else over all.
        k1: mean of -log r: unbiased for KL(mu || pi) in nats per token, noisy, may be negative.
        k2: mean of (log r)^2 / 2: biased, of the same order, low variance.
        k3: mean of r - 1 - log r: unbiased for KL(mu || pi), never negative, less noisy. All three: Schulman,
            "Approximating KL divergence" (2020, joschu.net/blog/kl-approx.html), his r. They are not KL(pi || mu),
            which would need samples of pi.
        chi2_token, chi2_sequence: mean of (rho - 1)^2, rho = r_t or prod_t r_t: chi-squared of pi from mu, the variance
            of the importance weights.
        perplexity_rollout, perplexity_trainer, perplexity_ratio: means over sequences of exp(-mean_t log mu),
            exp(-mean_t log pi) and exp(mean_t(log mu - log pi)).
        ess_token, ess_sequence: effective sample size (sum w)^2 / sum w^2 of the weights rho, as a share of tokens or
            sequences, in (0, 1]; 1 if all weights are equal (Kong, Tech. Rep. 348, Univ. of Chicago, 1992).
        ratio_tails: F(tau) by tau: share of tokens with max(r, 1/r) > tau (arXiv 2510.11370).
        max_ratio, min_ratio: of tokens; 0 is a token of probability 0.
        mean_abs_difference: mean of abs(log r).
        correlation: Pearson's, between the log-probabilities of both sides; None where one side is constant.
        routes: how routes differ, or None where none were given.
        dropped_sequences: those that `LogRatios.of` took out; no other figure has them.
    """

    num_tokens: int
    num_sequences: int
    zero_probability_tokens: int
    k1: float
    k2: float
    k3: float
    chi2_token: float
    chi2_sequence: float
    perplexity_rollout: float
    perplexity_trainer: float
    perplexity_ratio: float
    ess_token: float
    ess_sequence: float
    ratio_tails: dict[float, float]
    max_ratio: float
    min_ratio: float
    mean_abs_difference: float
    correlation: float | None
    routes: RouteAgreement | None = None
    dropped_sequences: int = 0

    @classmethod
    def of(cls, tally: Tally) -> Diagnostics:
        """From the sums of one or more batches.

        Raises:
            InputError: there is no response token, or the trainer gives probability 0 to every one.
        """
        tokens, zeros, sequences, possible_sequences, dropped, *beyond = tally.counts.tolist()
        if tokens == 0 and dropped:
            raise InputError(
                f"every one of {dropped} responses was dropped, for log-probabilities that cannot be used: without"
                " bad_responses='drop' LogRatios.of says what is wrong with the first"
            )
        if tokens == 0:
            raise InputError("the response mask counts no token: nothing was sampled, or it is inverted")
        possible = tokens - zeros
        if possible == 0:
            raise InputError(
                f"the trainer gives probability 0 to every one of {tokens} sampled tokens: it scores other tokens"
            )
        sums = dict(zip(SUMS, tally.sums.tolist(), strict=True))
        highest, lowest = tally.extremes.tolist()
        return cls(
            num_tokens=tokens,
            num_sequences=sequences,
            zero_probability_tokens=zeros,
            k1=-sums["log_ratio"] / possible,
            k2=sums["log_ratio_squared"] / 2 / possible,
            k3=sums["k3"] / possible,
            chi2_token=sums["chi2_token"] / tokens,
            chi2_sequence=sums["chi2_sequence"] / sequences,
            perplexity_rollout=sums["perplexity_rollout"] / sequences,
            perplexity_trainer=_mean_perplexity(sums["perplexity_trainer"], possible_sequences),
            perplexity_ratio=_mean_perplexity(sums["perplexity_ratio"], possible_sequences),
            ess_token=float(tally.token_weights.effective_share(tokens)),
            ess_sequence=float(tally.sequence_weights.effective_share(sequences)),
            ratio_tails={tau: count / tokens for tau, count in zip(tally.taus, beyond, strict=True)},
            max_ratio=_ratio(highest),
            min_ratio=_ratio(-lowest) if zeros == 0 else 0.0,
            mean_abs_difference=sums["absolute"] / possible,
            correlation=_correlation(possible, *(sums[name] for name in ("x", "y", "xx", "yy", "xy"))),
            routes=tally.routes.agreement() if tally.routes else None,
            dropped_sequences=dropped,
        )

    def flat(self, prefix: str = "mismatch/", moe_layers: Sequence[int] | None = None) -> dict[str, float]:
        """Names and numbers for a metrics logger; F(2) is `f_tau/2`, what is None is left out.

        Args:
            moe_layers: decoder layers of the routes, for the names; by default they are numbered from 0 as given.
        """
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        tails, routes = named.pop("ratio_tails"), named.pop("routes")
        named |= {f"f_tau/{tau:g}": share for tau, share in tails.items()}
        if routes is not None:
            named |= {"routes/differing": routes.differing_routes, "routes/differing_tokens": routes.differing_tokens}
            layers = range(len(routes.differing_by_layer)) if moe_layers is None else moe_layers
            by_layer = zip(layers, routes.differing_by_layer, strict=True)
            named |= {f"routes/layer_{layer}": share for layer, share in by_layer}
        return {f"{prefix}{name}": float(value) for name, value in named.items() if value is not None}


def diagnose(
    ratios: LogRatios,
    *,
    taus: Sequence[float] = DEFAULT_TAUS,
    trainer_routes: Tensor | None = None,
    rollout_routes: Tensor | None = None,
    routes_valid: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Diagnostics:
    """Compare the log-probabilities, and the routes, of the tokens that the rollout sampled.

    To gather micro-batches first, add up `Tally.of(...)` of each, `all_reduce` it, and take `Diagnostics.of`.

    Args:
        taus: thresholds of F(tau), above 1.
        trainer_routes, rollout_routes: int `[T, L, K]` or `[B, T, L, K]`, the experts of any tokens (prompt tokens
            have routes, too); both or neither.
        routes_valid: bool, without the last two dimensions, False for tokens whose routes were not recorded.
        process_group: data-parallel ranks to reduce over, exactly: sums are reduced, not means. Every rank calls, with
            the same `taus` and the same layers; one without tokens passes empty tensors. What is refused on one rank
            is refused on all; log-probabilities are by `LogRatios.of`, which takes the group for that. Ranks that hold
            parts of one sequence are no part of it: they are the `context_group` of `Responses`.

    Returns:
        The same figures on every rank.

    Raises:
        InputError: taus not above 1; routes of one side only; taus or layers that differ between ranks; a process
            group with other ranks of the context group, or that the ratios were not made with; nothing to compare.
    """
    groups = require_log_ratios(ratios).groups_with(process_group)
    routes = together(lambda: _route_tally(trainer_routes, rollout_routes, routes_valid), *groups)
    _require_same(tuple(taus), routes, groups)
    tally = Tally.of(ratios, tuple(taus), routes)
    return Diagnostics.of(tally if process_group is None else tally.all_reduce(process_group))


def _route_tally(trainer: Tensor | None, rollout: Tensor | None, valid: Tensor | None) -> RouteTally | None:
    if trainer is not None and rollout is not None:
        return RouteTally.of(trainer=trainer, rollout=rollout, valid=valid)
    if trainer is not rollout:
        raise InputError("routes of one side only: give both trainer_routes and rollout_routes, or neither")
    return None


def _require_same(
    taus: tuple[float, ...], routes: RouteTally | None, groups: Sequence[dist.ProcessGroup | None]
) -> None:
    """Raise InputError on every rank of the groups unless all of them add up the same figures."""
    of_ranks = of_all((taus, None if routes is None else (len(routes.differing), routes.top_k)), *groups)
    for index, what in enumerate(("taus", "routes of (layers, top-k), None where there are none")):
        by_rank = {rank: each[index] for rank, each in of_ranks.items()}
        if len(set(by_rank.values())) > 1:
            raise InputError(
                f"ranks compare different {what}, by rank: {by_rank}. Give the same taus and routes of the same layers"
                " on every rank, those of no token where there is none"
            )


def _ratio(log_ratio: float) -> float:
    return math.exp(max(-SATURATION, min(SATURATION, log_ratio)))


def _mean_perplexity(total: float, sequences: int) -> float:
    """Infinite where no sequence has one, which saturates as ratios do."""
    return total / sequences if sequences else math.exp(SATURATION)


def _correlation(count: int, x: float, y: float, xx: float, yy: float, xy: float) -> float | None:
    x, y, xx, yy, xy = (each / count for each in (x, y, xx, yy, xy))
    variances = xx - x * x, yy - y * y
    # A constant side's variance is what rounding left of the difference, some eps of the squares.
    if variances[0] <= 1e-12 * xx or variances[1] <= 1e-12 * yy:
        return None
    return max(-1.0, min(1.0, (xy - x * y) / math.sqrt(variances[0] * variances[1])))
