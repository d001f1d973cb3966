"""`routed_experts` served by our recorder, against SGLang's own capture, where that is right."""

from __future__ import annotations

import pytest
import torch

from cpu_engines.sglang.server import Server
from tests.sglang_router_capture.requests import generate, prompt, upstream_routes

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
