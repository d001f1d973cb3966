"""Rows that verl's agent loop and padding samples add."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import numpy as np
import pytest
import torch

# isort: split
import cpu_engines.megatron  # noqa: F401 (before anything that may import Megatron)

# isort: split
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.trainer.ppo import padding_utils

import router_replay_adapters.verl  # noqa: F401
from router_replay.errors import DataError
from router_replay_adapters.verl import padding
from router_replay_adapters.verl.unknown_rows import UnknownRows
from tests.router_replay_adapters.verl.rollout import PROMPT_LENGTH, RESPONSE_LENGTH

PROMPT, RESPONSE = [5, 6, 7], [8, 9, 10, 11, 12]


def output(rows: int, as_type: Any = np.asarray) -> AgentLoopOutput:
    """A rollout whose last generation ended before the response did: of its last tokens there are no routes."""
    routes = np.arange(rows * 2 * 2, dtype=np.int32).reshape(rows, 2, 2) % 7 + 1
    return AgentLoopOutput(
        prompt_ids=PROMPT,
        response_ids=RESPONSE,
        response_mask=[1, 1, 1, 0, 0],
        routed_experts=as_type(routes),
        metrics=AgentLoopMetrics(),
    )


def padded(worker: AgentLoopWorker, given: AgentLoopOutput, *, stock: bool = False) -> torch.Tensor:
    method = AgentLoopWorker._agent_loop_postprocess
    method = inspect.unwrap(method) if stock else method
    return asyncio.run(method(worker, given, False, raw_prompt=[])).routed_experts


@pytest.mark.parametrize("rows", [5, 7, 8])
def test_rows_that_a_sample_gets_are_unknown(rows: int) -> None:
    routes = output(rows).as_dict()["routed_experts"]
    assert routes.dtype == torch.int16 and routes.shape == (8, 2, 2)
    assert torch.equal(routes[:rows], torch.from_numpy(output(rows).routed_experts).to(torch.int16))
    assert (routes[rows:] == -1).all()


@pytest.mark.parametrize("as_type", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize("rows", [5, 7, 8])
def test_rows_that_a_padded_sample_gets_are_unknown(worker: AgentLoopWorker, rows: int, as_type: Any) -> None:
    routes = padded(worker, output(rows, as_type))
    assert routes.dtype == torch.int16 and routes.shape == (1, PROMPT_LENGTH + RESPONSE_LENGTH, 2, 2)
    start = PROMPT_LENGTH - len(PROMPT)
    known = torch.zeros(PROMPT_LENGTH + RESPONSE_LENGTH, dtype=torch.bool)
    known[start : start + rows] = True
    assert torch.equal(routes[0, known], torch.from_numpy(output(rows).routed_experts).to(torch.int16))
    assert (routes[0, ~known] == -1).all()


@pytest.mark.parametrize("as_type", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_tokens_that_teach_have_rows(worker: AgentLoopWorker, as_type: Any) -> None:
    """As where an agent loop keeps the routes of an answer that is not its last."""
    for made in (lambda given: given.as_dict(), lambda given: padded(worker, given)):
        with pytest.raises(DataError, match="teaches its token 5, and has routes of 4 of the 5 tokens in front of it"):
            made(output(4, as_type))
        given = output(4, as_type)
        given.response_mask = [1, 1, 0, 0, 0]
        made(given)


def test_samples_without_routes_get_none(worker: AgentLoopWorker) -> None:
    given = output(5)
    given.routed_experts = None
    assert "routed_experts" not in given.as_dict() and padded(worker, given) is None


def test_samples_that_fill_up_a_batch_have_no_routes() -> None:
    source = torch.ones(9, 3, 2, dtype=torch.int16)
    routes = padding_utils.build_padding_routed_experts(source, 4)
    assert routes.shape == (4, 3, 2) and routes.dtype == torch.int16 and (routes == -1).all()
    assert padding_utils.build_padding_routed_experts(None, 4) is None
    stock = inspect.unwrap(padding_utils.build_padding_routed_experts)(source, 4)
    assert (stock == 0).all()


def test_without_the_adapter_they_are_expert_0(worker: AgentLoopWorker) -> None:
    assert (inspect.unwrap(AgentLoopOutput.as_dict)(output(5))["routed_experts"][5:] == 0).all()
    assert (padded(worker, output(5), stock=True)[0, PROMPT_LENGTH + 2 :] == 0).all()


@pytest.mark.parametrize("padded_too", [False, True])
def test_how_many_rows_are_unknown_is_told_now_and_then(
    worker: AgentLoopWorker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, padded_too: bool
) -> None:
    """Of those that the server answered with, none of which is counted twice."""
    monkeypatch.setattr(padding, "_unknown_rows", UnknownRows())
    now = 1000.0
    monkeypatch.setattr("router_replay_adapters.seldom.time.monotonic", lambda: now)

    def send(*unknown: int) -> list[str]:
        caplog.clear()
        given = output(7)
        given.routed_experts[list(unknown)] = -1
        given.routed_experts[:, 0] = 0
        _ = padded(worker, given) if padded_too else given.as_dict()
        return [record.getMessage() for record in caplog.records if record.name.startswith("router_replay")]

    assert send() == []
    assert [line.partition(" are unknown")[0] for line in send(0, 3, 6)] == [
        "3 of the 14 rows of the last 2 samples of verl (21.4 %)"
    ]
    now += 599
    assert send(1) == []
    now += 2
    assert [line.partition(" are unknown")[0] for line in send(2)] == [
        "2 of the 14 rows of the last 2 samples of verl (14.3 %)"
    ]
    now += 1000
    assert send() == []
