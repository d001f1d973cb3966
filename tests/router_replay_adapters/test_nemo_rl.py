"""Rows that nobody recorded, as a server answers them, in NeMo-RL's own replay on Megatron's own router."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from router_replay.masks import RoutingGeometry, get_codec
from sglang_router_capture.sglang_format import packed, unpacked
from tests.router_replay_adapters.routers import (
    KNOWN,
    NUM_EXPERTS,
    RECORDED,
    SCORES,
    TOP_K,
    UNKNOWN,
    expected_experts,
    experts_of,
    gradients_of,
    hidden_states,
    own_experts,
    own_topk,
    stock_router,
)

# Decoder layer 0 is dense, and a server sends zeros for it.
_LAYERS = {"num_layers": 2, "moe_layer_freq": [0, 1], "moe_enable_routing_replay": True}


@pytest.fixture
def nemo_rl(nemo_rl_router_replay: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its module; what it puts into the place of a function of Megatron is gone with the test."""
    monkeypatch.setattr(RouterReplay, "get_replay_topk", RouterReplay.get_replay_topk)
    return nemo_rl_router_replay


def _router(**settings: object) -> TopKRouter:
    """The router of decoder layer 1, with Megatron's own replay; by its configuration it passes for the whole model."""
    made = stock_router(**_LAYERS, **settings)
    made.set_layer_number(2)
    return made


def _answered(experts: Tensor = RECORDED) -> Tensor:
    """Experts `int [T, K]` as a server answers them, in the form of NeMo-RL's batches: `int8 [1, T, layers, K]`."""
    geometry = RoutingGeometry(num_layers=2, moe_layers=(1,), num_experts=NUM_EXPERTS, top_k=TOP_K)
    codec = get_codec("ordered")
    valid = (experts >= 0).all(-1)
    rows = codec.pack(torch.where(valid[:, None], experts, torch.arange(TOP_K))[:, None].int(), geometry)
    routes = unpacked(packed(rows, valid, geometry, codec))
    assert torch.equal(routes[:, 1], experts.int()) and (routes[:, 0] == 0).all()
    return routes[None].to(torch.int8)


def test_megatrons_replay_without_its_rule_fails(nemo_rl: ModuleType) -> None:
    made = _router()
    made.router_replay.set_target_indices(RECORDED.long())
    made.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        made(hidden_states(len(RECORDED)))


@pytest.mark.parametrize("settings", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("of_all_layers", [True, False])
def test_unknown_rows_are_native_and_known_ones_replayed(
    nemo_rl: ModuleType, settings: dict[str, object], of_all_layers: bool
) -> None:
    made, states = _router(**settings), hidden_states(len(RECORDED))
    if made.expert_bias is not None:
        made.expert_bias.copy_(torch.linspace(-2, 2, NUM_EXPERTS))
    own = experts_of(made(states)[1])
    assert all(own[row] != set(RECORDED[row].tolist()) for row in KNOWN)
    routes = _answered() if of_all_layers else _answered()[:, :, 1:]
    nemo_rl.set_router_replay_forward(made, routes)
    probs, routing_map = made(states)
    assert experts_of(routing_map) == expected_experts(own)
    assert torch.equal(probs != 0, routing_map)


def test_a_recompute_takes_the_experts_of_its_forward_pass(nemo_rl: ModuleType) -> None:
    """Two microbatches whose passes overlap, and weights that would choose otherwise in between."""
    made = _router()
    inputs = [hidden_states(len(RECORDED)), hidden_states(len(RECORDED)).detach().flip(0).requires_grad_()]
    own = [own_experts(made, states) for states in inputs]
    chosen: list[list[set[int]]] = []
    made.register_forward_hook(lambda module, args, output: chosen.append(experts_of(output[1])))
    outputs = []
    for states in inputs:
        nemo_rl.set_router_replay_forward(made, _answered())
        outputs.append(checkpoint(made, states, use_reentrant=True)[0])
        nemo_rl.set_router_replay_backward(made)
    with torch.no_grad():
        made.weight.neg_()
    assert own_experts(made, inputs[0]) != own[0]
    for output in outputs:
        output.square().sum().backward()
    forward, recompute = chosen[:2], chosen[2:]
    assert forward == [expected_experts(each) for each in own]
    assert recompute == forward


def test_gradients_are_those_of_the_same_experts_recorded(nemo_rl: ModuleType) -> None:
    gradients = []
    experts = RECORDED.clone()
    for whole in (False, True):
        made, states = _router(), hidden_states(len(RECORDED))
        if whole:
            experts[list(UNKNOWN)] = own_topk(made, states)[list(UNKNOWN)].int()
        nemo_rl.set_router_replay_forward(made, _answered(experts))
        gradients.append(gradients_of(made, states))
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)
    assert (gradients[0][2][list(UNKNOWN)] != 0).any(-1).all()
