"""What DeepEP's dispatcher makes of replayed experts whose gate is 0, with Megatron's replay and with ours.

Routers and the dispatcher's own `setup_metadata` are real; the kernels behind it need GPUs, so nothing is trained.
"""

from __future__ import annotations

from unittest import mock

import torch
from megatron.core.transformer.moe import token_dispatcher as upstream
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher, _DeepepManager
from torch import nn

from megatron_router_replay import attach
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import Microbatch, geometry, microbatches
from tests.megatron_router_replay.parallel.model import build_chunks
from tests.megatron_router_replay.parallel.stock import Use, given, stock_table
from tests.megatron_router_replay.parallel.training import KeepFloat64, parallel_layout

# Logits are a thousand apart, and exp(-1000) is 0 in float64.
FAR_APART = 1e4


def flex_rows(use: Use) -> tuple[int, int]:
    """(recorded rows, those that DeepEP would be told to send to other experts), over the layers of one microbatch."""
    case = Case(config=(("moe_enable_routing_replay", use.by != "ours"),))
    microbatch = given(microbatches(case)[0], use)
    with (
        mock.patch.object(upstream, "fused_dispatch", mock.Mock()),
        mock.patch.object(upstream, "set_deepep_num_sms", mock.Mock()),
        parallel_layout(case),
        KeepFloat64(),
    ):
        (model,) = build_chunks(case)
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        for layer in layers:
            layer.router.weight.data *= FAR_APART
            layer.token_dispatcher = _flex(layer.token_dispatcher)
        if use.by == "ours":
            with (
                attach(model, geometry(case), overlap_every=None) as replay,
                replay.microbatch(microbatch.masks, microbatch.layout),
            ):
                return _sent(microbatch, layers)
        for layer in layers:
            layer.router.router_replay.set_target_indices(
                stock_table(case, use, microbatch, layer.router.layer_number - 1)
            )
            layer.router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        RouterReplay.clear_global_router_replay_instances()
        return _sent(microbatch, layers)


def _sent(microbatch: Microbatch, layers: list[MoELayer]) -> tuple[int, int]:
    batch, length = microbatch.token_ids.shape
    hidden = torch.randn(length, batch, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = wrong = 0
    for ordinal, layer in enumerate(layers):
        gates, routing_map = layer.router(hidden)
        manager = layer.token_dispatcher._comm_manager
        manager.setup_metadata(routing_map, gates)
        for place, experts in microbatch.recorded(ordinal):
            rows += 1
            wrong += sorted(manager.token_indices[place].tolist()) != experts
    return rows, wrong


def _flex(dispatcher: nn.Module) -> MoEFlexTokenDispatcher:
    """A flex dispatcher of one rank, which its constructor refuses."""
    flex = object.__new__(MoEFlexTokenDispatcher)
    vars(flex).update(vars(dispatcher))
    config = dispatcher.config
    flex._comm_manager = _DeepepManager(
        group=None,
        num_local_experts=dispatcher.num_local_experts,
        router_topk=config.moe_router_topk,
        num_experts=config.num_moe_experts,
        config=config,
    )
    return flex
