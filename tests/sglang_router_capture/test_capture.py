"""The recorder in SGLang's real server: which rows come back, and that they belong to the tokens."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from cpu_engines.sglang.server import Server
from router_replay.masks import Rollout, RoutingGeometry, RoutingMasks, masks_from_meta_info
from tests.sglang_router_capture.oracle import assert_rows_are_of
from tests.sglang_router_capture.requests import END, flush, generate, masks_of, prompt

pytestmark = pytest.mark.timeout(900)

RETRACTED = "KV cache pool is full. Retract requests."


def _name_weights(server: Server, version: str) -> None:
    server.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})


@pytest.fixture(scope="module")
def reference(small_model: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.float32)


def test_rows_are_the_models_routes(capture_server: Server, reference: Qwen3MoeForCausalLM, small_model: Path) -> None:
    """Chunked prefill and decode: every row but the last sampled token's, close to another engine's routes."""
    ids = prompt(1, 150)
    answer = generate(capture_server, ids, 12)
    masks = masks_of(answer, ids)
    assert masks.geometry == RoutingGeometry.from_hf_config(json.loads((small_model / "config.json").read_text()))
    assert (masks.start, masks.end) == (0, 150 + 12 - 1)
    assert masks.valid.all()
    assert_rows_are_of(reference, masks, ids + answer["output_ids"])


def test_prefix_cached_turn_returns_the_rows_of_the_turn_that_computed_them(
    capture_server: Server, reference: Qwen3MoeForCausalLM
) -> None:
    flush(capture_server)
    _name_weights(capture_server, "first")
    ids = prompt(2, 90)
    first = generate(capture_server, ids, 10)
    first_masks = masks_of(first, ids)
    _name_weights(capture_server, "second")
    longer = ids + first["output_ids"] + prompt(3, 40)
    second = generate(capture_server, longer, 10)
    second_masks = masks_of(second, longer)
    cached = second["meta_info"]["cached_tokens"]
    # In 0.5.20 the overlapped step after a request's end leaves the KV of the last sampled token in the cache, too.
    assert cached == first_masks.end + (version("sglang") == "0.5.20")
    assert torch.equal(second_masks.rows[: first_masks.end], first_masks.rows)
    # That token's row was asked of nobody before: it came from that step, and is the model's as the others are.
    assert_rows_are_of(reference, second_masks, longer + second["output_ids"])
    # The versions show it from another side: cached rows are older than the weights that answered.
    assert first_masks.weight_versions == ((0, "first"),)
    assert second_masks.weight_versions == ((0, "first"), (cached, "second"))


def test_deltas_give_the_rows_of_the_whole(capture_server: Server) -> None:
    flush(capture_server)
    ids, parts, rollout = prompt(4, 60), [], Rollout()
    for turn in range(3):
        start = parts[-1].end if parts else 0
        assert rollout.request_fields(ids)["routed_experts_start_len"] == start
        answer = generate(capture_server, ids, 9, routed_experts_start_len=start)
        parts.append(masks_of(answer, ids))
        assert parts[-1].start == start
        assert rollout.add(answer["meta_info"], answer["output_ids"]).is_delta == (turn > 0)
        last_input, ids = ids, ids + answer["output_ids"] + prompt(50 + turn, 17)
    whole_answer = generate(capture_server, last_input, 9)
    whole = masks_of(whole_answer, last_input)
    joined = RoutingMasks.join(parts, last_input + answer["output_ids"])
    assert whole_answer["output_ids"] == answer["output_ids"]
    # The last turn's tokens are computed by both requests; everything before them is cached and must be the same bytes.
    assert joined.end == whole.end
    assert joined.valid.all()
    assert whole.valid.all()
    assert torch.equal(joined.rows, whole.rows)
    assert torch.equal(rollout.join().rows, whole.rows)
    # The last turn once more: its prompt's rows are there.
    assert rollout.request_fields(last_input)["routed_experts_start_len"] == len(last_input)
    again = generate(capture_server, last_input, 9, routed_experts_start_len=len(last_input))
    turn = rollout.add(again["meta_info"], again["output_ids"])
    assert (turn.start, turn.num_new) == (len(last_input), 8)
    rollout.join().check_tokens(last_input + again["output_ids"])


def test_slots_that_changed_hands_return_the_new_tokens_rows(capture_server: Server) -> None:
    """The pool has 2,048 slots: twenty prompts of 200 tokens push out whatever was there."""
    flush(capture_server)
    ids = prompt(5, 200)
    before = masks_of(generate(capture_server, ids, 4), ids)
    for seed in range(100, 120):
        other = prompt(seed, 200)
        masks_of(generate(capture_server, other, 2), other)
    again = generate(capture_server, ids, 4)
    assert again["meta_info"]["cached_tokens"] == 0
    after = masks_of(again, ids)
    assert after.valid.all()
    assert torch.equal(after.rows, before.rows)


def test_concurrent_requests_with_retraction(capture_server: Server, reference: Qwen3MoeForCausalLM) -> None:
    """More requests than the pool can hold to their end: overlapped, mixed and retracted at once.

    The weights get another name after the first retraction, and so before any retracted request is computed anew: what
    it had sampled keeps the routes, and the name, of the passes that sampled it.
    """
    flush(capture_server)
    _name_weights(capture_server, "before")
    retractions = capture_server.log().count(RETRACTED)
    prompts = [prompt(200 + number, 60 + 3 * number) for number in range(14)]
    # With `ignore_eos` the scheduler reserves the whole length and never retracts; forbidding the token hides it.
    sampling = {"ignore_eos": False, "logit_bias": {str(END): -1e4}}
    with ThreadPoolExecutor(14) as pool:
        running = [pool.submit(generate, capture_server, ids, 150, sampling_params=sampling) for ids in prompts]
        while capture_server.log().count(RETRACTED) == retractions and not all(each.done() for each in running):
            time.sleep(0.02)
        _name_weights(capture_server, "after")
        answers = [each.result() for each in running]
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    for ids, answer in zip(prompts, answers, strict=True):
        masks = masks_of(answer, ids)
        assert masks.end == len(ids) + 149
        assert masks.valid.all()
        # All fourteen were running at the first retraction.
        assert [name for _, name in masks.weight_versions] == ["before", "after"]
        assert masks.weight_versions[1][0] > len(ids)
        assert_rows_are_of(reference, masks, ids + answer["output_ids"])


def test_streaming_returns_the_masks_once(capture_server: Server) -> None:
    ids = prompt(6, 30)
    body = {
        "input_ids": ids,
        "stream": True,
        "return_routed_experts": True,
        "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
    }
    request = urllib.request.Request(
        capture_server.url + "/generate", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as stream:
        chunks = [json.loads(line[6:]) for line in stream if line.startswith(b"data: {")]
    assert len(chunks) > 1
    last = chunks[-1]["meta_info"]
    assert last["completion_tokens"] == 8
    assert len(last["routing_masks"]) == 1
    assert masks_from_meta_info(last).num_tokens == 30 + 8 - 1


def test_text_prompt(capture_server: Server, small_model: Path) -> None:
    """The server's own tokenizer makes the ids, and the detokenizer passes the masks on beside its text."""
    sampling = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    body = {"text": "2 + 3 * 4", "return_routed_experts": True, "sampling_params": sampling}
    answer = capture_server.post("/generate", body)
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    ids = tokenizer.encode("2 + 3 * 4")
    assert answer["text"] == tokenizer.decode(answer["output_ids"], skip_special_tokens=True)
    masks = masks_of(answer, ids)
    assert masks.end == len(ids) + 6 - 1
    assert masks.valid.all()


def test_request_that_does_not_ask_gets_no_masks(capture_server: Server) -> None:
    asked, silent = prompt(7, 20), prompt(8, 20)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(generate, capture_server, asked, 40)
        second = pool.submit(capture_server.generate, silent, 40)
    assert masks_of(first.result(), asked).valid.all()
    assert "routing_masks" not in second.result()["meta_info"] or second.result()["meta_info"]["routing_masks"] == []


@pytest.mark.parametrize(("start", "words"), [(-1, "lower than 0"), (21, "higher than the number of input tokens")])
def test_bad_start_is_refused_and_the_server_goes_on(capture_server: Server, start: int, words: str) -> None:
    ids = prompt(9, 20)
    with pytest.raises(urllib.error.HTTPError) as caught:
        generate(capture_server, ids, 4, routed_experts_start_len=start)
    message = caught.value.read().decode()
    assert caught.value.code == 400
    assert words in message
    assert str(start) in message
    assert masks_of(generate(capture_server, ids, 4), ids).valid.all()


def test_server_says_what_it_records(capture_server: Server) -> None:
    assert (
        "router capture is on: format masks, codec rank, store inline:, 5 MoE layers of 4 of 32 experts"
        in capture_server.log()
    )
