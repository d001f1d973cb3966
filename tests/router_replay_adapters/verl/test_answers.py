"""Answers in SGLang's format through verl's `SGLangHttpServer.generate`."""

from __future__ import annotations

import base64
import threading
from typing import Any

import numpy as np
import pytest
import torch

from router_replay.errors import DataError, PairingError
from router_replay.masks import RoutingGeometry
from router_replay.masks.stores.inline import InlineStore
from tests.megatron_router_replay.batches import random_batch
from tests.router_replay_adapters.verl.rollout import generate, sglang_server, tool_loop_turns

# isort: split
import cpu_engines.megatron  # noqa: F401 (before anything that may import Megatron)

# isort: split
import router_replay_adapters.verl  # noqa: F401

HF_CONFIG = {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
PROMPT, OUTPUT = [5, 6, 7, 8], [9, 10, 11]
ROWS = len(PROMPT) + len(OUTPUT) - 1


def routes() -> np.ndarray:
    """Of the whole model, dense layer 0 in zeros; row 2 is not known."""
    values = np.random.default_rng(0).permuted(np.tile(np.arange(8, dtype=np.int32), (ROWS, 3, 1)), axis=-1)[..., :2]
    values[2] = -1
    values[:, 0] = 0
    return values


def answer(given: np.ndarray | None, output: list[int] = OUTPUT, finish: str = "length") -> dict[str, Any]:
    meta_info: dict[str, Any] = {"finish_reason": {"type": finish}}
    if given is not None:
        meta_info["routed_experts"] = base64.b64encode(given.tobytes()).decode()
    return {"output_ids": output, "meta_info": meta_info}


@pytest.mark.parametrize("skip_tokenizer_init", [True, False])
def test_routes_reach_verl(skip_tokenizer_init: bool) -> None:
    server = sglang_server(HF_CONFIG, lambda request: answer(routes()), skip_tokenizer_init=skip_tokenizer_init)
    output = generate(server, PROMPT)
    assert output.token_ids == OUTPUT and output.stop_reason == "length" and output.extra_fields["global_steps"] == 7
    assert isinstance(output.routed_experts, np.ndarray) and output.routed_experts.dtype == np.int32
    np.testing.assert_array_equal(output.routed_experts, routes())


def test_a_server_that_was_asked_for_sglangs_format_sends_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE_FORMAT", "sglang")
    found = generate(sglang_server(HF_CONFIG, lambda request: answer(routes())), PROMPT).routed_experts
    np.testing.assert_array_equal(found, routes())


def test_the_request_asks_for_routes() -> None:
    asked: list[Any] = []

    def take(request: Any) -> dict[str, Any]:
        asked.append(request)
        return answer(routes())

    generate(sglang_server(HF_CONFIG, take), PROMPT, max_tokens=3)
    assert asked[0].return_routed_experts and asked[0].sampling_params["max_new_tokens"] == 3


def test_without_routing_replay_nothing_is_looked_at() -> None:
    server = sglang_server(HF_CONFIG, lambda request: answer(None), enable_rollout_routing_replay=False)
    assert generate(server, PROMPT).routed_experts is None


def test_an_aborted_answer_without_routes_is_unknown_as_a_whole() -> None:
    """Parts of a rollout are put end to end by verl, so that a missing one would move all that follow."""
    server = sglang_server(HF_CONFIG, lambda request: answer(None, finish="abort"))
    found = generate(server, PROMPT).routed_experts
    assert found.shape == (ROWS, 3, 2) and (found == -1).all()
    for finish in ("abort", "length"):
        server = sglang_server(HF_CONFIG, lambda request, finish=finish: answer(None, output=[], finish=finish))
        found = generate(server, PROMPT).routed_experts
        assert found.shape == (len(PROMPT) - 1, 3, 2) and (found == -1).all()


def test_a_turn_in_which_nothing_was_sampled_keeps_the_routes_before_it() -> None:
    """Its answer has unknown rows alone; one that did sample takes the place of what was there."""
    server = sglang_server(HF_CONFIG, lambda request: answers.pop(0))
    answers = [answer(routes()), answer(None, output=[], finish="abort"), answer(None, finish="abort")]
    first, nothing, unknown = (generate(server, PROMPT) for _ in range(3))
    assert (nothing.routed_experts == -1).all()
    turns = tool_loop_turns([nothing, first, nothing, unknown])
    for found, of in zip(turns, (nothing, first, first, unknown), strict=True):
        assert found is of.routed_experts


TEXT = answer(routes())["meta_info"]["routed_experts"]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (answer(None), DataError, "no routed_experts: start verl's servers with enable_rollout_routing_replay"),
        (answer(routes()[:-1]), PairingError, r"120 bytes of routes, but 4 tokens of a prompt and 3 sampled ones"),
        (answer(np.zeros((ROWS, 3, 4), np.int32)), PairingError, r"in 3 decoder layers of top-2 are int32 \[6, 3, 2\]"),
        ({**answer(None), "meta_info": {"routed_experts": "é"}}, DataError, "is not base64 text"),
        ({**answer(None), "meta_info": {"routed_experts": TEXT[:8] + "*" + TEXT[8:]}}, DataError, "is not base64 text"),
        ({**answer(None), "meta_info": {"routed_experts": [1]}}, DataError, "routed_experts that are a list"),
        ({**answer(None), "meta_info": {"routing_masks": [{}]}}, DataError, "captures in format 'masks': unset SGLANG"),
    ],
    ids=["none", "too few rows", "another top-k", "no ASCII", "no base64", "another type", "masks"],
)
def test_answers_that_verl_would_take_for_something_else(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        generate(sglang_server(HF_CONFIG, lambda request: given), PROMPT)


def test_a_configuration_with_a_text_part() -> None:
    server = sglang_server({"text_config": HF_CONFIG}, lambda request: answer(routes()))
    np.testing.assert_array_equal(generate(server, PROMPT).routed_experts, routes())


def test_settings_and_answers_are_left_as_they_are() -> None:
    given = answer(routes())
    server = sglang_server(HF_CONFIG, lambda request: given, skip_tokenizer_init=False)
    before = vars(server).copy()
    generate(server, PROMPT)
    assert vars(server) == before and server.config.skip_tokenizer_init is False
    assert isinstance(given["meta_info"]["routed_experts"], str)


@pytest.mark.parametrize(
    ("skip_tokenizer_init", "error", "words"),
    [
        (True, AttributeError, "'str' object has no attribute 'numpy'"),
        (False, ModuleNotFoundError, "routed_experts_cap"),
    ],
)
def test_without_the_adapter_answers_are_not_decoded(
    skip_tokenizer_init: bool, error: type[Exception], words: str
) -> None:
    server = sglang_server(HF_CONFIG, lambda request: answer(routes()), skip_tokenizer_init=skip_tokenizer_init)
    server.model_config.hf_config = type("Config", (), HF_CONFIG)()
    with pytest.raises(error, match=words):
        generate(server, PROMPT, stock=True)


def test_what_verl_makes_of_them_is_a_tensor() -> None:
    """The branch that takes the answer as it is calls `numpy` on it."""
    from router_replay_adapters.verl.answers import routes_of

    found = routes_of(answer(routes()), len(PROMPT), RoutingGeometry.from_hf_config(HF_CONFIG))
    assert isinstance(found, torch.Tensor) and found.dtype == torch.int32


def test_masks_take_the_arrays_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked against prompt and output, and read beside the event loop: a store may let one wait."""
    from router_replay_adapters.verl import answers
    from router_replay_adapters.verl.packed import PackedRoutes

    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    threads: list[threading.Thread] = []
    masks_from_meta_info = answers.masks_from_meta_info

    def read(meta_info: Any) -> Any:
        threads.append(threading.current_thread())
        return masks_from_meta_info(meta_info)

    monkeypatch.setattr(answers, "masks_from_meta_info", read)
    batch = random_batch(RoutingGeometry.from_hf_config(HF_CONFIG), (ROWS + 1,), seed=1, codec="rank")
    (masks,), ids = batch.masks, batch.token_ids[0].tolist()
    prompt, sampled = ids[: len(PROMPT)], ids[len(PROMPT) :]
    meta_info = {"finish_reason": {"type": "length"}, "routing_masks": [InlineStore().put(masks)]}
    server = sglang_server(HF_CONFIG, lambda request: {"output_ids": sampled, "meta_info": meta_info})
    found = generate(server, prompt).routed_experts
    assert isinstance(found, PackedRoutes) and torch.equal(found.masks.rows, masks.rows)
    assert found.token_ids.tolist() == ids
    assert threads != [threading.main_thread()] and len(threads) == 1
    with pytest.raises(PairingError, match="recorded for a sequence"):
        generate(server, [*prompt[:-1], prompt[-1] + 1])


def test_an_answer_in_which_nothing_was_sampled_has_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    server = sglang_server(HF_CONFIG, lambda request: answer(None, output=[], finish="abort"))
    assert generate(server, PROMPT).routed_experts is None


def test_routes_of_an_aborted_answer_are_taken_where_it_has_some() -> None:
    found = generate(sglang_server(HF_CONFIG, lambda request: answer(routes(), finish="abort")), PROMPT).routed_experts
    np.testing.assert_array_equal(found, routes())
