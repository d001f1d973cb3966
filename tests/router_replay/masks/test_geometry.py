"""The geometry itself, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from router_replay.errors import InputError, PairingError, UnsupportedError
from router_replay.masks import RoutingGeometry

MOE = {"num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, (1, 2, 4, 5)),
        ({"decoder_sparse_step": 2}, (1, 3, 5)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}, (1, 2, 4, 5)),
        ({"mlp_only_layers": [0]}, (1, 2, 3, 4, 5)),
        ({"moe_layers": [5, 1]}, (1, 5)),
        ({"interleave_moe_layer_step": 3}, (2, 5)),
        ({"moe_layers_enum": "3,4, 5"}, (3, 4, 5)),
        ({"moe_layers_enum": [3, 4]}, (3, 4)),
        ({"moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 4}, (3,)),
        ({"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, (1, 2, 3, 4, 5)),
        ({"num_dense_layers": 2}, (2, 3, 4, 5)),
        ({"expert_layer_period": 3, "expert_layer_offset": 1}, (1, 4)),
        ({"hybrid_override_pattern": "ME*E-E"}, (1, 3, 5)),
        ({"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "moe"]}, (1, 3, 5)),
        ({"layers_block_type": ["mamba", "attention"] * 3, "expert_layer_period": 2}, (0, 2, 4)),
        ({"mlp_layer_types": ["dense", "sparse", "moe", "sparse", "sparse", "dense"]}, (1, 2, 3, 4)),
        ({"enable_moe_block": True}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_each_rule(fields, layers):
    expected = RoutingGeometry(6, layers, 8, 2)
    assert RoutingGeometry.from_hf_config({**MOE, **fields}) == expected
    assert RoutingGeometry.from_hf_config(SimpleNamespace(**MOE, **fields)) == expected
    assert RoutingGeometry.from_hf_config({"text_config": {**MOE, **fields}, "num_hidden_layers": 99}) == expected


@pytest.mark.parametrize("experts", ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"])
@pytest.mark.parametrize(
    "top_k", ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"]
)
@pytest.mark.parametrize("layers", ["num_hidden_layers", "num_layers"])
def test_each_spelling(layers, experts, top_k):
    assert RoutingGeometry.from_hf_config({layers: 3, experts: 16, top_k: 4}) == RoutingGeometry(3, (0, 1, 2), 16, 4)


def test_the_number_of_layers_may_come_from_their_kinds():
    config = {"layers_block_type": ["linear_attention", "moe", "mlp"], "n_routed_experts": 8, "num_experts_per_tok": 2}
    assert RoutingGeometry.from_hf_config(config) == RoutingGeometry(3, (1,), 8, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"first_k_dense_replace": 1, "mlp_layer_types": ["sparse"] * 6},
            r"mlp_layer_types says \[0, .*freq says \[1, ",
        ),
        ({"decoder_sparse_step": 2, "moe_layers": [0]}, r"decoder_sparse_step says \[1, 3, 5\]; moe_layers says \[0\]"),
        ({"n_routed_experts": 16}, r"contradicts itself.*'num_experts': 8.*'n_routed_experts': 16"),
        ({"moe_topk": 4}, r"contradicts itself.*'num_experts_per_tok': 2.*'moe_topk': 4"),
        ({"num_layers": 3}, r"contradicts itself.*'num_hidden_layers': 6.*'num_layers': 3"),
        ({"moe_layer_freq": [1, 1]}, r"moe_layer_freq lists 2 layers, .* 6 decoder layers"),
        ({"hybrid_override_pattern": "ME"}, r"hybrid_override_pattern lists 2 layers, .* 6"),
        ({"mlp_layer_types": ["dense", "odd"] * 3}, r"\['odd'\]"),
        ({"moe_layers_enum": "4,5,6"}, r"within \[0, 6\)"),
        ({"num_experts_per_tok": 9}, r"top_k is 9.*num_experts 8"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(InputError, match=message):
        RoutingGeometry.from_hf_config({**MOE, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hash_layers": 3}, r"3 layers .* hash of the token id"),
        ({"mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 4}, r"2 layers .* hash of the token id"),
        ({"zero_expert_num": 4}, r"4 experts without weights"),
        ({"decoder_sparse_step": 0}, r"0 of 6.*dense model"),
        ({"enable_moe_block": False}, r"0 of 6.*dense model"),
        ({"num_experts": [8, 8]}, r"num_experts is \[8, 8\]: .* 6 decoder layers"),
        ({"num_experts": 2048, "num_experts_per_tok": 8}, "top-8 of 2048 experts: .* up to 1024 experts and top-64"),
        ({"num_experts": 128, "num_experts_per_tok": 65}, "top-65 of 128 experts: .* up to 1024 experts and top-64"),
        (
            {"num_experts_per_tok": [2, 2, 2, 2, 2, 3]},
            r"num_experts_per_tok is \[2, 2, 2, 2, 2, 3\]: .* one top-k in all",
        ),
    ],
)
def test_models_that_masks_do_not_cover(fields, message):
    with pytest.raises(UnsupportedError, match=message):
        RoutingGeometry.from_hf_config({**MOE, **fields})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "num_hidden_layers": 6},
        {"model_type": "llama", "num_hidden_layers": 6, "num_experts": None, "num_experts_per_tok": 2},
        {"model_type": "llama", "num_hidden_layers": 6, "num_local_experts": 0, "num_experts_per_tok": 0},
    ],
)
def test_a_dense_model_is_named_as_such(config):
    with pytest.raises(UnsupportedError, match=r"dense model \(llama\)"):
        RoutingGeometry.from_hf_config(config)


def test_a_list_of_one_number_for_every_layer_is_that_number():
    config = {"num_hidden_layers": 6, "num_experts": [8] * 6, "moe_topk": [2] * 6}
    assert RoutingGeometry.from_hf_config(config) == RoutingGeometry.from_hf_config(MOE)


def test_a_configuration_without_layers_is_refused():
    with pytest.raises(InputError, match="num_hidden_layers"):
        RoutingGeometry.from_hf_config({"vision_config": {}})


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), (-1, 0), (0, 4)])
def test_impossible_layers(layers):
    with pytest.raises(InputError, match="must be ascending, distinct and within"):
        RoutingGeometry(4, layers, 8, 2)


def test_a_model_without_routed_layers_is_refused():
    with pytest.raises(UnsupportedError, match=r"no decoder layer of this model routes tokens \(0 of 4\)"):
        RoutingGeometry(4, (), 8, 2)


def test_slots():
    geometry = RoutingGeometry(6, (1, 3, 4), 8, 2)
    assert [geometry.index_of(layer) for layer in geometry.moe_layers] == [0, 1, 2]
    with pytest.raises(PairingError, match=r"decoder layer 2 .*\(1, 3, 4\)"):
        geometry.index_of(2)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (RoutingGeometry(7, (1, 3, 4), 8, 2), "rollout has 6 decoder layers, trainer has 7"),
        (RoutingGeometry(6, (1, 3), 8, 2), r"\[4\] route in rollout but not in trainer"),
        (RoutingGeometry(6, (1, 3, 5), 8, 2), r"\[4\] route in rollout .*\[5\] route in trainer but not in rollout"),
        (RoutingGeometry(6, (1, 3, 4), 9, 2), "rollout has 8 experts, trainer has 9"),
        (RoutingGeometry(6, (1, 3, 4), 8, 3), r"rollout has 2 experts per token \(top-k\), trainer has 3"),
    ],
)
def test_a_mismatch_names_both_sides(other, message):
    geometry = RoutingGeometry(6, (1, 3, 4), 8, 2)
    geometry.require_same(RoutingGeometry(6, (1, 3, 4), 8, 2), "rollout", "trainer")
    with pytest.raises(PairingError, match=message):
        geometry.require_same(other, "rollout", "trainer")
