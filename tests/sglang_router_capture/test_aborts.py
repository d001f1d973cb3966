"""Requests that end before they are done: their tokens have the rows of the passes that sampled them."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from cpu_engines.sglang.server import Server
from sglang_router_capture.answer import META_INFO_KEY
from tests.sglang_router_capture.oracle import assert_rows_are_of
from tests.sglang_router_capture.requests import flush, generate, masks_of, prompt
from tests.sglang_router_capture.underway import control, underway

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def reference(small_model: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.float32)


def _check(answer: dict[str, Any], ids: list[int], reference: Qwen3MoeForCausalLM) -> None:
    info, sampled = answer["meta_info"], answer["output_ids"]
    assert info["finish_reason"]["type"] == "abort"
    assert info["completion_tokens"] == len(sampled) > 0
    assert len(info["output_token_logprobs"]) == len(sampled)
    masks = masks_of(answer, ids)
    assert masks.end == len(ids) + len(sampled) - 1
    assert_rows_are_of(reference, masks, ids + sampled)


def test_tokens_of_a_request_aborted_in_the_queue(capture_server: Server, reference: Qwen3MoeForCausalLM) -> None:
    """All are retracted into the queue; of one nothing is heard until it is aborted, and one goes on."""
    flush(capture_server)
    prompts = [prompt(500 + number, 30 + 11 * number) for number in range(3)]
    silent = prompt(510, 45)
    sampling = {"max_new_tokens": 200, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(
            generate, capture_server, silent, 200, sampling_params=sampling, rid="silent", return_logprob=True
        )
        with underway(capture_server, prompts, 200, tokens=8, return_logprob=True) as streams:
            control(capture_server, "/pause_generation", mode="retract")
            for rid in ("rid-0", "rid-1", "silent"):
                control(capture_server, "/abort_request", rid=rid)
            aborted = [streams[0].result(), streams[1].result(), whole.result()]
            control(capture_server, "/continue_generation")
            last = streams[2].result()
    for answer, ids in zip(aborted, [*prompts[:2], silent], strict=True):
        assert answer["meta_info"]["num_retractions"] == 1
        assert answer["meta_info"]["finish_reason"]["message"] == "Abort in waiting queue"
        _check(answer, ids, reference)
    assert last["meta_info"]["finish_reason"]["type"] == "length"
    masks = masks_of(last, prompts[2])
    assert masks.end == len(prompts[2]) + 199
    assert_rows_are_of(reference, masks, prompts[2] + last["output_ids"])


def test_tokens_of_running_requests_that_are_aborted(capture_server: Server, reference: Qwen3MoeForCausalLM) -> None:
    prompts = [prompt(520 + number, 30 + 11 * number) for number in range(3)]
    with underway(capture_server, prompts, 400, tokens=5, return_logprob=True) as streams:
        control(capture_server, "/abort_request", abort_all=True)
    for stream, ids in zip(streams, prompts, strict=True):
        _check(stream.result(), ids, reference)


def test_pause_by_abort_returns_what_was_sampled(capture_server: Server, reference: Qwen3MoeForCausalLM) -> None:
    ids = prompt(530, 40)
    with underway(capture_server, [ids], 400, tokens=5, return_logprob=True) as streams:
        control(capture_server, "/pause_generation", mode="abort")
        control(capture_server, "/continue_generation")
    _check(streams[0].result(), ids, reference)


def test_a_prefill_that_is_aborted_has_no_masks(capture_server: Server) -> None:
    """In the middle of its chunks nothing was sampled, and the server goes on."""
    flush(capture_server)
    ids, passes = prompt(540, 1700), capture_server.log().count("Prefill batch")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, capture_server, ids, 4, rid="chunked")
        while capture_server.log().count("Prefill batch") < passes + 3:
            time.sleep(0.005)
        control(capture_server, "/abort_request", rid="chunked")
        answer = running.result()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["output_ids"] == []
    assert META_INFO_KEY not in answer["meta_info"]
    again = generate(capture_server, ids, 4)
    assert masks_of(again, ids).valid.all()


def test_a_client_that_is_gone_leaves_nothing(capture_server: Server) -> None:
    """Its request ends by itself, and the cache can be emptied, for which no request may be left."""
    address = urlsplit(capture_server.url)
    body = {"input_ids": prompt(550, 60), "stream": True, "return_routed_experts": True, "rid": "gone"}
    body["sampling_params"] = {"max_new_tokens": 1500, "ignore_eos": True}
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 0, timeout=60)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read(200)
    connection.close()
    deadline = time.monotonic() + 60
    while True:
        try:
            flush(capture_server)
            break
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline, "the request goes on without its client"
            time.sleep(0.2)
    ids = prompt(551, 1200)
    assert masks_of(generate(capture_server, ids, 4), ids).valid.all()
