"""A router of a few lines that asks the binding for its experts, and batches for it; no trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from router_replay.replay import ObservedRoutes, place
from router_replay.replay.binding import current
from router_replay.replay.bound_pass import BoundPass
from router_replay.replay.choice import replayed_experts
from tests.router_replay.replay.batches import GEOMETRY, padded, recorded


@dataclass(eq=False)
class Replay:
    attached: bool = True
    observer: ObservedRoutes | None = None


class Router(nn.Module):
    """Decoder layer 1: experts by the binding, gates by its own scores; keeps every choice that it made."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(8, GEOMETRY.num_experts, generator=generator))
        self.experts = nn.Parameter(torch.randn(GEOMETRY.num_experts, 8, generator=generator))
        self.replay = replay
        self.seen: list[tuple[bool, Tensor]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        state = current()
        scores = hidden @ self.weight
        binding = state.bindings[self.replay]
        assert isinstance(binding, BoundPass) and binding.routes is not None
        experts = replayed_experts(binding.routes, state, 1, self, scores, lambda of: of.topk(3).indices)
        self.seen.append((state.recomputing, experts))
        gates = scores.gather(1, experts).softmax(1)
        return hidden + (gates[..., None] * self.experts[experts]).sum(1)


def microbatch(seed: int) -> BoundPass:
    ids, masks, _ = recorded([6, 3], seed)
    return BoundPass(place(masks, padded(ids), GEOMETRY, torch.device("cpu")))


def inputs() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
