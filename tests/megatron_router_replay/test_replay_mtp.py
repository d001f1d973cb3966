"""Multi-token-prediction routers count their layers from 1 again; replay leaves them alone."""

from __future__ import annotations

import json

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

from cpu_engines.megatron.qwen3_moe import megatron_config
from megatron_router_replay import attach


def test_mtp_routers_are_left_alone(checkpoint, batch):
    hf_config = json.loads((checkpoint / "config.json").read_text())
    config = megatron_config(
        hf_config, torch.float32, mtp_num_layers=1, perform_initialization=True, init_method_std=0.06
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    model = GPTModel(
        config,
        spec,
        vocab_size=96,
        max_sequence_length=256,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    mtp_routers = [module for name, module in model.named_modules() if "mtp" in name and name.endswith("router")]
    assert [router.layer_number for router in mtp_routers] == [1]
    ids = batch.token_ids
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    with attach(model, overlap_every=None) as replay:
        assert replay.layers == (1, 2, 3)
        assert mtp_routers[0].router_replay is None
        with replay.microbatch(batch.masks, batch.layout), replay.observe() as observed:
            model(ids, positions, mask, labels=ids).sum().backward()
    assert mtp_routers[0].weight.grad.abs().max() > 0
    routes = observed.indices(batch.layout)
    for one, recorded, found in zip(batch.masks, batch.indices, routes, strict=True):
        found = found[: one.num_tokens][one.valid]
        assert torch.equal(found.sort(-1).values, recorded[one.valid].sort(-1).values)
