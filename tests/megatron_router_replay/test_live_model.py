"""Routers are told by chunk and by their decoder layer in the whole model, under every split that Megatron has."""

from __future__ import annotations

import json

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.module import Float16Module

from cpu_engines.megatron.qwen3_moe import megatron_config
from megatron_router_replay import attach
from megatron_router_replay.live_model import find_routers, live_layers
from router_replay.errors import InputError
from router_replay.masks.geometry import RoutingGeometry
from tests.megatron_router_replay.batches import random_batch
from tests.megatron_router_replay.stages import pipeline_rank

EIGHT = {"num_layers": 8, "moe_layer_freq": [0, 1, 1, 0, 1, 1, 1, 0]}
MOE_LAYERS = (1, 2, 4, 5, 6)


@pytest.fixture
def build_stage(checkpoint):
    """A function that builds the chunks that one rank of a pipeline of `size` holds, `chunks` of them."""
    hf_config = json.loads((checkpoint / "config.json").read_text())

    def build(rank: int, size: int, chunks: int = 1, **overrides) -> list[GPTModel]:
        settings = {"pipeline_model_parallel_size": size, "pipeline_dtype": torch.float32, **EIGHT, **overrides}
        if chunks > 1:
            settings["virtual_pipeline_model_parallel_size"] = chunks
        config = megatron_config(hf_config, torch.float32, **settings)
        return [_chunk(config, rank, size, stage if chunks > 1 else None, chunks) for stage in range(chunks)]

    return build


def _chunk(config, rank: int, size: int, stage: int | None, chunks: int) -> GPTModel:
    with pipeline_rank(rank, size, chunks) as groups:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage, pp_rank=rank
        )
        mtp = None
        if config.mtp_num_layers:
            layer = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization="RMSNorm")[1]
            mtp = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False, vp_stage=stage, pp_rank=rank)
        return GPTModel(
            config,
            spec,
            vocab_size=96,
            max_sequence_length=256,
            position_embedding_type="rope",
            pre_process=rank == 0 and not stage,
            post_process=rank == size - 1 and (stage or 0) == chunks - 1,
            mtp_block_spec=mtp,
            pg_collection=groups,
            vp_stage=stage,
        )


@pytest.mark.parametrize(
    ("size", "chunks", "overrides", "expected"),
    [
        (2, 1, {}, [[(1, 2)], [(4, 5, 6)]]),
        (4, 1, {}, [[(1,)], [(2,)], [(4, 5)], [(6,)]]),
        # Chunks alternate between the ranks.
        (2, 2, {}, [[(1,), (4, 5)], [(2,), (6,)]]),
        (2, 4, {}, [[(), (2,), (4,), (6,)], [(1,), (), (5,), ()]]),
        (
            3,
            1,
            {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
            [[()], [(1, 2, 4)], [(5, 6)]],
        ),
        (
            2,
            1,
            {"account_for_embedding_in_pipeline_split": True, "num_layers": 7, "moe_layer_freq": [0, 1, 1, 0, 1, 1, 1]},
            [[(1, 2)], [(4, 5, 6)]],
        ),
        (2, 2, {"pipeline_model_parallel_layout": "Et|tttt|t|ttL"}, [[(), (5,)], [(1, 2, 4), (6,)]]),
        # Embedding and loss each have a stage of their own.
        (4, 1, {"pipeline_model_parallel_layout": "E|ttt|ttttt|L"}, [[()], [(1, 2)], [(4, 5, 6)], [()]]),
    ],
    ids=[
        "PP 2",
        "PP 4",
        "PP 2 x VPP 2",
        "PP 2 x VPP 4",
        "uneven",
        "embedding counted as a layer",
        "layout",
        "standalone stages",
    ],
)
def test_layers_are_the_whole_models(build_stage, size, chunks, overrides, expected):
    found = []
    for rank in range(size):
        models = build_stage(rank, size, chunks, **overrides)
        geometry, by_chunk = live_layers(models)
        assert geometry.moe_layers == MOE_LAYERS
        found.append([tuple(routers) for routers in by_chunk])
        for model, routers in zip(models, by_chunk, strict=True):
            for layer, router in routers.items():
                assert router.layer_number == layer + 1
                assert any(module is router for module in model.modules())
        with attach(models) as replay:
            assert replay.geometry == geometry
            assert sorted(replay.layers) == sorted(layer for routers in by_chunk for layer in routers)
    assert found == expected


def test_a_stage_of_mtp_has_no_routers(build_stage):
    """Its router counts from 1 and would pass for that of decoder layer 0."""
    layout = {"pipeline_model_parallel_layout": "Ettt|ttttt|mL", "mtp_num_layers": 1}
    found = []
    for rank in range(3):
        (model,) = build_stage(rank, 3, **layout)
        _, (routers,) = live_layers([model])
        found.append(tuple(routers))
    assert found == [(1, 2), (4, 5, 6), ()]
    (router,) = [module for name, module in model.named_modules() if name.endswith("router")]
    assert router.layer_number == 1
    with attach(model) as replay:
        assert replay.layers == ()
        assert router.router_replay is None


def test_a_stage_without_moe_layers_has_no_routers(build_stage, geometry):
    """It is attached all the same, so that one program serves all ranks."""
    (model,) = build_stage(0, 4, pipeline_model_parallel_layout="E|ttt|ttttt|L")
    batch = random_batch(RoutingGeometry(8, MOE_LAYERS, 16, 4), (6, 4), seed=3)
    with attach(model) as replay:
        assert replay.layers == ()
        assert replay.geometry == batch.geometry
        with replay.microbatch(batch.masks, batch.layout) as routes:
            assert routes.num_replayed == sum(int(one.valid.sum()) for one in batch.masks)
        with replay.off():
            pass
    assert not replay.attached


@pytest.mark.parametrize("wrapper", ["Float16Module", "DistributedDataParallel", "both", "beside another tower"])
def test_the_configuration_is_the_language_models(build_stage, build_model, wrapper):
    """Also where it has no router to read it from."""
    (model,) = build_stage(0, 4, pipeline_model_parallel_layout="E|ttt|ttttt|L", bf16=True)
    config = model.config
    if wrapper in ("Float16Module", "both"):
        model = Float16Module(config, model)
    if wrapper in ("DistributedDataParallel", "both"):
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    if wrapper == "beside another tower":
        model = torch.nn.ModuleDict({"vision": build_model().decoder, "language_model": model})
        model["vision"].layers = torch.nn.ModuleList()
    geometry, (routers,) = live_layers([model])
    assert geometry.moe_layers == MOE_LAYERS
    assert routers == {}


def test_chunks_keep_their_routers_apart(build_stage):
    models = build_stage(0, 2, chunks=2)
    routers = find_routers(models)
    assert [list(of_chunk) for of_chunk in routers] == [[1], [4, 5]]
    assert find_routers(models[::-1]) == routers[::-1]
    with pytest.raises(InputError, match="pass every model chunk once"):
        find_routers([models[0], models[0]])


def test_what_has_no_configuration(build_stage):
    with pytest.raises(InputError, match=r"a Linear was given whose modules have no TransformerConfig.*pass Megatron"):
        attach(torch.nn.Linear(2, 2))
    first, second = build_stage(0, 2)[0], build_stage(1, 2, moe_layer_freq=[1] * 8)[0]
    with pytest.raises(InputError, match=r"chunk 0 is of a model with MoE layers \[1, 2, 4, 5, 6\].*attach each"):
        attach([first, second])
