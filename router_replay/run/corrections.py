"""The corrections whose weights the report compares, with the bounds that it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.mismatch.corrections.metropolis import metropolis_chain
from router_replay.mismatch.corrections.self_normalized import self_normalized_weights
from router_replay.mismatch.corrections.weights import (
    icepop_weights,
    masked_importance_weights,
    truncated_importance_weights,
)
from router_replay.mismatch.log_ratios import Level, LogRatios

Weigh = Callable[[LogRatios], Tensor]


@dataclass(frozen=True)
class Correction:
    """A correction with its settings, under the name that the page shows.

    Attributes:
        weigh: log-ratios of trainer and rollout to weights in the tokens' shape.
        needs_groups: it compares the responses to one prompt, and refuses responses whose groups are not known.
    """

    name: str
    weigh: Weigh
    needs_groups: bool = False


def _truncated(level: Level) -> Weigh:
    return lambda ratios: truncated_importance_weights(ratios, level=level, cap=2.0)


def _masked(level: Level, lower: float, upper: float) -> Weigh:
    return lambda ratios: masked_importance_weights(ratios, level=level, lower=lower, upper=upper)


def _metropolis(ratios: LogRatios) -> Tensor:
    # The same page from the same files, whatever was drawn before.
    generator = torch.Generator().manual_seed(0)
    return metropolis_chain(ratios, level="sequence", generator=generator).multiplicity


CORRECTIONS = (
    Correction("token TIS, cap 2", _truncated("token")),
    Correction("sequence TIS, cap 2", _truncated("sequence")),
    Correction("token MIS, 0.5 to 2", _masked("token", 0.5, 2.0)),
    Correction("geometric MIS, 0.999 to 1.001", _masked("geometric", 0.999, 1.001)),
    Correction("IcePop, 0.5 to 5", lambda ratios: icepop_weights(ratios, lower=0.5, upper=5.0)),
    Correction(
        "SNIS over prompts' groups",
        lambda ratios: self_normalized_weights(ratios, level="sequence", over="group"),
        needs_groups=True,
    ),
    Correction("Metropolis, sequences", _metropolis, needs_groups=True),
)
