"""Policies over three tokens, small enough to list every response, so that expectations are sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from router_replay.mismatch import Responses

END = 2
Context = tuple[int, ...]
Policy = dict[Context, tuple[float, ...]]
"""Probabilities of tokens 0, 1 and END after each context."""


def contexts(longest: int) -> list[Context]:
    """All prefixes after which another token is sampled: without END, shorter than the longest response."""
    return [each for length in range(longest) for each in itertools.product(range(END), repeat=length)]


def responses_of(longest: int) -> list[Context]:
    """All responses: up to END, or cut at the longest."""
    ended = [(*context, END) for context in contexts(longest)]
    return ended + [(*context, token) for context in contexts(longest)[-(END ** (longest - 1)) :] for token in (0, 1)]


def random_policy(seed: int, longest: int, spread: float = 1.0) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    draws = {
        context: spread * torch.randn(3, dtype=torch.float64, generator=generator) for context in contexts(longest)
    }
    return {context: tuple(draw.softmax(-1).tolist()) for context, draw in draws.items()}


def without(policy: Policy, excluded: Callable[[Context, int], bool]) -> Policy:
    """The policy under a mask that leaves tokens out, normalised again."""
    masked = {}
    for context, row in policy.items():
        kept = [0.0 if excluded(context, token) else p for token, p in enumerate(row)]
        masked[context] = tuple(p / sum(kept) for p in kept)
    return masked


def probability(policy: Policy, tokens: Context) -> float:
    return math.prod(policy[tokens[:at]][token] for at, token in enumerate(tokens))


def table(policy: Policy, rows: Sequence[Context], longest: int) -> Tensor:
    """Log-probabilities of the rows' tokens, float64 `[S, longest]`; NaN past the end, which nothing may read."""
    log = [[math.log(p) if p > 0 else -math.inf for p in _each(policy, tokens)] for tokens in rows]
    return torch.tensor([row + [math.nan] * (longest - len(row)) for row in log], dtype=torch.float64)


def batch(rows: Sequence[Context], longest: int, group_ids: Sequence[int] | None = None) -> Responses:
    mask = [[at < len(tokens) for at in range(longest)] for tokens in rows]
    return Responses.padded(torch.tensor(mask), group_ids)


def _each(policy: Policy, tokens: Context) -> list[float]:
    return [policy[tokens[:at]][token] for at, token in enumerate(tokens)]
