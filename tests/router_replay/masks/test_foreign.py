"""What engines return by themselves becomes masks, or is refused where nobody could tell which rows are whose."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router_replay.errors import DataError, InputError, PairingError
from router_replay.masks import (
    Rollout,
    RoutingGeometry,
    masks_from_meta_info,
    masks_from_sglang,
    masks_from_vllm,
    token_digest,
)
from tests.router_replay.masks.routes import geometries, random_indices, seeds

GEOMETRY = RoutingGeometry(num_layers=4, moe_layers=(1, 3), num_experts=16, top_k=3)


def routes_of(geometry: RoutingGeometry, num_tokens: int, seed: int = 0) -> np.ndarray:
    """`int32 [T, MoE layers, K]` without a layer of zeros."""
    return random_indices(geometry, num_tokens, seed).to(torch.int32).numpy()


def in_all_layers(geometry: RoutingGeometry, routes: np.ndarray) -> np.ndarray:
    full = np.zeros((len(routes), geometry.num_layers, geometry.top_k), dtype=np.int32)
    full[:, list(geometry.moe_layers)] = routes
    return full


def sglang_answer(geometry: RoutingGeometry, routes: np.ndarray) -> dict[str, Any]:
    data = in_all_layers(geometry, routes).astype("<i4").tobytes()
    return {"id": "a", "routed_experts": base64.b64encode(data).decode()}


def vllm_output(
    num_prompt: int, num_sampled: int, routes: np.ndarray | None, of_prompt: np.ndarray | None = None
) -> SimpleNamespace:
    ids = list(range(100, 100 + num_prompt + num_sampled))
    completion = SimpleNamespace(index=0, token_ids=ids[num_prompt:], routed_experts=routes)
    output = SimpleNamespace(prompt_token_ids=ids[:num_prompt], outputs=[completion])
    if of_prompt is not None:
        output.prompt_routed_experts = of_prompt
    return output


def sets(routes: np.ndarray) -> list[list[list[int]]]:
    return np.sort(routes, -1).tolist()


@given(geometries(max_experts=40, max_layers=4), st.integers(1, 6), seeds, st.integers(0, 8), st.data())
@settings(max_examples=80, deadline=None)
def test_sglangs_rows_are_those_of_its_tokens(geometry, num_tokens, seed, start, data):
    routes, ids = routes_of(geometry, num_tokens - 1, seed), list(range(num_tokens))
    first = min(start, num_tokens - 1)
    sent = routes[first:].copy()
    missing = data.draw(st.sets(st.integers(0, max(len(sent) - 1, 0)))) if len(sent) else set()
    for row in missing:
        sent[row] = data.draw(st.sampled_from([0, -1]))
    masks = masks_from_sglang(sglang_answer(geometry, sent), ids, geometry, start=start)
    assert (masks.start, masks.end) == (first, num_tokens - 1)
    zeros = {row for row in range(len(sent)) if not sent[row].any()}
    assert (~masks.valid).nonzero().flatten().tolist() == sorted(missing | zeros)
    assert sets(masks.indices()[masks.valid].numpy()) == sets(sent[masks.valid.numpy()])
    assert masks.token_digest == token_digest(ids[:-1])


def test_a_row_that_one_layer_did_not_write_is_not_valid():
    routes = routes_of(GEOMETRY, 4)
    routes[1, 0] = 0
    routes[2, 1] = -1
    masks = masks_from_sglang(sglang_answer(GEOMETRY, routes), range(5), GEOMETRY, codec="ordered")
    assert masks.valid.tolist() == [True, False, False, True]
    assert masks.codec == "ordered" and masks.indices()[0].tolist() == routes[0].tolist()


def test_expert_0_is_a_choice_where_one_expert_is_chosen():
    geometry = RoutingGeometry(2, (0, 1), 4, 1)
    routes = np.array([[[0], [2]], [[0], [0]], [[3], [0]], [[-1], [1]]], dtype=np.int32)
    masks = masks_from_sglang(sglang_answer(geometry, routes), range(5), geometry)
    assert masks.valid.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"token_ids": range(7)},
            PairingError,
            r"240 bytes .*\[0, 6\) of 7 in 4 decoder layers.*\[6, 4, 3\], 288 bytes",
        ),
        ({"start": 1}, PairingError, r"240 bytes of routes, but tokens \[1, 5\) of 6 .*\[4, 4, 3\], 192 bytes"),
        ({"geometry": RoutingGeometry(5, (1, 3), 16, 3)}, PairingError, r"\[5, 5, 3\], 300 bytes"),
        (
            {"geometry": RoutingGeometry(4, (1, 2), 16, 3)},
            PairingError,
            r"decoder layers \[3\] have routes .* \[1, 2\]",
        ),
        ({"geometry": RoutingGeometry(4, (1, 3), 4, 3)}, DataError, "of 4 experts .* decoder layer"),
        ({"start": -1}, InputError, "start is -1"),
        ({"start": 1.0}, InputError, "must be an integer"),
        ({"geometry": 3}, InputError, "geometry"),
        ({"token_ids": "abc"}, InputError, "text"),
        ({"meta_info": {"routed_experts": "AAA"}}, DataError, "not base64"),
        ({"meta_info": {"routed_experts": b"AAAA"}}, DataError, "are a bytes"),
        ({"meta_info": {"routed_experts": None}}, DataError, "return_routed_experts: true"),
        ({"meta_info": {"routing_masks": [{}]}}, DataError, r"masks_from_meta_info\(meta_info\)"),
        ({"meta_info": {"meta_info": {}}}, InputError, r'answer\["meta_info"\]'),
        ({"meta_info": [{}]}, InputError, r"\[masks_from_sglang\(answer"),
    ],
)
def test_what_cannot_be_sglangs_rows_of_these_tokens(change, error, says):
    arguments = {
        "meta_info": sglang_answer(GEOMETRY, routes_of(GEOMETRY, 5)),
        "token_ids": range(6),
        "geometry": GEOMETRY,
        **change,
    }
    with pytest.raises(error, match=says):
        masks_from_sglang(
            arguments.pop("meta_info"), arguments.pop("token_ids"), arguments.pop("geometry"), **arguments
        )


@pytest.mark.parametrize("routes", [[3, 3, 1], [3, -1, 1], [3, 16, 1], [-2, 1, 2]])
def test_experts_that_nobody_chose_are_told_by_token_and_layer(routes):
    wrong = routes_of(GEOMETRY, 5)
    wrong[2, 1] = routes
    with pytest.raises(DataError, match="16 experts and top-3: token 2, decoder layer 3"):
        masks_from_sglang(sglang_answer(GEOMETRY, wrong), range(6), GEOMETRY)


def test_sglangs_own_answers_can_be_turns_of_a_rollout():
    rollout, ids, routes = Rollout(), list(range(12)), routes_of(GEOMETRY, 11)
    for prompt, end in ((3, 5), (7, 12)):
        fields = rollout.request_fields(ids[:prompt])
        start = fields["routed_experts_start_len"]
        answer = sglang_answer(GEOMETRY, routes[start : end - 1])
        rollout.add(masks_from_sglang(answer, ids[:end], GEOMETRY, start=start), ids[prompt:end])
    assert sets(rollout.join().indices().numpy()) == sets(routes)


def test_the_reader_of_masks_names_the_one_of_sglangs_format():
    with pytest.raises(DataError, match="masks_from_sglang"):
        masks_from_meta_info(sglang_answer(GEOMETRY, routes_of(GEOMETRY, 2)))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint8, np.uint16])
@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize("surplus", [0, 1])
@pytest.mark.parametrize(("num_prompt", "num_sampled"), [(4, 3), (1, 1), (5, 1)])
def test_vllms_rows_whole_and_by_prompt_and_completion(dtype, all_layers, surplus, num_prompt, num_sampled):
    num_tokens = num_prompt + num_sampled
    routes = routes_of(GEOMETRY, num_tokens)
    sent = (in_all_layers(GEOMETRY, routes) if all_layers else routes).astype(dtype)[: num_tokens - 1 + surplus]
    whole = vllm_output(num_prompt, num_sampled, sent)
    split = vllm_output(num_prompt, num_sampled, sent[num_prompt:], sent[:num_prompt])
    for output in (whole, split):
        masks = masks_from_vllm(output, GEOMETRY, weight_versions=((0, "step 3"),))
        assert (masks.start, masks.end) == (0, num_tokens - 1) and masks.valid.all()
        assert sets(masks.indices().numpy()) == sets(routes[: num_tokens - 1])
        masks.check_tokens([*output.prompt_token_ids, *output.outputs[0].token_ids])
        assert masks.weight_versions == ((0, "step 3"),)


def test_a_cached_prefix_and_a_start():
    routes = routes_of(GEOMETRY, 6).astype(np.int16)
    routes[:2] = -1
    masks = masks_from_vllm(vllm_output(4, 3, routes[4:], routes[:4]), GEOMETRY)
    assert masks.valid.tolist() == [False, False, True, True, True, True]
    for output in (vllm_output(4, 3, routes[3:]), vllm_output(4, 3, routes[4:], routes[3:4])):
        masks = masks_from_vllm(output, GEOMETRY, start=3)
        assert (masks.start, masks.end) == (3, 6) and sets(masks.indices().numpy()) == sets(routes[3:])


def test_the_completion_is_chosen_by_its_index():
    routes = routes_of(GEOMETRY, 12)
    output = vllm_output(3, 3, routes[:5])
    output.outputs.insert(0, SimpleNamespace(index=1, token_ids=[7, 8], routed_experts=routes[5:9]))
    assert masks_from_vllm(output, GEOMETRY, index=1).token_digest == token_digest([100, 101, 102, 7])
    assert sets(masks_from_vllm(output, GEOMETRY).indices().numpy()) == sets(routes[:5])
    with pytest.raises(InputError, match=r"no completion 2 in this output: there are \[1, 0\]"):
        masks_from_vllm(output, GEOMETRY, index=2)


ROUTES = routes_of(GEOMETRY, 9)


@pytest.mark.parametrize(
    ("output", "start", "error", "says"),
    [
        (vllm_output(4, 3, ROUTES[:5]), 0, PairingError, "routes of 5 tokens, but 4 of the prompt and 3 sampled .* 6"),
        (vllm_output(4, 3, ROUTES[:8]), 0, PairingError, "routes of 8 tokens"),
        (vllm_output(4, 3, ROUTES[:2]), 0, PairingError, "routes of 2 tokens"),
        # As many as there would be, with one more, of an engine that knows no start.
        (vllm_output(4, 3, ROUTES[:6]), 1, PairingError, "routes of 6 tokens, .* have 5 from position 1 on"),
        (vllm_output(4, 3, ROUTES[:2], ROUTES[:3]), 0, PairingError, "has 3 rows, but the prompt has 4 tokens, 4 of"),
        (vllm_output(4, 3, ROUTES[:2], ROUTES[:4]), 1, PairingError, "has 4 rows, .* 3 of them from position 1 on"),
        (vllm_output(4, 3, None, ROUTES[:4]), 0, PairingError, "routes of 4 tokens"),
        (vllm_output(4, 3, None), 0, DataError, "enable_return_routed_experts=True"),
        (vllm_output(4, 3, ROUTES[:6].astype(float)), 0, DataError, r"float64 \[6, 2, 3\]"),
        (vllm_output(4, 3, ROUTES[:6, 0]), 0, DataError, r"int32 \[6, 3\]"),
        (vllm_output(4, 3, ROUTES[:6, :1]), 0, PairingError, "1 layers and top-3, this model has 2 MoE layers among 4"),
        (vllm_output(4, 3, ROUTES[:6, :, :2]), 0, PairingError, "2 layers and top-2"),
        (vllm_output(4, 3, ROUTES[:6] + 3), 0, DataError, "not of this model, of 16 experts"),
        (vllm_output(4, 3, ROUTES[:6].repeat(2, 1)), 0, PairingError, r"decoder layers \[0, 2\] have routes"),
        (vllm_output(4, 3, ROUTES[:6]), -1, InputError, "start is -1"),
        ({"choices": []}, 0, InputError, "a dict has no prompt_token_ids and outputs"),
        (None, 0, InputError, "a NoneType has no"),
    ],
)
def test_what_cannot_be_vllms_rows_of_its_tokens(output, start, error, says):
    with pytest.raises(error, match=says):
        masks_from_vllm(output, GEOMETRY, start=start)
