"""From a step's conversations to what one forward pass takes, and what its loss needs."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from examples.grpo.centering import top_k_of
from examples.grpo.figures import packed_responses
from examples.grpo.settings import Settings
from examples.multi_turn_replay.rollout import Conversation
from megatron_router_replay import BatchLayout, Replay
from router_replay.mismatch import Responses, SamplerTopK, group_relative_advantages
from router_replay.replay.microbatch import MicrobatchRoutes


@dataclass(frozen=True, eq=False)
class Microbatch:
    """B conversations of up to T tokens, padded behind: what one forward pass takes, and what its loss needs.

    Attributes:
        token_ids: int64 `[B, T]`.
        layout: the same for replay.
        responses: which tokens the rollout sampled.
        rollout: log-probabilities of the tokens by the rollout engine, nats, `[B, T]`.
        advantages: `[B]`.
        minibatch: number of the optimizer step that it is for.
        denominator: of the sum over its conversations: those of the minibatch, over the number of its microbatches,
            since Megatron takes the mean over these.
        routes: whose experts the passes take; None for the trainer's own in each.
        top_k: the rollout engine's most probable tokens, where scores are centred.
        old: log-probabilities by the trainer's weights before the step, `[B, T]`.
        old_top_k: the same of `top_k`, `[B, T, K]`.
        entropies: of the distributions of these weights that the tokens are drawn from, `[B, T]`.
        own_routes: that the trainer took by itself when `old` was made, `[tokens, L, K]`; None where it replays.
        weights: of the loss, `[B, T]`, or None.
    """

    token_ids: Tensor
    layout: BatchLayout
    responses: Responses
    rollout: Tensor
    advantages: Tensor
    minibatch: int
    denominator: float
    routes: MicrobatchRoutes | None = None
    top_k: SamplerTopK | None = None
    old_top_k: Tensor | None = None
    old: Tensor | None = None
    entropies: Tensor | None = None
    own_routes: Tensor | None = None
    weights: Tensor | None = None


def microbatches(
    played: Sequence[Conversation], groups: Sequence[int], model: GPTModel, replay: Replay, settings: Settings
) -> list[Microbatch]:
    """In the order of the conversations; minibatches differ by one at most, whatever filters left.

    They are of whole groups where their number divides that of the problems, and filters took none.

    Args:
        groups: number of the group of each conversation.
        model: that trains on them, on whose device they are made; wrapped or not.
    """
    device = next(model.parameters()).device
    padded = partial(_padded, device=device)
    rewards = torch.tensor([float(each.correct) for each in played])
    vocab_size = get_attr_wrapped_model(model, "vocab_size")
    advantages = group_relative_advantages(rewards, packed_responses(played, groups)).to(device)
    num_minibatches = min(settings.minibatches, len(played))
    bounds = [len(played) * each // num_minibatches for each in range(num_minibatches + 1)]
    made = []
    for minibatch, (start, end) in enumerate(itertools.pairwise(bounds)):
        firsts = range(start, end, settings.microbatch)
        for first in firsts:
            part = slice(first, min(first + settings.microbatch, end))
            token_ids = padded([each.token_ids for each in played[part]], torch.int64)
            layout = BatchLayout.padded(token_ids, [len(each.token_ids) for each in played[part]])
            routes = None
            if settings.routes == "R3":
                routes = replay.place([each.masks for each in played[part]], layout)
            responses = Responses.padded(padded([each.sampled for each in played[part]], torch.bool))
            made.append(
                Microbatch(
                    token_ids=token_ids,
                    layout=layout,
                    responses=responses,
                    rollout=padded([each.rollout_logprobs for each in played[part]], torch.float32),
                    advantages=advantages[part],
                    minibatch=minibatch,
                    denominator=(end - start) / len(firsts),
                    routes=routes,
                    top_k=top_k_of(played[part], responses, settings.score_centering, vocab_size),
                )
            )
    return made


def minibatches(batches: Sequence[Microbatch]) -> Iterator[list[Microbatch]]:
    """The microbatches of each optimizer step."""
    for _, minibatch in itertools.groupby(batches, operator.attrgetter("minibatch")):
        yield list(minibatch)


def _padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype, device: torch.device) -> Tensor:
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
    return padded.to(device)
