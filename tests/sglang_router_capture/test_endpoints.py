"""Which endpoints return masks, and where they stand in an answer: on the real server, and by the hooks alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from cpu_engines.sglang.server import Server
from router_replay.masks import masks_from_meta_info
from sglang_router_capture import hooks
from sglang_router_capture.answer import META_INFO_KEY
from tests.sglang_router_capture.requests import generate, masks_of, prompt

pytestmark = pytest.mark.timeout(900)

CHAT = {"model": "x", "messages": [{"role": "user", "content": "2 + 3"}], "max_tokens": 6}
# The small model's tokenizer has no template of its own.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "x", "prompt": "2 + 3", "max_tokens": 4},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": "x", "input": "2 + 3", "max_output_tokens": 4},
    "/v1/messages": {"model": "x", "messages": CHAT["messages"], "max_tokens": 4},
}


def _refused(server: Server, path: str, body: dict[str, Any]) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, body)
    assert caught.value.code == 400
    return caught.value.read().decode()


@pytest.mark.parametrize("path", BODIES)
def test_endpoints_without_meta_info_refuse_a_request_for_routes(capture_server: Server, path: str) -> None:
    message = _refused(capture_server, path, {**BODIES[path], "return_routed_experts": True})
    assert "return_routed_experts: routing masks are returned in meta_info" in message
    assert "/generate" in message
    if path == "/v1/chat/completions":
        body = {**CHAT, "return_routed_experts": True, "return_meta_info": True, "stream": True}
        assert "Streams of this endpoint have no meta_info" in _refused(capture_server, path, body)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_endpoints_answer_requests_that_ask_for_no_routes(capture_server: Server, path: str) -> None:
    answer = capture_server.post(path, BODIES[path])
    assert len(answer["choices"]) == 1
    assert META_INFO_KEY not in json.dumps(answer)


def test_chat_returns_each_choices_masks(capture_server: Server) -> None:
    body = {**CHAT, "return_routed_experts": True, "return_meta_info": True, "n": 2, "temperature": 1.0}
    answer = capture_server.post("/v1/chat/completions", {**body, "return_token_ids": True})
    assert len(answer["choices"]) == 2
    for choice in answer["choices"]:
        masks = masks_from_meta_info(choice["meta_info"])
        assert masks.valid.all()
        counts = choice["meta_info"]
        assert masks.end == counts["prompt_tokens"] + counts["completion_tokens"] - 1


def test_n_samples_of_a_prompt_have_their_own_masks(capture_server: Server) -> None:
    ids = prompt(400, 40)
    answers = generate(capture_server, ids, 12, sampling_params={"n": 3, "temperature": 1.0})
    assert len({tuple(answer["output_ids"]) for answer in answers}) > 1
    for answer in answers:
        masks = masks_of(answer, ids)
        assert masks.end == 40 + 12 - 1
        assert masks.valid.all()


def test_a_batch_of_prompts_has_a_mask_each(capture_server: Server) -> None:
    prompts = [prompt(410 + number, 20 + 7 * number) for number in range(4)]
    body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}}
    answers = capture_server.post("/generate", {**body, "return_routed_experts": True})
    for ids, answer in zip(prompts, answers, strict=True):
        masks = masks_of(answer, ids)
        assert masks.end == len(ids) + 6 - 1
        assert masks.valid.all()


def test_a_request_that_did_not_ask_has_no_key(capture_server: Server) -> None:
    """Alone, and in one batch with a request that did: the one that asked ends first, in a step of both."""
    asked, silent = prompt(7, 20), prompt(8, 20)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(generate, capture_server, asked, 40)
        second = pool.submit(capture_server.generate, silent, 80, sampling_params={"ignore_eos": True})
    assert masks_of(first.result(), asked).valid.all()
    assert META_INFO_KEY not in second.result()["meta_info"]


def test_requests_without_a_trainers_token_ids_are_refused(capture_server: Server) -> None:
    for part in ({"image_data": ["https://example.org/x.png"]}, {"audio_data": ["x"]}):
        body = {"input_ids": prompt(9, 12), "return_routed_experts": True, **part}
        message = _refused(capture_server, "/generate", body)
        assert "return_routed_experts is refused for images, video or audio" in message


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("input_embeds", "refused for input_embeds"),
        ("positional_embed_overrides", "refused for input_embeds"),
        ("lora_path", "refused for LoRA adapters"),
    ],
)
def test_requests_of_other_inputs_or_weights_are_refused(
    monkeypatch: pytest.MonkeyPatch, field: str, words: str
) -> None:
    """Neither can be run here: SGLang wants another server for the one, and a GPU for the other."""
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    fields = {"input_embeds": None, "positional_embed_overrides": None, "lora_path": None}
    fields["return_routed_experts"] = True
    obj = SimpleNamespace(contains_mm_input=lambda: False, **fields)
    hooks.endpoints.before_validate_one_request(None, obj, [])
    setattr(obj, field, [[0.0]])
    with pytest.raises(ValueError, match=words):
        hooks.endpoints.before_validate_one_request(None, obj, [])
    obj.return_routed_experts = False
    hooks.endpoints.before_validate_one_request(None, obj, [])


def test_streamed_answers_end_with_the_masks(capture_server: Server) -> None:
    ids = prompt(6, 30)
    body = {"input_ids": ids, "stream": True, "return_routed_experts": True}
    body["sampling_params"] = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        capture_server.url + "/generate", json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as stream:
        chunks = [json.loads(line[6:]) for line in stream if line.startswith(b"data: {")]
    assert len(chunks) > 1
    assert [META_INFO_KEY in chunk["meta_info"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert masks_of(chunks[-1], ids).end == 30 + 8 - 1


def _meta_infos(infos: list[dict[str, list[Any]]], *, incremental: bool) -> list[dict[str, Any]]:
    """What SGLang's own code makes of what the scheduler sent with each part of one request's stream."""
    from sglang.srt.managers import tokenizer_manager as upstream

    def original(tokenizer: Any, meta_info: dict, state: Any, customized: dict, index: int, reason: Any) -> None:
        upstream.TokenizerManager.update_request_meta_info(tokenizer, meta_info, state, customized, index, reason)

    tokenizer = SimpleNamespace(_accumulate_request_meta_info=upstream.TokenizerManager._accumulate_request_meta_info)
    state = SimpleNamespace(customized_info_accumulated={}, customized_info_reported_keys=set())
    found = []
    for offset, info in enumerate(infos):
        meta_info: dict[str, Any] = {}
        hooks.endpoints.around_update_request_meta_info(original, tokenizer, meta_info, state, info, 0, None)
        if incremental:
            upstream._slice_streaming_output_meta_info(meta_info, offset, state.customized_info_accumulated.keys())
        found.append(meta_info)
    return found


@pytest.mark.parametrize("incremental", [False, True])
def test_neither_kind_of_stream_cuts_the_masks(*, incremental: bool) -> None:
    """Another plugin's field, with an entry for each token, goes its own way."""
    handle = {"store": "inline:"}
    parts = [{"other": [[number]]} for number in range(3)] + [{"other": [[3]], META_INFO_KEY: [[handle]]}]
    parts[1][META_INFO_KEY] = [[]]
    others = [[0], [1], [2], [3]] if incremental else [[0, 1, 2, 3]] * 4
    assert _meta_infos(parts, incremental=incremental) == [
        {"other": others[0]},
        {"other": others[1]},
        {"other": others[2]},
        {"other": others[3], META_INFO_KEY: [handle]},
    ]
