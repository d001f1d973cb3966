"""`routed_experts` served by our recorder, against SGLang's own capture, where that is right."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cpu_engines.sglang.server import Server
from router_replay.masks import RoutingGeometry, RoutingMasks, get_codec, masks_from_sglang
from router_replay_cli.running_server import print_running_server
from sglang_router_capture import hooks
from sglang_router_capture.sglang_format import packed, unpacked
from tests.sglang_router_capture.areal_client import client_reads
from tests.sglang_router_capture.requests import generate, prompt, upstream_routes
from tests.stack_packages import importable, miles

pytestmark = pytest.mark.timeout(900)

# Short; longer than a chunk of 64; a continuation whose prefix is cached in whole pages of 16; a delta.
LENGTHS = (5, 33, 200)


def _play(server: Server) -> list[dict]:
    answers = [generate(server, prompt(length, length), 11) for length in LENGTHS]
    for answer, length in list(zip(answers, LENGTHS, strict=True)):
        longer = prompt(length, length) + answer["output_ids"] + prompt(1000 + length, 21)
        answers.append(generate(server, longer, 7))
        answers.append(generate(server, longer, 7, routed_experts_start_len=length))
    return answers


@pytest.fixture(scope="module")
def stock(stock_server: Server) -> list[dict]:
    return _play(stock_server)


def test_bytes_are_upstreams(sglang_format_server: Server, stock: list[dict]) -> None:
    ours = _play(sglang_format_server)
    assert [answer["output_ids"] for answer in ours] == [answer["output_ids"] for answer in stock]
    assert max(answer["meta_info"]["cached_tokens"] for answer in ours) >= 64
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine["meta_info"]["cached_tokens"] == theirs["meta_info"]["cached_tokens"]
        assert mine["meta_info"]["routed_experts"] == theirs["meta_info"]["routed_experts"]
        assert "routing_masks" not in mine["meta_info"]
    routes = upstream_routes(ours[0], num_layers=6, top_k=4)
    assert routes.shape == (5 + 11 - 1, 6, 4)
    # Decoder layer 0 is dense: zeros there, and routes everywhere else.
    assert torch.equal(routes[:, 0], torch.zeros_like(routes[:, 0]))
    assert (routes[:, 1:].sort(-1).values.diff(dim=-1) > 0).all()
    # The reader for trainers takes both: the whole, and of a continuation what comes after the start.
    geometry = RoutingGeometry(num_layers=6, moe_layers=(1, 2, 3, 4, 5), num_experts=32, top_k=4)
    token_ids = prompt(5, 5) + stock[0]["output_ids"]
    masks = masks_from_sglang(stock[0]["meta_info"], token_ids, geometry)
    assert masks.valid.all() and torch.equal(masks.indices(), routes[:, 1:].sort(-1).values)
    longer = token_ids + prompt(1005, 21)
    whole, delta = (
        masks_from_sglang(answer["meta_info"], longer + answer["output_ids"], geometry, start=start)
        for answer, start in ((stock[3], 0), (stock[4], 5))
    )
    assert torch.equal(whole[5:].rows, delta.rows) and delta.start == 5


def test_r3_doctor_knows_a_server_whose_capture_is_not_ours(stock_server: Server) -> None:
    told = io.StringIO()
    assert not print_running_server(Console(file=told, soft_wrap=True, highlight=False), stock_server.url, None)
    assert "not ours: it has no /router_capture/status" in told.getvalue()


def test_miles_reads_them(sglang_format_server: Server) -> None:
    """Two turns by miles' own client, the second of which goes on from the first."""
    settings = SimpleNamespace(
        num_layers=6, moe_router_topk=4, sglang_speculative_algorithm=None, use_miles_router=False
    )
    with importable("miles", miles()):
        from miles.rollout.generate_utils.generate_endpoint_utils import update_sample_from_response
        from miles.utils.types import Sample

        sample = Sample(prompt="")
        asked = prompt(71, 40)
        for added in ([], prompt(72, 12)):
            asked = asked + added
            # Text comes from a tokenizer, which one of the servers does without.
            answer = {"text": "", **generate(sglang_format_server, asked, 9, return_logprob=True)}
            sample.tokens = list(asked)
            asyncio.run(update_sample_from_response(settings, sample, {"input_ids": asked}, answer))
            asked = asked + answer["output_ids"]
            assert sample.tokens == asked
            found = torch.from_numpy(sample.rollout_routed_experts.copy())
            assert found.shape == (len(asked) - 1, 6, 4)
            assert torch.equal(found, upstream_routes(answer, num_layers=6, top_k=4))
    geometry = RoutingGeometry(num_layers=6, moe_layers=(1, 2, 3, 4, 5), num_experts=32, top_k=4)
    masks = masks_from_sglang(answer["meta_info"], asked, geometry)
    assert masks.valid.all() and torch.equal(masks.indices(), found[:, 1:].sort(-1).values)


def test_areal_reads_them(sglang_format_server: Server, tmp_path: Path) -> None:
    """Two prompts by AReaL's own client, the second of which goes on from the first, and unknown rows."""
    prompts = [prompt(81, 40), prompt(81, 40) + prompt(82, 12)]
    unknown = RoutingMasks.from_indices(
        torch.stack([torch.randperm(128)[:8] for _ in range(50 * 2)]).reshape(50, 2, 8).int(),
        torch.arange(50) % 3 != 1,
        start=0,
        geometry=GEOMETRY,
        codec="ordered",
        token_ids=list(range(51)),
    )
    address = sglang_format_server.url.removeprefix("http://")
    generated, read = client_reads(address, prompts, 9, [_answer(unknown, prompt_tokens=44)], tmp_path)
    geometry = RoutingGeometry(num_layers=6, moe_layers=(1, 2, 3, 4, 5), num_experts=32, top_k=4)
    for token_ids, found in zip(prompts, generated, strict=True):
        answer = generate(sglang_format_server, token_ids, 9)
        assert found.tokens == answer["output_ids"]
        rows = torch.tensor(found.rows).reshape(len(token_ids) + 9 - 1, 6, 4)
        assert torch.equal(rows, upstream_routes(answer, num_layers=6, top_k=4).long())
        masks = masks_from_sglang(answer["meta_info"], token_ids + answer["output_ids"], geometry)
        assert masks.valid.all() and torch.equal(masks.indices(), rows[:, 1:].sort(-1).values.int())
    rows = torch.tensor(read[0].rows).reshape(50, 4, 8)
    assert torch.equal(rows[:, [1, 3]].int(), unknown.indices())
    assert (rows[1::3, [1, 3]] == -1).all() and (rows[:, [0, 2]] == 0).all()


def _answer(masks: RoutingMasks, prompt_tokens: int) -> dict[str, Any]:
    """What a server answers in this format, as far as a client of AReaL reads it."""
    sent = packed(masks.rows, masks.valid, masks.geometry, get_codec(masks.codec))
    batch = SimpleNamespace(routed_experts=[sent])
    hooks.endpoints.before_answers(None, batch)
    completion_tokens = masks.num_tokens + 1 - prompt_tokens
    return {
        "meta_info": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "finish_reason": {"type": "length", "length": completion_tokens},
            "output_token_logprobs": [[-1.0, 5, None]] * completion_tokens,
            # As SGLang's tokenizer manager writes them.
            "routed_experts": base64.b64encode(batch.routed_experts[0].numpy().tobytes()).decode(),
        }
    }


GEOMETRY = RoutingGeometry(num_layers=4, moe_layers=(1, 3), num_experts=128, top_k=8)


@pytest.mark.parametrize("geometry", [GEOMETRY, replace(GEOMETRY, num_layers=2, moe_layers=(0, 1))])
@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_packed_routes_are_what_sglang_sends(geometry: RoutingGeometry, num_tokens: int) -> None:
    codec = get_codec("ordered")
    indices = torch.stack([torch.randperm(128)[:8] for _ in range(num_tokens * 2)] or [torch.zeros(8)]).int()
    indices = indices[: num_tokens * 2].reshape(num_tokens, 2, 8)
    valid = torch.arange(num_tokens) % 3 != 1
    rows = codec.pack(indices, geometry)
    sent = packed(rows, valid, geometry, codec)
    # Taken for SGLang's own by a process that does not unpack, they must not pass for routes.
    assert sent.numel() % 4 == 1
    expected = torch.zeros((num_tokens, geometry.num_layers, 8), dtype=torch.int32)
    expected[:, list(geometry.moe_layers)] = torch.where(valid[:, None, None], indices, -1)
    found = unpacked(sent)
    assert found.dtype == torch.int32
    assert torch.equal(found, expected)


def test_only_what_is_packed_is_unpacked() -> None:
    codec = get_codec("ordered")
    sent = packed(codec.pack(torch.arange(8).expand(3, 2, 8), GEOMETRY), torch.ones(3).bool(), GEOMETRY, codec)
    stock = torch.zeros((3, 4, 8), dtype=torch.int32)
    batch = SimpleNamespace(routed_experts=[None, sent, stock, "written already"])
    hooks.endpoints.before_answers(None, batch)
    assert batch.routed_experts[1].shape == (3, 4, 8)
    assert batch.routed_experts[0] is None
    assert batch.routed_experts[2] is stock
    assert batch.routed_experts[3] == "written already"
    hooks.endpoints.before_answers(None, SimpleNamespace(routed_experts=None))
    hooks.endpoints.before_answers(None, SimpleNamespace())
