"""What else a request or a server's answers may be: sessions, several tokenizer processes, incremental streams."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from cpu_engines.sglang.server import Server
from router_replay.masks import masks_from_meta_info
from sglang_router_capture.answer import META_INFO_KEY
from tests.forked_servers.client import serve
from tests.sglang_router_capture.oracle import assert_rows_are_of
from tests.sglang_router_capture.requests import generate, masks_of, prompt

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def server(small_model: Path) -> Iterator[Server]:
    flags = ("--tokenizer-worker-num=2", "--incremental-streaming-output", "--enable-streaming-session")
    # A tokenizer process that takes longer than ten seconds to start is killed otherwise, and the next begins.
    environment = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "300"}
    flags += ("--enable-router-capture", "--max-total-tokens=2048")
    with serve(small_model, *flags, environment=environment) as started:
        yield started


@pytest.fixture(scope="module")
def reference(small_model: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.float32)


def test_several_tokenizer_workers(server: Server, reference: Qwen3MoeForCausalLM) -> None:
    """Whichever of them has the request: masks, none where none are wanted, a refusal where none can be returned."""
    for number in range(8):
        ids = prompt(700 + number, 25)
        answer = generate(server, ids, 5)
        assert_rows_are_of(reference, masks_of(answer, ids), ids + answer["output_ids"])
        assert META_INFO_KEY not in server.generate(ids, 5)["meta_info"]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.post("/v1/completions", {"model": "x", "prompt": "2 + 3", "return_routed_experts": True})


def test_incremental_streams_end_with_the_masks(server: Server, reference: Qwen3MoeForCausalLM) -> None:
    """Parts hold what is new alone, log-probabilities, too; of the masks nothing is cut."""
    ids = prompt(710, 40)
    body: dict[str, Any] = {"input_ids": ids, "stream": True, "return_routed_experts": True, "return_logprob": True}
    body["sampling_params"] = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + "/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as stream:
        parts = [json.loads(line[6:]) for line in stream if line.startswith(b"data: {")]
    assert len(parts) > 1
    for part in parts:
        assert len(part["meta_info"]["output_token_logprobs"]) == len(part["output_ids"])
    assert [META_INFO_KEY in part["meta_info"] for part in parts] == [False] * (len(parts) - 1) + [True]
    sampled = [token for part in parts for token in part["output_ids"]]
    masks = masks_from_meta_info(parts[-1]["meta_info"])
    masks.check_tokens(ids + sampled)
    assert masks.end == 40 + 12 - 1
    assert_rows_are_of(reference, masks, ids + sampled)


@pytest.mark.parametrize("streaming", [False, True])
def test_turns_of_a_session(server: Server, reference: Qwen3MoeForCausalLM, *, streaming: bool) -> None:
    """A turn sends what is new alone, and gets the rows of the whole conversation, or of what is new."""
    session = server.post("/open_session", {"capacity_of_str_len": 1000, "streaming": streaming})
    whole: list[int] = []
    previous, rid = None, None
    for turn in range(3):
        new = prompt(720 + turn, 30)
        params = {"id": session, "rid": None if streaming else rid}
        start = 0 if turn < 2 else len(whole)
        answer = generate(server, new, 8, session_params=params, routed_experts_start_len=start)
        rid = answer["meta_info"]["id"]
        masks = masks_of(answer, whole + new)
        assert masks.start == start
        whole += new + answer["output_ids"]
        assert masks.end == len(whole) - 1
        assert_rows_are_of(reference, masks, whole)
        if previous is not None and start == 0:
            assert torch.equal(masks.rows[: len(previous.rows)], previous.rows)
        previous = masks
