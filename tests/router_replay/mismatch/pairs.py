"""Log-ratios of a trainer and a rollout that a test holds as a pair."""

from __future__ import annotations

from torch import Tensor

from router_replay.mismatch import LogRatios, Responses


def log_ratios(trainer: Tensor, rollout: Tensor, responses: Responses) -> LogRatios:
    return LogRatios.of(trainer=trainer, rollout=rollout, responses=responses)
