"""Two ranks of one model, or two models: rows are those of the tokens, whichever rank computed or answers them.

One server a test, and every check of its configuration on that server: they take most of a minute to start.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from cpu_engines.sglang.server import TWO_RANKS, Server
from router_replay.masks import RoutingMasks
from tests.sglang_router_capture.oracle import assert_rows_are_of
from tests.sglang_router_capture.requests import END, generate, masks_of, prompt
from tests.small_model import serve

pytestmark = pytest.mark.timeout(900)

ON = "router capture is on: format masks, codec rank, store inline:, 5 MoE layers"
OTHER_RANK = "router capture: this rank answers no request and records nothing"


@pytest.fixture(scope="module")
def reference(small_model: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.float32)


@contextlib.contextmanager
def serving(model: Path, *flags: str) -> Iterator[Server]:
    """A server of two ranks with small chunks, and a pool that a few requests fill."""
    flags += ("--enable-router-capture", "--skip-tokenizer-init", "--chunked-prefill-size=64")
    # So little conservatism admits more requests than the pool can hold to their end: some are retracted.
    flags += ("--max-total-tokens=1024", "--schedule-conservativeness=0.1")
    with serve(model, *flags, environment=TWO_RANKS, timeout_s=600) as server:
        yield server


def abort(server: Server, request_id: str) -> None:
    body = json.dumps({"rid": request_id}).encode()
    request = urllib.request.Request(server.url + "/abort_request", body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60):
        return


def checked(reference: Qwen3MoeForCausalLM, answer: dict[str, Any], ids: list[int]) -> RoutingMasks:
    """The answer's masks: a valid row of every token that was computed, each that of its token."""
    masks = masks_of(answer, ids)
    assert (masks.start, masks.end) == (0, len(ids) + len(answer["output_ids"]) - 1)
    assert_rows_are_of(reference, masks, ids + answer["output_ids"])
    return masks


def check_turns(server: Server, reference: Qwen3MoeForCausalLM, seed: int = 10, **fields: Any) -> None:
    """A prompt of several chunks, then a turn whose prefix is cached: the same rows, not others as good."""
    ids = prompt(seed, 150)
    first = generate(server, ids, 12, **fields)
    rows = checked(reference, first, ids).rows
    longer = ids + first["output_ids"] + prompt(seed + 1, 30)
    second = generate(server, longer, 6, **fields)
    assert second["meta_info"]["cached_tokens"] == len(rows)
    assert torch.equal(checked(reference, second, longer).rows[: len(rows)], rows)


def check_many(server: Server, reference: Qwen3MoeForCausalLM, num_requests: int = 12) -> list[dict[str, Any]]:
    """More requests at once than the pool can hold to their end; returns the answers."""
    prompts = [prompt(100 + number, 40 + 5 * number) for number in range(num_requests)]
    # With `ignore_eos` the scheduler reserves the whole length and never retracts; forbidding the token hides it.
    sampling = {"ignore_eos": False, "logit_bias": {str(END): -1e4}}
    with ThreadPoolExecutor(num_requests) as pool:
        answers = list(pool.map(lambda ids: generate(server, ids, 80, sampling_params=sampling), prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        checked(reference, answer, ids)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    return answers


def check_aborted(server: Server, reference: Qwen3MoeForCausalLM) -> None:
    """A running request is aborted; the next one gets its slots, and both have their own rows."""
    aborted, next_ = prompt(3, 70), prompt(4, 90)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, server, aborted, 800, rid="to-abort")
        while not running.done():
            time.sleep(1)
            abort(server, "to-abort")
        answer = running.result()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 800
    checked(reference, answer, aborted)
    checked(reference, generate(server, next_, 10), next_)


def test_tensor_parallel(small_model: Path, reference: Qwen3MoeForCausalLM) -> None:
    with serving(small_model, "--tp-size=2") as server:
        check_turns(server, reference)
        check_many(server, reference)
        assert (server.log().count(ON), server.log().count(OTHER_RANK)) == (1, 1)


def test_data_parallel(small_model: Path, reference: Qwen3MoeForCausalLM) -> None:
    with serving(small_model, "--dp-size=2") as server:
        for rank in (0, 1):
            check_turns(server, reference, seed=10 + 2 * rank, routed_dp_rank=rank)
        answers = check_many(server, reference, num_requests=24)
        assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
        assert (server.log().count(ON), server.log().count(OTHER_RANK)) == (2, 0)


def test_attention_data_parallel(small_model: Path, reference: Qwen3MoeForCausalLM) -> None:
    with serving(small_model, "--tp-size=2", "--dp-size=2", "--enable-dp-attention") as server:
        # While one rank has requests, the other runs passes without tokens of its own.
        for rank in (0, 1):
            check_turns(server, reference, seed=10 + 2 * rank, routed_dp_rank=rank)
        # One rank decodes, alone with a long prompt of the other's and then beside its decode.
        short, long = prompt(5, 20), prompt(6, 300)
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(generate, server, short, 200, routed_dp_rank=1)
            time.sleep(1)
            checked(reference, generate(server, long, 40, routed_dp_rank=0), long)
            checked(reference, running.result(), short)
        answers = check_many(server, reference, num_requests=24)
        assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
        assert (server.log().count(ON), server.log().count(OTHER_RANK)) == (2, 0)


def test_pipeline_parallel(small_model: Path, reference: Qwen3MoeForCausalLM) -> None:
    with serving(small_model, "--pp-size=2") as server:
        check_turns(server, reference)
        check_many(server, reference)
        check_aborted(server, reference)
        assert server.log().count(ON) == 1
        # Six layers, the first of them dense.
        assert server.log().count("router capture: stage 1 passes the routes of layers (3, 4, 5) on") == 1
