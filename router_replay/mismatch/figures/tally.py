"""Sums over response tokens and sequences from which the diagnostics follow: additive over batches and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks.agreement import RouteTally
from router_replay.mismatch.figures.weight_sums import WeightSums
from router_replay.mismatch.log_ratios import SATURATION, LogRatios, require_log_ratios

SUMS = (
    "log_ratio",
    "log_ratio_squared",
    "k3",
    "absolute",
    "chi2_token",
    "chi2_sequence",
    "perplexity_rollout",
    "perplexity_trainer",
    "perplexity_ratio",
    "x",
    "y",
    "xx",
    "yy",
    "xy",
)
"""Names of a tally's sums, in their order; x and y are the log-probabilities of rollout and trainer."""


@dataclass(frozen=True, eq=False)
class Tally:
    """What `router_replay.mismatch.figures.diagnostics.Diagnostics` is computed from.

    Attributes:
        taus: thresholds of F(tau).
        counts: int64 `[5 + len(taus)]`: response tokens, those with probability 0 under the trainer, sequences with
            response tokens, those of them without such a token, dropped ones; then tokens beyond each tau.
        sums: float64 `[len(SUMS)]`.
        extremes: float64 `[2]`: max log r and max -log r.
        token_weights, sequence_weights: r_t and prod_t r_t.
        routes: or None where no routes were given.
    """

    taus: tuple[float, ...]
    counts: Tensor
    sums: Tensor
    extremes: Tensor
    token_weights: WeightSums
    sequence_weights: WeightSums
    routes: RouteTally | None = None

    @classmethod
    def of(cls, ratios: LogRatios, taus: tuple[float, ...], routes: RouteTally | None = None) -> Tally:
        """Of one batch; arguments as of `router_replay.mismatch.figures.diagnostics.diagnose`.

        Of a `context_group` every rank gets that of the whole sequences, with the routes of all their tokens.
        """
        require_log_ratios(ratios)
        if min(taus, default=2.0) <= 1:
            raise InputError(f"taus must be above 1, got {list(taus)}: max(r, 1/r) is never below 1")
        responses, full = ratios.responses, ratios.double
        trainer, rollout = ratios.trainer.double(), ratios.rollout.double()
        ratio = full[responses.mask]
        possible = ratio > -torch.inf
        finite = ratio[possible].clamp(-SATURATION, SATURATION)
        # Where the trainer gives 0, KL and perplexity are infinite: such tokens are counted by themselves.
        counted = responses.counted
        all_possible = (responses.max(-full) < torch.inf) & counted
        sequences = responses.sum(full)[counted]
        mean_rollout, mean_ratio = responses.mean(rollout), responses.mean(full)
        x, y = rollout[responses.mask][possible], trainer[responses.mask][possible]
        sums = {
            "log_ratio": finite.sum(),
            "log_ratio_squared": finite.square().sum(),
            "k3": (torch.expm1(finite) - finite).sum(),
            "absolute": finite.abs().sum(),
            "chi2_token": torch.expm1(ratio.clamp(-SATURATION, SATURATION)).square().sum(),
            "chi2_sequence": torch.expm1(sequences.clamp(-SATURATION, SATURATION)).square().sum(),
            "perplexity_rollout": _perplexity(mean_rollout[counted]).sum(),
            "perplexity_trainer": _perplexity((mean_rollout + mean_ratio)[all_possible]).sum(),
            "perplexity_ratio": _perplexity(mean_ratio[all_possible]).sum(),
            "x": x.sum(),
            "y": y.sum(),
            "xx": x.square().sum(),
            "yy": y.square().sum(),
            "xy": (x * y).sum(),
        }
        counts = [responses.mask.sum(), (~possible).sum(), counted.sum(), all_possible.sum()]
        counts.append(ratios.dropped if responses.is_first else torch.zeros_like(ratios.dropped))
        none = ratio.new_full((1,), -torch.inf)
        tally = cls(
            taus=taus,
            counts=torch.cat([torch.stack(counts), _beyond(ratio, taus)]),
            sums=torch.stack([sums[name] for name in SUMS]),
            extremes=torch.stack([torch.cat([ratio, none]).max(), torch.cat([-ratio, none]).max()]),
            token_weights=WeightSums.of(ratio),
            sequence_weights=WeightSums.of(sequences),
            routes=routes,
        )
        return tally if responses.context_group is None else tally.all_reduce(responses.context_group)

    def __add__(self, other: Tally) -> Tally:
        """Both batches'; they must have the same taus, and routes both or neither."""
        if self.taus != other.taus or (self.routes is None) != (other.routes is None):
            raise InputError("tallies add up only if both have the same taus, and both have routes or neither")
        extremes = torch.maximum(self._maxima(), other._maxima())
        summed = self._relative_to(extremes) + other._relative_to(extremes)
        routes = self.routes + other.routes if self.routes and other.routes else None
        return self._combined(self.counts + other.counts, extremes, summed, routes)

    def all_reduce(self, process_group: dist.ProcessGroup) -> Tally:
        """The sum over the ranks of a group; every rank calls it, a rank without tokens too."""
        counts, extremes = self.counts.clone(), self._maxima()
        dist.all_reduce(counts, group=process_group)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=process_group)
        summed = self._relative_to(extremes)
        dist.all_reduce(summed, group=process_group)
        return self._combined(counts, extremes, summed, self.routes and self.routes.all_reduce(process_group))

    def _maxima(self) -> Tensor:
        return torch.cat([self.extremes, self.token_weights.highest, self.sequence_weights.highest])

    def _relative_to(self, maxima: Tensor) -> Tensor:
        token, sequence = maxima[2:3], maxima[3:4]
        weights = [self.token_weights.relative_to(token), self.sequence_weights.relative_to(sequence)]
        return torch.cat([self.sums, *weights])

    def _combined(self, counts: Tensor, maxima: Tensor, summed: Tensor, routes: RouteTally | None) -> Tally:
        return replace(
            self,
            counts=counts,
            sums=summed[:-4],
            extremes=maxima[:2],
            token_weights=WeightSums(maxima[2:3], summed[-4:-2]),
            sequence_weights=WeightSums(maxima[3:4], summed[-2:]),
            routes=routes,
        )


def _beyond(ratio: Tensor, taus: tuple[float, ...]) -> Tensor:
    """Numbers of log-ratios beyond each tau, in either direction: one pass, however many there are."""
    ordered = sorted(range(len(taus)), key=taus.__getitem__)
    bounds = ratio.new_tensor([math.log(taus[index]) for index in ordered])
    # With right=False an item goes to the first bound that it does not exceed: it is beyond all before.
    exceeded = torch.bucketize(ratio.abs(), bounds)
    places = torch.bincount(exceeded, minlength=len(taus) + 1).flip(0).cumsum(0).flip(0)[1:]
    return places[torch.tensor(ordered, device=ratio.device).argsort()] if taus else places


def _perplexity(mean_log: Tensor) -> Tensor:
    return (-mean_log).clamp(-SATURATION, SATURATION).exp()
