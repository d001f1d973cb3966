"""Rows that verl's agent loop and padding samples add."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from types import SimpleNamespace
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

PROMPT, RESPONSE = [5, 6, 7], [8, 9, 10, 11, 12]
PROMPT_LENGTH, RESPONSE_LENGTH = 6, 8


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


@pytest.fixture(scope="module")
def worker(small_model: Path) -> AgentLoopWorker:
    """As far as padding needs one."""
    from transformers import AutoTokenizer

    worker = AgentLoopWorker.__new__(AgentLoopWorker)
    worker.tokenizer = AutoTokenizer.from_pretrained(small_model)
    worker.processor = worker.reward_loop_worker_handles = None
    worker.mm_processor_kwargs, worker.distillation_enabled = {}, False
    worker.rollout_config = SimpleNamespace(prompt_length=PROMPT_LENGTH, response_length=RESPONSE_LENGTH)
    return worker


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
