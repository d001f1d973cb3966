"""Shared experts see every token; replay moves routed ones only, with and without the overlap of both."""

from __future__ import annotations

import json

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from cpu_engines.megatron.logprobs import token_logprobs
from cpu_engines.megatron.qwen3_moe import megatron_config
from megatron_router_replay import attach
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, gradients

OVERLAP = {"moe_shared_expert_overlap": True}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]}


@pytest.fixture
def build_shared(checkpoint):
    """A function that builds the checkpoint's architecture with a gated shared expert; equal weights in every call."""
    hf_config = json.loads((checkpoint / "config.json").read_text())

    def build(**overrides):
        config = megatron_config(
            hf_config,
            torch.float32,
            moe_shared_expert_intermediate_size=32,
            moe_shared_expert_gate=True,
            moe_token_dispatcher_type="alltoall",
            **overrides,
        )
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
        model = GPTModel(config, spec, vocab_size=96, max_sequence_length=256, position_embedding_type="rope")
        # Recompute and overlap must not change the weights that are drawn.
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.06, generator=generator)
        return model

    yield build
    # Megatron keeps the stream of overlapped shared experts on the class.
    SharedExpertMLP.stream = None


def _step(model, batch):
    with (
        attach(model, overlap_every=None) as replay,
        replay.microbatch(batch.masks, batch.layout),
        dispatched_maps(model) as maps,
    ):
        logprobs = token_logprobs(model, batch.token_ids)
        logprobs.sum().backward()
    return logprobs.detach(), gradients(model), maps


def test_recorded_rows_are_dispatched_beside_shared_experts(build_shared, batch):
    model = build_shared()
    found, _, maps = _step(model, batch)
    for layer in (1, 2, 3):
        recorded = dict(batch.recorded(layer))
        assert {place: experts_of(maps[layer][0], place) for place in recorded} == recorded
        shared = model.decoder.layers[layer].mlp.shared_experts
        assert shared.linear_fc2.weight.grad.abs().max() > 0
        shared.linear_fc2.weight.data.zero_()
    assert not torch.allclose(_step(model, batch)[0], found)


@pytest.mark.parametrize("settings", [OVERLAP, RECOMPUTE], ids=["overlap", "recompute"])
def test_routes_and_numbers_are_the_same_under_overlap_and_recompute(build_shared, batch, settings):
    expected, expected_gradients, expected_maps = _step(build_shared(), batch)
    found, found_gradients, maps = _step(build_shared(**settings), batch)
    for layer, (one,) in expected_maps.items():
        assert torch.equal(maps[layer][0], one)
    assert torch.equal(found, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    # Router and shared experts then add their gradients to the hidden states' in another order (Megatron says so of the
    # overlap). A sum of three float32 terms moves by 2 roundings at most, in each of 3 MoE layers; 10 for what
    # cancellation in it and the layers before make of that. A single token routed otherwise would be 1e-2.
    for name, value in expected_gradients.items():
        assert (found_gradients[name] - value).norm() <= 3 * 2 * 10 * 2**-24 * value.norm(), name
