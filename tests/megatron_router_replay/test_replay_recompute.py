"""Invariant: a recompute routes as its own forward pass did, in whatever order the backward passes run."""

from __future__ import annotations

import ast
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from cpu_engines.megatron import qwen3_moe
from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from router_replay.errors import CallOrderError
from router_replay.replay.binding import current
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, gradients, random_batch

RECOMPUTE = {
    "full, uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full, two layers at once": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "full, block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    "selective, moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "selective, moe and attention": {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]},
}
# Modules whose bodies hold no router, so that there is nothing to carry.
WITHOUT_ROUTERS = {
    "selective, core_attn": ["core_attn"],
    "selective, mlp (of dense layers)": ["mlp"],
    "selective, shared_experts": ["shared_experts"],
    "selective, all of these": ["core_attn", "mlp", "shared_experts"],
}
ORDERS = {"first in first out": (0, 1), "last in first out": (1, 0)}


@pytest.fixture
def batches(geometry):
    return random_batch(geometry, (12, 9, 5), seed=21), random_batch(geometry, (12, 7, 6), seed=22)


def _forward(model, replay, batch):
    with replay.microbatch(batch.masks, batch.layout):
        logprobs = token_logprobs(model, batch.token_ids)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(5))
    return (logprobs * weights).sum()


def _train(model, batches, order):
    with attach(model, overlap_every=None) as replay:
        losses = [_forward(model, replay, batch) for batch in batches]
        for index in order:
            losses[index].backward()
    return gradients(model)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_gradients_are_bitwise_those_without_recompute(build_model, batches, dispatcher, recompute, order):
    plain = _train(build_model(moe_token_dispatcher_type=dispatcher), batches, ORDERS[order])
    recomputed = _train(
        build_model(moe_token_dispatcher_type=dispatcher, **RECOMPUTE[recompute]), batches, ORDERS[order]
    )
    assert plain.keys() == recomputed.keys()
    different = [name for name in plain if not torch.equal(plain[name], recomputed[name])]
    assert different == []


@pytest.mark.parametrize("modules", WITHOUT_ROUTERS.values(), ids=WITHOUT_ROUTERS)
def test_recompute_of_what_holds_no_router_asks_none(build_model, batches, modules, monkeypatch):
    # The checkpoint that the model is filled from has no shared experts.
    monkeypatch.setattr(qwen3_moe, "_fill", _fill_at_random)
    plain = _train(build_model(moe_shared_expert_intermediate_size=24), batches, (0, 1))
    model = build_model(
        moe_shared_expert_intermediate_size=24, recompute_granularity="selective", recompute_modules=list(modules)
    )
    ran = []
    model.decoder.layers[2].mlp.shared_experts.register_forward_hook(lambda *call: ran.append(call))
    with dispatched_maps(model) as maps:
        recomputed = _train(model, batches, (0, 1))
    assert len(ran) == len(batches) * (2 if "shared_experts" in modules else 1)
    assert [len(seen) for seen in maps.values()] == [len(batches)] * 3
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []


def _fill_at_random(model, tensors, config):
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.06, generator=generator)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_megatrons_other_checkpoint_never_gets_a_router():
    """CheckpointWithoutOutput, which needs Transformer Engine even in bfloat16, and of which nothing is wrapped."""
    root = Path(megatron.core.__path__[0])
    trees = {path: ast.parse(path.read_text()) for path in root.rglob("*.py")}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    checkpoints = {
        owner.name
        for owner in nodes
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and "run_function" in [each.arg for each in method.args.args]
    }
    assert checkpoints == {"CheckpointFunction", "CheckpointWithoutOutputFunction", "CheckpointWithoutOutput"}
    handed = {
        ast.unparse(node.args[0])
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "checkpoint"
        and ast.unparse(node.func.value).endswith("_checkpoint")
    }
    assert handed == {
        "apply_module(self.input_layernorm)",
        "apply_module(self.pre_mlp_layernorm)",
        "apply_module(layer.pre_mlp_layernorm)",
        "qkv_up_proj_and_rope_apply",
        "bias_act_func",
        "norm_func",
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_dispatches_the_masks_of_its_own_forward(build_model, batches, recompute, order):
    model = build_model(**RECOMPUTE[recompute])
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        losses = [_forward(model, replay, batch) for batch in batches]
        forward_maps = {layer: list(seen) for layer, seen in maps.items()}
        for index in ORDERS[order]:
            for seen in maps.values():
                seen.clear()
            losses[index].backward()
            for layer, seen in maps.items():
                # Block recompute checkpoints the first three layers only: layer 3 is not computed again.
                assert len(seen) == (0 if recompute == "full, block" and layer == 3 else 1)
                for again in seen:
                    recorded = dict(batches[index].recorded(layer))
                    assert {place: experts_of(again, place) for place in recorded} == recorded
                    assert torch.equal(again, forward_maps[layer][index])


def test_backward_inside_another_microbatch_keeps_both(build_model, batches):
    """1F1B may run a backward pass while the next microbatch is bound."""
    first, second = batches
    model = build_model(**RECOMPUTE["full, uniform"])
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = _forward(model, replay, first)
        with replay.microbatch(second.masks, second.layout):
            loss.backward()
            token_logprobs(model, second.token_ids)
    for layer, (_, again, after) in maps.items():
        assert {place: experts_of(again, place) for place, _ in first.recorded(layer)} == dict(first.recorded(layer))
        assert {place: experts_of(after, place) for place, _ in second.recorded(layer)} == dict(second.recorded(layer))


@pytest.mark.parametrize("recompute", ["full, uniform", "full, two layers at once", "selective, moe"])
def test_native_choice_is_frozen_for_the_recompute(build_model, batches, recompute):
    """Router weights change between forward and backward: native places still repeat the forward pass's choice."""
    batch, _ = batches
    model = build_model(**RECOMPUTE[recompute])
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = _forward(model, replay, batch)
        for layer in batch.geometry.moe_layers:
            model.decoder.layers[layer].mlp.router.weight.data.neg_()
        loss.backward()
        with replay.off():
            token_logprobs(model, batch.token_ids)
    for forward, again, negated in maps.values():
        assert torch.equal(forward, again)
        assert not torch.equal(forward[batch.native()], negated[batch.native()])


def test_nested_checkpoints_freeze_native_choices_too(build_model, batches):
    """A checkpoint inside a recomputed region runs its own forward pass during the outer recompute."""
    from megatron.core import tensor_parallel

    batch, _ = batches
    model = build_model(**RECOMPUTE["selective, moe"])
    ids = batch.token_ids
    hidden = torch.randn(ids.shape[1], ids.shape[0], 48, generator=torch.Generator().manual_seed(6), requires_grad=True)
    layer = model.decoder.layers[2]
    moe = layer.mlp
    with attach(layer, overlap_every=None) as replay, dispatched_maps(model) as maps:
        with replay.microbatch(batch.masks, batch.layout):
            output = tensor_parallel.checkpoint(lambda x: moe(x)[0], False, hidden)
        moe.router.weight.data.neg_()
        output.sum().backward()
    assert len(maps[2]) == 3
    assert torch.equal(maps[2][0], maps[2][1]) and torch.equal(maps[2][0], maps[2][2])


def test_native_pass_recomputes_natively(build_model, batches):
    batch, _ = batches
    untouched, attached = (build_model(**RECOMPUTE["full, uniform"]) for _ in range(2))
    token_logprobs(untouched, batch.token_ids).sum().backward()
    with attach(attached, overlap_every=None) as replay:
        with replay.off():
            loss = token_logprobs(attached, batch.token_ids).sum()
        loss.backward()
    expected = gradients(untouched)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(attached).items())


def test_remove_between_forward_and_recompute_is_refused(build_model, batches):
    batch, _ = batches
    model = build_model(**RECOMPUTE["full, uniform"])
    replay = attach(model, overlap_every=None)
    loss = _forward(model, replay, batch)
    replay.remove()
    try:
        with pytest.raises(CallOrderError, match=r"call remove\(\) after the backward pass"):
            loss.backward()
    finally:
        # Megatron leaves its flag set when a recompute raises.
        megatron_random._unset_checkpointing()


@pytest.mark.parametrize("recompute", ["full, uniform", "selective, moe"])
def test_after_an_error_in_a_recompute_nothing_is_left_bound(build_model, batches, recompute):
    first, second = batches
    model = build_model(**RECOMPUTE[recompute])
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        loss = _forward(model, replay, first)
        with replay.microbatch(second.masks, second.layout):
            stop = model.decoder.layers[2].mlp.router.register_forward_pre_hook(_stop)
            try:
                with pytest.raises(KeyError):
                    loss.backward()
            finally:
                # Megatron leaves its flag set when a recompute raises.
                megatron_random._unset_checkpointing()
            stop.remove()
            assert current().frames == () and len(current().bindings) == 1
            for seen in maps.values():
                seen.clear()
            token_logprobs(model, second.token_ids)
        assert current().frames == () and dict(current().bindings) == {}
    for layer, (after,) in maps.items():
        assert {place: experts_of(after, place) for place, _ in second.recorded(layer)} == dict(second.recorded(layer))


def _stop(module, args):
    raise KeyError("the recompute stops here")


def test_observed_routes_are_of_the_forward_pass_alone(build_model, batches):
    batch, _ = batches
    model = build_model(**RECOMPUTE["full, uniform"])
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps, replay.observe() as observed:
        _forward(model, replay, batch).backward()
    assert all(len(seen) == 2 for seen in maps.values())
    for routes, length in zip(observed.indices(batch.layout), batch.lengths, strict=True):
        assert routes.shape == (length, 3, 4)
