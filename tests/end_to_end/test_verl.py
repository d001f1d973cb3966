"""Routes of a real server through verl's rollout code into the batch of its trainer, in both of its formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cpu_engines.sglang.server import Server
from router_replay.masks import RoutingGeometry, from_bytes, masks_from_meta_info
from tests.router_replay_adapters.verl.rollout import generate, sglang_server
from tests.sglang_router_capture.requests import prompt
from tests.small_model import serve

pytestmark = pytest.mark.timeout(900)

GEOMETRY = RoutingGeometry(num_layers=6, moe_layers=(1, 2, 3, 4, 5), num_experts=32, top_k=4)
LENGTHS = (5, 33, 120)
SAMPLED = 9


@pytest.fixture(scope="module")
def sglang_format_server(small_model: Path) -> Iterator[Server]:
    """Started with what verl asks SGLang for: its own setting, and no tokenizer."""
    flags = ("--enable-return-routed-experts", "--skip-tokenizer-init", "--max-total-tokens=2048")
    with serve(small_model, *flags) as server:
        yield server


def asked_of(server: Server, answers: list[dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """What a tokenizer manager in verl's process would do: send the request to the scheduler."""

    def ask(request: Any) -> dict[str, Any]:
        assert request.return_routed_experts
        sampling = {**request.sampling_params, "temperature": 0, "ignore_eos": True}
        tokens = sampling.pop("max_new_tokens")
        answer = server.generate(request.input_ids, tokens, sampling_params=sampling, return_routed_experts=True)
        answers.append(answer)
        return answer

    return ask


def hf_config() -> SimpleNamespace:
    return SimpleNamespace(num_hidden_layers=6, num_experts=32, num_experts_per_tok=4, mlp_only_layers=[0])


def played(server: Server, answers: list[dict[str, Any]]) -> list[tuple[list[int], Any]]:
    """Prompts, a second turn whose prefix is cached among them, and what verl's server makes of their answers."""
    verl = sglang_server(hf_config(), asked_of(server, answers))
    prompts = [prompt(length, length) for length in LENGTHS]
    found = [(each, generate(verl, each, max_tokens=SAMPLED)) for each in prompts]
    longer = prompts[-1] + found[-1][1].token_ids + prompt(1000, 21)
    return [*found, (longer, generate(verl, longer, max_tokens=SAMPLED))]


def sample(prompt_ids: list[int], output: Any) -> dict[str, Any]:
    """One sample as verl's trainer gets it; its response ends with tokens that nobody generated."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    import router_replay_adapters.verl  # noqa: F401

    response = [*output.token_ids, 7, 8]
    mask = [1] * len(output.token_ids) + [0, 0]
    return AgentLoopOutput(
        prompt_ids=prompt_ids,
        response_ids=response,
        response_mask=mask,
        routed_experts=output.routed_experts[: len(prompt_ids) + len(response)],
        metrics=AgentLoopMetrics(),
    ).as_dict()


def test_routes_of_a_server_are_in_verls_batch(
    sglang_format_server: Server, capture_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in SGLang's format are the masks of another server for the same requests; both are in their places."""
    arrays = played(sglang_format_server, [])
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    answers: list[dict[str, Any]] = []
    packed = played(capture_server, answers)
    assert answers[-1]["meta_info"]["cached_tokens"] >= LENGTHS[-1]
    for (prompt_ids, of_arrays), (_, of_masks), answer in zip(arrays, packed, answers, strict=True):
        assert of_arrays.token_ids == of_masks.token_ids == answer["output_ids"]
        masks = masks_from_meta_info(answer["meta_info"])
        in_batch = from_bytes(sample(prompt_ids, of_masks)["routing_masks"])
        assert torch.equal(in_batch.rows, masks.rows) and in_batch.token_digest == masks.token_digest
        with monkeypatch.context() as stage_1:
            stage_1.delenv("SGLANG_ROUTER_CAPTURE")
            routes = sample(prompt_ids, of_arrays)["routed_experts"]
        known = len(prompt_ids) + SAMPLED - 1
        assert masks.valid.all() and len(masks) == known
        assert routes.shape == (known + 3, 6, 4) and (routes[known:] == -1).all()
        assert (routes[:known, 0] == 0).all()
        found = np.sort(routes[:known, list(GEOMETRY.moe_layers)].numpy(), axis=-1)
        np.testing.assert_array_equal(found, np.sort(masks.indices().numpy(), axis=-1))
