"""Models whose parameters move, and what to read off their averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_router_replay.averages import ExponentialMovingAverage

WEIGHT = "embedding.word_embeddings.weight"


def moved(model: nn.Module, steps: int, after_each: Callable[[], object], seed: int = 0) -> dict[str, list[Tensor]]:
    """Add noise to all parameters `steps` times; returns their values from before the first step on."""
    generator = torch.Generator().manual_seed(seed)
    seen = {name: [value.detach().clone()] for name, value in model.named_parameters()}
    for _ in range(steps):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.add_(torch.randn(value.shape, generator=generator))
                seen[name].append(value.clone())
        after_each()
    return seen


def averages(ema: ExponentialMovingAverage) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in ema.state_dict()["averages"].items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


class Mixed(nn.Module):
    """A trained and a frozen weight, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("count", torch.zeros(2), persistent=False)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.long))


class Quantised(Tensor):
    pass
