"""The oracle itself: the rows of a run in bfloat16 pass it, and no row of another token does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from router_replay.masks import RoutingGeometry, RoutingMasks, get_codec, token_digest
from tests.sglang_router_capture.oracle import assert_rows_are_of
from tests.sglang_router_capture.requests import prompt

GEOMETRY = RoutingGeometry(num_layers=6, moe_layers=(1, 2, 3, 4, 5), num_experts=32, top_k=4)
IDS = prompt(71, 60)


@pytest.fixture(scope="module")
def reference(small_model: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def masks(small_model: Path) -> RoutingMasks:
    """What Hugging Face's model chooses in bfloat16: an engine of the same precision, by another way."""
    model = Qwen3MoeForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.tensor([IDS[:-1]]), output_router_logits=True).router_logits
    experts = torch.stack([layer.topk(4).indices for layer in logits], dim=1)
    codec = get_codec("rank")
    return RoutingMasks(
        rows=codec.pack(experts.short(), GEOMETRY),
        valid=torch.ones(len(IDS) - 1, dtype=torch.bool),
        start=0,
        geometry=GEOMETRY,
        codec="rank",
        weight_versions=((0, "default"),),
        token_digest=token_digest(IDS[:-1]),
    )


def test_what_rounding_decides_passes(reference: Qwen3MoeForCausalLM, masks: RoutingMasks) -> None:
    assert_rows_are_of(reference, masks, IDS)
    with torch.no_grad():
        logits = reference(torch.tensor([IDS[:-1]]), output_router_logits=True).router_logits
    exact = torch.stack([layer.topk(4).indices for layer in logits], dim=1).sort(-1).values
    # Near-ties did fall the other way: without telling them apart, this would have been a failure.
    assert not torch.equal(exact, masks.indices().long().sort(-1).values)


def test_no_single_row_of_another_token_passes(reference: Qwen3MoeForCausalLM, masks: RoutingMasks) -> None:
    for position in range(0, masks.num_tokens, 5):
        rows = masks.rows.clone()
        rows[position] = masks.rows[(position + 7) % masks.num_tokens]
        # Later tokens attend to what its experts made, and may be flagged with it; none is as far off.
        with pytest.raises(AssertionError, match=f"the worst, of position {position}, names an expert"):
            assert_rows_are_of(reference, dataclasses.replace(masks, rows=rows), IDS)


def test_exchanged_layers_do_not_pass(reference: Qwen3MoeForCausalLM, masks: RoutingMasks) -> None:
    rows = get_codec("rank").pack(masks.indices()[:, [1, 0, 2, 3, 4]], GEOMETRY)
    with pytest.raises(AssertionError, match="59 of 59 rows"):
        assert_rows_are_of(reference, dataclasses.replace(masks, rows=rows), IDS)


def test_a_row_that_is_not_valid_does_not_pass(reference: Qwen3MoeForCausalLM, masks: RoutingMasks) -> None:
    valid = masks.valid.clone()
    valid[3] = False
    with pytest.raises(AssertionError, match="the first of position 3"):
        assert_rows_are_of(reference, dataclasses.replace(masks, valid=valid), IDS)
