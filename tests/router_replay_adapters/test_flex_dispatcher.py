"""What DeepEP's dispatcher makes of gates that are 0, in models whose replay is a stack's own.

Its manager is Megatron's own. It finds experts by the largest gates, so that a replayed one whose gate underflows ties
with all that were not chosen.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher as upstream
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from router_replay_adapters import slime as slime_adapter
from router_replay_adapters.native_rows import FORWARD
from tests.router_replay_adapters.routers import (
    HIDDEN,
    KNOWN,
    NUM_EXPERTS,
    RECORDED,
    TOP_K,
    experts_of,
    hidden_states,
    router,
)
from tests.router_replay_adapters.stacks_here import Slime, applied


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_what_goes_to_other_experts_counts_for_nothing_there(
    slime_routing_replay: ModuleType, monkeypatch: pytest.MonkeyPatch, pinned_memory: None, score: str
) -> None:
    """So this dispatcher is not refused: outputs and all gradients are those of the replayed experts."""
    # A manager looks for DeepEP when it is made; nothing is dispatched here.
    monkeypatch.setattr(upstream, "fused_dispatch", object())
    monkeypatch.setattr(upstream, "set_deepep_num_sms", lambda count: None)
    stack = Slime(slime_routing_replay, slime_adapter.PATCHES, monkeypatch)
    with applied(stack.patches):
        replayed, *wanted = _step(stack, score, by_the_manager=False)
        dispatched, *found = _step(stack, score, by_the_manager=True)
        stack.clear()
    assert replayed == [set(row) for row in RECORDED[list(KNOWN)].tolist()]
    assert dispatched != replayed, "no gate is 0 here"
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0


def _step(stack: Slime, score: str, *, by_the_manager: bool) -> tuple[list[set[int]] | Tensor, ...]:
    """Experts of each row, the layer's output, and gradients of the experts, the router and the inputs."""
    made, states = router(stack.topk, moe_router_score_function=score), hidden_states(len(KNOWN))
    with torch.no_grad():
        made.weight.mul_(100)
    stack.register(made)
    stack.record(RECORDED[list(KNOWN)])
    stack.set_stage(FORWARD)
    gates, routing_map = made(states)
    indices = routing_map.nonzero()[:, 1].view(-1, TOP_K)
    if by_the_manager:
        manager = _manager(made.config)
        manager.setup_metadata(routing_map, gates)
        indices, gates = manager.token_indices, manager.token_probs
    else:
        gates = gates.gather(1, indices)
    experts = torch.randn(NUM_EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()
    output = (gates[..., None] * torch.tanh(states * experts[indices])).sum(1)
    output.square().sum().backward()
    chosen = experts_of(torch.zeros_like(routing_map).scatter(1, indices, True))
    return chosen, output.detach(), experts.grad, made.weight.grad, states.grad


def _manager(config: TransformerConfig) -> upstream._DeepepManager:
    return upstream._DeepepManager(
        group=None, num_local_experts=NUM_EXPERTS, router_topk=TOP_K, num_experts=NUM_EXPERTS, config=config
    )
