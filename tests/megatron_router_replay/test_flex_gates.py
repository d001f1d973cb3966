"""DeepEP's dispatcher sends tokens to the replayed experts, also where their gates are exactly 0.

Its manager is Megatron's own; of DeepEP, which needs GPUs, stands in what it does for one rank that has all experts.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher as upstream
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, MoETokenDispatcher, _DeepepManager

from cpu_engines.megatron.logprobs import token_logprobs
from megatron_router_replay import attach
from megatron_router_replay.flex_gates import FlexGates
from router_replay.errors import UnsupportedError
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, gradients


@pytest.fixture
def one_rank_of_deepep(monkeypatch):
    """Every token arrives where it was, with its indices and gates; the counts are those of the indices."""

    def fused_dispatch(hidden, indices, gates, num_experts, group, **_):
        counts = torch.bincount(indices[indices >= 0], minlength=num_experts)
        return hidden, indices, gates, counts, "a handle"

    monkeypatch.setattr(upstream, "fused_dispatch", fused_dispatch)
    monkeypatch.setattr(upstream, "fused_combine", lambda hidden, group, handle, **_: (hidden, None))
    monkeypatch.setattr(upstream, "set_deepep_num_sms", lambda count: None)


@pytest.fixture
def build_flex(build_model, one_rank_of_deepep):
    """A model whose MoE layers have a flex dispatcher; its constructor refuses a single rank."""

    def build():
        model = _far_apart(build_model())
        for layer in model.decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.token_dispatcher = _flex_dispatcher(layer.mlp.token_dispatcher)
        return model

    return build


def _flex_dispatcher(allgather):
    config = allgather.config
    dispatcher = object.__new__(MoEFlexTokenDispatcher)
    vars(dispatcher).update(vars(allgather))
    assert dispatcher.tp_size * dispatcher.ep_size == 1
    dispatcher._comm_manager = _DeepepManager(
        group=None,
        num_local_experts=dispatcher.num_local_experts,
        router_topk=config.moe_router_topk,
        num_experts=config.num_moe_experts,
        config=config,
    )
    assert isinstance(dispatcher, MoETokenDispatcher)
    return dispatcher


def _far_apart(model):
    """Logits hundreds apart, so that gates of replayed experts underflow."""
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.weight.data *= 300
    return model


def _managers(model):
    return {
        index: layer.mlp.token_dispatcher._comm_manager
        for index, layer in enumerate(model.decoder.layers)
        if hasattr(layer.mlp, "router")
    }


def _step(model, batch):
    with attach(model, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        logprobs = token_logprobs(model, batch.token_ids)
        logprobs.sum().backward()
    return logprobs.detach(), gradients(model)


def _rows(manager):
    return {place: set(row) for place, row in enumerate(manager.token_indices.tolist())}


def test_experts_whose_gate_is_zero_keep_their_tokens(build_model, build_flex, batch):
    """Outputs and all gradients are bit for bit those of the allgather dispatcher, which goes by the map."""
    model = build_flex()
    with dispatched_maps(model) as maps:
        found, found_gradients = _step(model, batch)
    num_zero = 0
    for layer, manager in _managers(model).items():
        rows = _rows(manager)
        for place, recorded in batch.recorded(layer):
            assert rows[place] == recorded
        assert rows == {place: experts_of(maps[layer][0], place) for place in rows}
        num_zero += int((manager.token_probs == 0).sum())
    assert num_zero > 50
    expected, expected_gradients = _step(_far_apart(build_model()), batch)
    assert torch.equal(found, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(value, found_gradients[name]) for name, value in expected_gradients.items())


def test_stock_swaps_them(build_flex, batch, monkeypatch):
    """What the wrapper is there for."""
    model = build_flex()
    monkeypatch.setattr(FlexGates, "apply", lambda self: None)
    _step(model, batch)
    swapped = [
        place
        for layer, manager in _managers(model).items()
        for place, recorded in batch.recorded(layer)
        if _rows(manager)[place] != recorded
    ]
    assert len(swapped) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_are_the_gates_own(build_flex, dtype):
    """A gate of 0 gets the gradient of what it weights, and experts outside of the map get none."""
    model = build_flex()
    manager = _managers(model)[1]
    gates = torch.tensor([[0.0] * 12 + [0.7, 0.0, 0.3, 0.0], [0.25] * 4 + [0.0] * 12], dtype=dtype, requires_grad=True)
    chosen = torch.zeros(2, 16, dtype=torch.bool)
    chosen[0, [12, 14, 13, 11]] = True
    chosen[1, :4] = True
    with attach(model):
        manager.setup_metadata(chosen.view(2, 1, 16), gates.view(2, 1, 16))
    assert _rows(manager) == {0: {11, 12, 13, 14}, 1: {0, 1, 2, 3}}
    assert torch.equal(manager.token_probs, gates.gather(1, manager.token_indices))
    pull = torch.arange(1.0, 9.0, dtype=dtype).view(2, 4)
    (manager.token_probs * pull).sum().backward()
    assert torch.equal(gates.grad, torch.zeros_like(gates).scatter(1, manager.token_indices, pull))


def test_native_choices_are_stocks(build_flex, batch):
    """Indices, their order, gates and gradients, since the wrapper stays in during off()."""
    stock, attached = build_flex(), build_flex()
    for model in (stock, attached):
        for layer in _managers(model):
            model.decoder.layers[layer].mlp.router.weight.data /= 300
    expected = token_logprobs(stock, batch.token_ids)
    expected.sum().backward()
    with attach(attached) as replay, replay.off():
        found = token_logprobs(attached, batch.token_ids)
        found.sum().backward()
    assert torch.equal(found, expected)
    for layer, manager in _managers(stock).items():
        assert torch.equal(_managers(attached)[layer].token_indices, manager.token_indices)
    assert all(torch.equal(value, gradients(attached)[name]) for name, value in gradients(stock).items())


def test_remove_takes_the_wrappers_out_and_leaves_those_of_others(build_flex):
    model = build_flex()
    first, second, third = _managers(model).values()
    replay = attach(model)
    assert all("setup_metadata" in vars(manager) for manager in (first, second, third))
    theirs = second.setup_metadata = lambda routing_map, probs: None
    del third.setup_metadata
    replay.remove()
    assert "setup_metadata" not in vars(first)
    assert second.setup_metadata is theirs
    assert "setup_metadata" not in vars(third)


def test_another_backend_is_refused(build_flex):
    """By the live dispatcher, since a configuration may have changed after the model was built."""
    model = build_flex()

    class _HybridEPManager(upstream._HybridEPManager):
        def __init__(self) -> None:
            pass

    model.decoder.layers[2].mlp.token_dispatcher._comm_manager = _HybridEPManager()
    with pytest.raises(UnsupportedError, match=r"built with a _HybridEPManager: build it with .*'deepep'.*'alltoall'"):
        attach(model)
    assert all("setup_metadata" not in vars(manager) for manager in _managers(model).values())
    assert model.decoder.layers[1].mlp.router.router_replay is None
