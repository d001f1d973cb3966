"""Bindings in torch's own activation checkpoints, with a router of a few lines and no trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from router_replay.errors import CallOrderError
from router_replay.replay import ObservedRoutes, place
from router_replay.replay.binding import NATIVE, bound, current
from router_replay.replay.bound_pass import BoundPass
from router_replay.replay.checkpoint import carry
from router_replay.replay.choice import replayed_experts
from tests.router_replay.replay.batches import GEOMETRY, padded, recorded

reentrant = pytest.mark.parametrize("reentrant", [True, False])


@dataclass(eq=False)
class Replay:
    attached: bool = True
    observer: ObservedRoutes | None = None


class Router(nn.Module):
    """Decoder layer 1: experts by the binding, gates by its own scores; keeps every choice that it made."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(8, GEOMETRY.num_experts, generator=generator))
        self.experts = nn.Parameter(torch.randn(GEOMETRY.num_experts, 8, generator=generator))
        self.replay = replay
        self.seen: list[tuple[bool, Tensor]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        state = current()
        scores = hidden @ self.weight
        binding = state.bindings[self.replay]
        assert isinstance(binding, BoundPass) and binding.routes is not None
        routes = binding.routes
        experts = replayed_experts(routes, state, 1, self, scores, lambda of: of.topk(3).indices)
        self.seen.append((state.recomputing, experts))
        gates = scores.gather(1, experts).softmax(1)
        return hidden + (gates[..., None] * self.experts[experts]).sum(1)


def microbatch(seed: int) -> BoundPass:
    ids, masks, _ = recorded([6, 3], seed)
    return BoundPass(place(masks, padded(ids), GEOMETRY, torch.device("cpu")))


def inputs() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)


def checkpointed(function: Callable[[Tensor], Tensor], hidden: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(carry(function), hidden, use_reentrant=reentrant)


def test_nothing_bound_leaves_the_function_alone():
    assert carry(inputs) is inputs


@reentrant
def test_a_recompute_repeats_its_own_forward_pass(reentrant):
    replay = Replay()
    router = Router(replay)
    first, second = microbatch(0), microbatch(1)
    with bound(replay, first):
        output = checkpointed(router, inputs(), reentrant)
    # The backward pass finds other weights, which would choose otherwise, and another microbatch around it.
    router.weight.data.neg_()
    with bound(replay, second):
        output.sum().backward()
        assert current().bindings[replay] is second and current().frames == ()
        router(inputs())
    assert dict(current().bindings) == {}
    (was, forward), (again, recomputed), (later, other) = router.seen
    assert (was, again, later) == (False, True, False)
    assert torch.equal(recomputed, forward)
    assert not torch.equal(other, forward)
    assert first.routes.num_native >= 2 and first.routes.num_replayed >= 2


@reentrant
def test_gradients_are_those_without_a_checkpoint(reentrant):
    gradients = []
    for run in (lambda router, hidden: router(hidden), lambda router, x: checkpointed(router, x, reentrant)):
        replay = Replay()
        router, hidden = Router(replay), inputs()
        with bound(replay, microbatch(0)):
            output = run(router, hidden)
        output.square().sum().backward()
        gradients.append((hidden.grad, router.weight.grad, router.experts.grad))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@reentrant
def test_a_checkpoint_inside_a_recompute_repeats_the_forward_pass_too(reentrant):
    replay = Replay()
    router = Router(replay)
    with bound(replay, microbatch(0)):
        output = checkpointed(lambda hidden: checkpointed(router, hidden, reentrant) * 2, inputs(), reentrant)
    router.weight.data.neg_()
    output.sum().backward()
    (was, forward), *recomputes = router.seen
    assert not was and recomputes
    assert all(again and torch.equal(experts, forward) for again, experts in recomputes)


@reentrant
def test_a_replay_that_was_removed_since(reentrant):
    replay = Replay()
    with bound(replay, microbatch(0)):
        output = checkpointed(Router(replay), inputs(), reentrant)
    replay.attached = False
    with pytest.raises(CallOrderError, match=r"the replay was removed since.*call remove\(\) after the backward pass"):
        output.sum().backward()


def test_bindings_of_two_replays_are_apart_and_end_with_their_blocks():
    one, other = Replay(), Replay()
    routes = microbatch(0)
    with bound(one, routes):
        with contextlib.suppress(KeyError), bound(other, NATIVE):
            assert dict(current().bindings) == {one: routes, other: NATIVE}
            raise KeyError
        assert dict(current().bindings) == {one: routes}
    assert dict(current().bindings) == {}
