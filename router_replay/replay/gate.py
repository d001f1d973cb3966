"""Which recorded tokens are to be replayed: those whose routes are not too old."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.masks import RoutingMasks
from router_replay.masks.arguments import as_integer


@dataclass(frozen=True)
class FreshWeights:
    """Replay only routes of weights that are at most `max_weight_lag` updates old.

    Under asynchronous training a rollout may have been computed by weights of several updates ago, whose routes are
    not those of the policy that is trained. A token whose weights are older, not in the list, or not named at all is
    *stale*, and the trainer routes it itself.

    Attributes:
        names: the trainer's own names of its weights in the order in which it had them, the present ones last; what a
            rollout engine was told as `weight_version`.
        max_weight_lag: 0 replays the routes of the present weights only.

    Raises:
        InputError: no names, a name twice, or a negative lag.
    """

    names: Sequence[str]
    max_weight_lag: int

    def __post_init__(self) -> None:
        listed = isinstance(self.names, Sequence) and not isinstance(self.names, str)
        if not listed or not all(isinstance(name, str) for name in self.names):
            raise InputError(
                f"names are {self.names!r}, but must be a list of the trainer's weight versions, the present one last"
            )
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "max_weight_lag", as_integer("max_weight_lag", self.max_weight_lag))
        if not self.names or len(set(self.names)) < len(self.names):
            raise InputError(
                f"weight versions {list(self.names)} must be one or more different names, the present one last"
            )
        if self.max_weight_lag < 0:
            raise InputError(f"max_weight_lag is {self.max_weight_lag}, but routes cannot be newer than the weights")

    def of(self, masks: RoutingMasks) -> Tensor:
        """Which rows are fresh, `bool [num_tokens]` on the CPU."""
        fresh = torch.zeros(masks.num_tokens, dtype=torch.bool)
        recent = set(self.names[-1 - self.max_weight_lag :])
        runs = masks.weight_versions
        if not runs:
            return fresh
        ends = [position for position, _ in runs[1:]] + [masks.end]
        for (begin, name), end in zip(runs, ends, strict=True):
            if name in recent:
                fresh[begin - masks.start : end - masks.start] = True
        return fresh
