"""A trainer's log-probabilities and routes of finished conversations: once natively, once with replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.multi_turn_replay.rollout import Conversation
from router_replay.masks import compare_routes
from router_replay.replay import BatchLayout
from router_replay.replay.attached import AttachedReplay

TokenLogprobs = Callable[[Tensor], Tensor]
"""Token ids `[B, S]`, padded on the right, to the log-probability of each token given those before it, `[B, S]`."""
OnBatch = Callable[[str, int], None]
"""Told of "native" or "replay", and of the number of conversations that are done."""


class ReplayedRoutesError(AssertionError):
    """Under replay, the trainer took other experts than the rollout."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Per conversation of n tokens and L MoE layers.

    Attributes:
        native_logprobs, replay_logprobs: float32 `[n]` in nats, place t for token t.
        native_routes: int64 `[n, L, K]`, the experts that the trainer chose by itself.
    """

    native_logprobs: list[Tensor]
    replay_logprobs: list[Tensor]
    native_routes: list[Tensor]


@torch.no_grad()
def score_with(
    replay: AttachedReplay,
    token_logprobs: TokenLogprobs,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 16,
    on_batch: OnBatch = lambda which, count: None,
) -> Scores:
    """Score every conversation natively, then every conversation with replay.

    Args:
        token_logprobs: of the model that `replay` is attached to.

    Raises:
        ReplayedRoutesError: an expert under replay is not the recorded one.
        router_replay.errors.RouterReplayError: masks and model do not belong together.
    """
    batches = [conversations[at : at + batch_size] for at in range(0, len(conversations), batch_size)]
    scores = Scores([], [], [])
    for batch in batches:
        logprobs, routes = _forward(replay, token_logprobs, batch, replayed=False)
        scores.native_logprobs.extend(logprobs)
        scores.native_routes.extend(routes)
        on_batch("native", len(batch))
    for batch in batches:
        logprobs, routes = _forward(replay, token_logprobs, batch, replayed=True)
        _require_recorded_routes(batch, routes)
        scores.replay_logprobs.extend(logprobs)
        on_batch("replay", len(batch))
    replay.check()
    return scores


def _forward(
    replay: AttachedReplay, token_logprobs: TokenLogprobs, batch: Sequence[Conversation], *, replayed: bool
) -> tuple[list[Tensor], list[Tensor]]:
    sequences = [torch.tensor(conversation.token_ids) for conversation in batch]
    lengths = [len(sequence) for sequence in sequences]
    token_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    layout = BatchLayout.padded(token_ids, lengths)
    masks = [conversation.masks for conversation in batch]
    with replay.microbatch(masks, layout) if replayed else replay.off(), replay.observe() as observed:
        logprobs = token_logprobs(token_ids)
    return [row[:length] for row, length in zip(logprobs, lengths, strict=True)], observed.indices(layout)


def _require_recorded_routes(batch: Sequence[Conversation], routes: Sequence[Tensor]) -> None:
    for conversation, taken in zip(batch, routes, strict=True):
        masks = conversation.masks
        agreement = compare_routes(trainer=taken[: masks.num_tokens], rollout=masks.indices(), valid=masks.valid)
        if agreement.differing_routes > 0:
            raise ReplayedRoutesError(
                f"under replay, {agreement.differing_routes:.1%} of the trainer's (token, layer) routes are not those "
                f"that the rollout recorded, over {agreement.num_tokens} tokens: replay is broken, do not train with it"
            )
