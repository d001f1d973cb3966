"""What a loss clipped, dropped and weighed: sums on the device that add up over micro-batches and ranks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.figures.weight_sums import WeightSums
from router_replay.mismatch.log_ratios import SATURATION
from router_replay.mismatch.ranks import together

COUNTS = ("items", "clipped_low", "clipped_high", "dropped", "tokens", "refused", "k1", "k3")
"""Names of the metrics' sums, in their order; the first four count items, the last two are sums over tokens."""


@dataclass(frozen=True, eq=False)
class LossMetrics:
    """Of one loss; detached, on the device, and made without waiting for it.

    Before the optimizer's step say `metrics.require(...)`: a loss of log-probabilities that cannot be used is NaN, and
    would make the weights NaN.

    Items are what the loss clips and weighs: response tokens, or for `gspo_loss` sequences that have any. Those of
    micro-batches and of data-parallel ranks add up, `total` and `all_reduce`, to those of the whole batch: sums are
    added, not means, so that no denominator is needed. Properties are 0-d float64 tensors; `flat` reads all
    of them in one transfer. A batch without items has 0 everywhere.

    Attributes:
        counts: float64 `[len(COUNTS)]`.
        weights: sums of the weights as they were applied: all factors, those of dropped items 0.
    """

    counts: Tensor
    weights: WeightSums

    @classmethod
    def of(
        cls,
        *,
        counted: Tensor,
        ratio: Tensor,
        advantages: Tensor,
        clip: tuple[float, float],
        weights: Tensor | None,
        log_ratio: Tensor,
        mask: Tensor,
        refused: Tensor,
    ) -> LossMetrics:
        """Of one batch.

        Args:
            counted: bool, the items that there are.
            ratio, advantages, weights: of each item, in the shape of `counted`; weights are at least 0, None is 1.
            clip: the clip range's low and high.
            log_ratio: log(pi_theta / pi_old), tokens' shape, 0 for all but response tokens.
            mask: bool, response tokens.
            refused: those with log-probabilities that are none, for which `require` raises: bool, tokens' shape.
        """
        ratio, advantages = ratio.detach(), advantages.detach()
        applied = torch.ones_like(ratio) if weights is None else weights.detach()
        applied = applied.double().masked_fill(~counted, 0)
        log_ratio = log_ratio.detach().double().clamp(-SATURATION, SATURATION)
        sums = {
            "items": counted,
            "clipped_low": counted & (ratio < 1 - clip[0]) & (advantages < 0),
            "clipped_high": counted & (ratio > 1 + clip[1]) & (advantages > 0),
            "dropped": counted & (applied == 0),
            "tokens": mask,
            "refused": refused,
            "k1": -log_ratio,
            "k3": torch.expm1(log_ratio) - log_ratio,
        }
        counts = torch.stack([sums[name].sum(dtype=torch.float64) for name in COUNTS])
        return cls(counts, WeightSums.of(applied.log().flatten()))

    @property
    def refused_tokens(self) -> Tensor:
        """Number of response tokens with log-probabilities that cannot be used, for which the loss is NaN."""
        return self._of("refused")

    @property
    def clipped_low(self) -> Tensor:
        """Share of items that clipping stops from below: ratio under 1 - clip_low, and a negative advantage."""
        return self._share("clipped_low", "items")

    @property
    def clipped_high(self) -> Tensor:
        """Share of items that clipping stops from above: ratio over 1 + clip_high, and a positive advantage."""
        return self._share("clipped_high", "items")

    @property
    def dropped(self) -> Tensor:
        """Share of items of weight 0. What `Responses.keep` took out is no item, and not among them."""
        return self._share("dropped", "items")

    @property
    def weight_mean(self) -> Tensor:
        """Mean weight of the items, dropped ones included."""
        return self.weights.total / self._of("items").clamp(min=1)

    @property
    def weight_max(self) -> Tensor:
        """The largest weight of an item."""
        return self.weights.largest

    @property
    def weight_ess(self) -> Tensor:
        """Effective sample size (sum w)^2 / sum w^2 as a share of the items, dropped ones included."""
        return self.weights.effective_share(self._of("items"))

    @property
    def kl_k1(self) -> Tensor:
        """Mean of log(pi_old / pi_theta) over response tokens, nats: estimates KL(pi_old || pi_theta), of either sign.

        Both estimates weigh all tokens alike, and let log-ratios count as +-300 where they are beyond.
        """
        return self._share("k1", "tokens")

    @property
    def kl_k3(self) -> Tensor:
        """Mean of r - 1 - log r, r = pi_theta / pi_old, over response tokens, nats: the same, never negative."""
        return self._share("k3", "tokens")

    @classmethod
    def total(cls, metrics: Iterable[LossMetrics]) -> LossMetrics:
        """Those of all of them, of one loss with the same settings; of none, on the CPU, 0 everywhere."""
        given = list(metrics)
        if given:
            return functools.reduce(operator.add, given)
        return cls(torch.zeros(len(COUNTS), dtype=torch.float64), WeightSums.of(torch.empty(0, dtype=torch.float64)))

    def require(self, *groups: dist.ProcessGroup | None) -> None:
        """Raise InputError if a token of the loss could not be used: the loss is NaN, and so is its gradient.

        Call it before `optimizer.step()`, with the metrics of all micro-batches. It waits for the device.

        Args:
            groups: whose ranks raise it together, each calling with its own metrics: the data-parallel ranks, and under
                pipeline parallelism the stages, those without a loss with `LossMetrics.total([])`. Context-parallel
                ranks have the same metrics, and metrics that were reduced need no groups.
        """
        together(self._require, *groups)

    def _require(self) -> None:
        refused, tokens = torch.stack([self._of("refused"), self._of("tokens")]).tolist()
        if refused:
            raise InputError(
                f"{refused:.0f} of {tokens:.0f} response tokens of the loss have log-probabilities that are NaN or"
                " infinite, or no logarithms of probabilities: the loss and its gradient are NaN, and an optimizer's"
                " step would make the weights NaN. LogRatios.of(trainer=current, rollout=old, responses=responses)"
                " names the first of them, and bad_responses='drop' takes their responses out"
            )

    def __add__(self, other: LossMetrics) -> LossMetrics:
        """Both batches', of one loss with the same settings."""
        return LossMetrics(self.counts + other.counts, self.weights + other.weights)

    def all_reduce(self, process_group: dist.ProcessGroup) -> LossMetrics:
        """The sum over the data-parallel ranks of a group; every rank calls it, a rank without tokens too."""
        highest = self.weights.highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=process_group)
        summed = torch.cat([self.counts, self.weights.relative_to(highest)])
        dist.all_reduce(summed, group=process_group)
        return LossMetrics(summed[:-2], WeightSums(highest, summed[-2:]))

    def flat(self, prefix: str = "loss/") -> dict[str, float]:
        """Names and numbers for a metrics logger; waits for the device once.

        NaN where `refused_tokens` is above 0, of which `require` makes an error.
        """
        values = {
            "clipped_low": self.clipped_low,
            "clipped_high": self.clipped_high,
            "dropped": self.dropped,
            "weight_mean": self.weight_mean,
            "weight_max": self.weight_max,
            "weight_ess": self.weight_ess,
            "kl_k1": self.kl_k1,
            "kl_k3": self.kl_k3,
            "refused_tokens": self.refused_tokens,
        }
        numbers = torch.stack(list(values.values())).tolist()
        return {f"{prefix}{name}": number for name, number in zip(values, numbers, strict=True)}

    def _of(self, name: str) -> Tensor:
        return self.counts[COUNTS.index(name)]

    def _share(self, name: str, of: str) -> Tensor:
        return self._of(name) / self._of(of).clamp(min=1)
