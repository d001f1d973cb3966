"""A model of Hugging Face as the demo's trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples.multi_turn_replay.rollout import Conversation
from examples.multi_turn_replay.scores import Scores, score_with
from hf_router_replay import attach


@contextlib.contextmanager
def trainer(model_path: str | Path, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """A checkpoint in the model that transformers has for it, on the CPU, in evaluation mode."""
    yield AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()


def score(model: torch.nn.Module, conversations: Sequence[Conversation], **how: Any) -> Scores:
    """Scores of conversations natively and with replay; `how` and errors as of `score_with`."""

    def token_logprobs(token_ids: Tensor) -> Tensor:
        # Padding is behind every sequence, where causal attention keeps it unseen.
        logits = model(input_ids=token_ids, use_cache=False).logits
        chosen = logits[:, :-1].float().log_softmax(-1).gather(-1, token_ids[:, 1:, None]).squeeze(-1)
        return torch.nn.functional.pad(chosen, (1, 0))

    with attach(model) as replay:
        return score_with(replay, token_logprobs, conversations, **how)
