"""Megatron-Core as the demo's trainer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.logprobs import token_logprobs
from cpu_engines.megatron.qwen3_moe import load_qwen3_moe
from examples.multi_turn_replay.rollout import Conversation
from examples.multi_turn_replay.scores import Scores, score_with
from megatron_router_replay import attach


@contextlib.contextmanager
def trainer(model_path: str | Path, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """A checkpoint in Megatron's GPTModel, on the CPU, in evaluation mode, for the length of a `with` block."""
    with CpuDevice(), single_process():
        yield load_qwen3_moe(model_path, dtype).eval()


def score(model: torch.nn.Module, conversations: Sequence[Conversation], **how: Any) -> Scores:
    """Scores of conversations natively and with replay; `how` and errors as of `score_with`."""
    with attach(model) as replay:
        return score_with(replay, functools.partial(token_logprobs, model), conversations, **how)
