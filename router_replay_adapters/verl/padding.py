"""Rows that verl adds to routes are unknown: where its agent loop and its padding samples put zeros, there is -1.

Zeros are expert 0, K times: the trainer would send the token to that one expert.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from router_replay_adapters.trained_rows import require_trained_rows
from router_replay_adapters.unknown import UNKNOWN
from router_replay_adapters.verl.unknown_rows import UnknownRows

_unknown_rows = UnknownRows()


def require_trained(known: int, output: Any) -> None:
    """`require_trained_rows` of verl's `AgentLoopOutput`, whose first `known` tokens have routes."""
    way_out = (
        "an agent loop of your own keeps `routed_experts` of a sample's last answer, which has the rows of its whole"
        " conversation"
    )
    require_trained_rows(known, len(output.prompt_ids) + len(output.response_ids), output.response_mask, way_out)


def around_as_dict(original: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Of `AgentLoopOutput.as_dict`: `routed_experts` has a row for every token, `int16 [prompt + response, L, K]`.

    Raises:
        DataError: tokens that teach, behind the last row.
    """

    @wraps(original)
    def as_dict(output: Any) -> dict[str, Any]:
        if output.routed_experts is not None:
            require_trained(len(output.routed_experts), output)
        result = original(output)
        if output.routed_experts is not None:
            rows = len(output.routed_experts)
            _unknown_rows.add(result["routed_experts"][:rows])
            result["routed_experts"][rows:] = UNKNOWN
        return result

    return as_dict


def around_agent_loop_postprocess(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Of `AgentLoopWorker._agent_loop_postprocess`: `int16 [1, padded prompt + padded response, L, K]`.

    Raises:
        DataError: tokens that teach, behind the last row.
    """

    @wraps(original)
    async def _agent_loop_postprocess(worker: Any, output: Any, *args: Any, **others: Any) -> Any:
        if output.routed_experts is not None:
            require_trained(len(output.routed_experts), output)
        padded = await original(worker, output, *args, **others)
        if output.routed_experts is not None:
            # Prompts are padded on the left.
            start = padded.prompt_ids.shape[1] - len(output.prompt_ids)
            added = torch.ones(padded.routed_experts.shape[1], dtype=torch.bool)
            added[start : start + len(output.routed_experts)] = False
            _unknown_rows.add(padded.routed_experts[0, ~added])
            padded.routed_experts[:, added] = UNKNOWN
        return padded

    return _agent_loop_postprocess


def around_build_padding_routed_experts(original: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """Of `build_padding_routed_experts`: the routes of a sample that fills up a batch, `int16 [tokens, L, K]`."""

    @wraps(original)
    def build_padding_routed_experts(source_routed_experts: Any, seq_len: int) -> Tensor | None:
        routes = original(source_routed_experts, seq_len)
        return None if routes is None else routes.fill_(UNKNOWN)

    return build_padding_routed_experts
