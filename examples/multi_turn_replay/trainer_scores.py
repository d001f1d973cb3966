"""The trainer's log-probabilities and routes of finished conversations: once natively, once with replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.logprobs import token_logprobs
from cpu_engines.megatron.qwen3_moe import load_qwen3_moe
from examples.multi_turn_replay.rollout import Conversation
from megatron_router_replay import BatchLayout, Replay, attach
from router_replay.masks import compare_routes


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


@contextlib.contextmanager
def trainer(model_path: str | Path, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """A checkpoint in Megatron's GPTModel, on the CPU, in evaluation mode, for the length of a `with` block."""
    with CpuDevice(), single_process():
        yield load_qwen3_moe(model_path, dtype).eval()


@torch.no_grad()
def score(
    model: torch.nn.Module,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 16,
    on_batch: Callable[[str, int], None] = lambda which, count: None,
) -> Scores:
    """Score every conversation natively, then every conversation with replay.

    Args:
        on_batch: called with "native" or "replay" and the number of conversations that are done.

    Raises:
        ReplayedRoutesError: an expert under replay is not the recorded one.
        router_replay.errors.RouterReplayError: masks and model do not belong together.
    """
    batches = [conversations[at : at + batch_size] for at in range(0, len(conversations), batch_size)]
    scores = Scores([], [], [])
    with attach(model) as replay:
        for batch in batches:
            logprobs, routes = _forward(model, replay, batch, replayed=False)
            scores.native_logprobs.extend(logprobs)
            scores.native_routes.extend(routes)
            on_batch("native", len(batch))
        for batch in batches:
            logprobs, routes = _forward(model, replay, batch, replayed=True)
            _require_recorded_routes(batch, routes)
            scores.replay_logprobs.extend(logprobs)
            on_batch("replay", len(batch))
    return scores


def _forward(
    model: torch.nn.Module, replay: Replay, batch: Sequence[Conversation], *, replayed: bool
) -> tuple[list[Tensor], list[Tensor]]:
    sequences = [torch.tensor(conversation.token_ids) for conversation in batch]
    lengths = [len(sequence) for sequence in sequences]
    token_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    layout = BatchLayout.padded(token_ids, lengths)
    masks = [conversation.masks for conversation in batch]
    with replay.microbatch(masks, layout) if replayed else replay.off(), replay.observe() as observed:
        logprobs = token_logprobs(model, token_ids)
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
