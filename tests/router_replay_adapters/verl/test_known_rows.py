"""verl's `RouterReplay` itself with rows that nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

# isort: split
import cpu_engines.megatron  # noqa: F401 (before anything of Megatron)

# isort: split
from verl.utils.megatron.router_replay_patch import RouterReplay, RouterReplayAction

import router_replay_adapters.verl  # noqa: F401

NUM_EXPERTS, TOP_K = 8, 2


@pytest.fixture
def router() -> Iterator[Any]:
    yield RouterReplay()
    RouterReplay.router_instances.clear()


def own_choice(scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None) -> Any:
    return torch.topk(scores, topk, dim=1)


def choose(router: Any, scores: Tensor, topk: int = TOP_K) -> list[list[int]]:
    gates, indices = router.get_replay_topk(scores, topk, default_compute_topk=own_choice)
    assert torch.equal(gates, scores.gather(1, indices))
    return indices.tolist()


@pytest.fixture
def scores() -> Tensor:
    return torch.rand(5, NUM_EXPERTS, generator=torch.Generator().manual_seed(0))


def test_a_row_with_any_unknown_expert_is_the_routers_own(router: Any, scores: Tensor) -> None:
    own = own_choice(scores, TOP_K)[1].tolist()
    router.set_target_indices(torch.tensor([[3, 5], [-1, -1], [6, -1], [-1, 7], [1, 0]]))
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert choose(router, scores) == [[3, 5], own[1], own[2], own[3], [1, 0]]


def test_what_verl_leaves_out_stays_left_out(router: Any, scores: Tensor) -> None:
    own = own_choice(scores, TOP_K)[1].tolist()
    routes = torch.tensor([[3, 5], [-1, -1], [6, 4], [2, 7], [1, 0]])
    router.set_target_indices(routes, replay_mask=torch.tensor([True, True, False, True, False]))
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert choose(router, scores) == [[3, 5], own[1], own[2], [2, 7], own[4]]


def test_layers_know_their_own_rows(router: Any, scores: Tensor) -> None:
    """One mask for all layers: verl hands the same one to each."""
    other, mask = RouterReplay(), torch.ones(5, dtype=torch.bool)
    own = own_choice(scores, TOP_K)[1].tolist()
    router.set_target_indices(torch.tensor([[3, 5], [-1, -1], [6, 4], [2, 7], [1, 0]]), replay_mask=mask)
    other.set_target_indices(torch.tensor([[-1, -1], [3, 5], [6, 4], [2, 7], [1, 0]]), replay_mask=mask)
    for each in (router, other):
        each.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert choose(router, scores)[:2] == [[3, 5], own[1]]
    assert choose(other, scores)[:2] == [own[0], [3, 5]]
    assert mask.all()


def test_a_recompute_takes_what_its_forward_pass_chose(router: Any, scores: Tensor) -> None:
    """Also where two microbatches are under way, and their logits come out a little differently."""
    taken = []
    for offset in (0.0, 1.0):
        router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        router.set_target_indices(torch.tensor([[3, 5], [-1, -1], [6, 4], [-1, -1], [1, 0]]))
        taken.append(choose(router, (scores + offset).flip(1) if offset else scores))
    assert taken[0] != taken[1]
    router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    other = torch.rand(5, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    assert [choose(router, other), choose(router, other)] == taken


def test_a_recompute_leaves_the_next_microbatch_alone(router: Any, scores: Tensor) -> None:
    """Whose routes are there already, and whose forward pass is still to come."""
    router.set_target_indices(torch.tensor([[3, 5], [-1, -1], [6, 4], [2, 7], [1, 0]]))
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    first = choose(router, scores)
    router.set_target_indices(torch.tensor([[1, 2], [4, 3], [-1, -1], [5, 6], [7, 0]]))
    router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    assert choose(router, scores.flip(1)) == first
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    second = choose(router, scores)
    router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    assert choose(router, scores.flip(1)) == second != first


def test_routes_that_are_all_known_are_replayed_as_ever(router: Any, scores: Tensor) -> None:
    routes = torch.tensor([[3, 5], [0, 7], [6, 4], [2, 7], [1, 0]])
    router.set_target_indices(routes)
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert choose(router, scores) == routes.tolist()


def test_a_row_with_an_expert_twice_is_the_routers_own(router: Any) -> None:
    """Zeros are what verl and SGLang's own recorder write where nothing was recorded; a recompute takes the same."""
    scores = torch.rand(6, NUM_EXPERTS, generator=torch.Generator().manual_seed(2))
    own = own_choice(scores, 4)[1].tolist()
    routes = [[0, 0, 0, 0], [3, 5, 1, 0], [6, 1, 7, 6], [5, 2, 2, 0], [7, 6, 5, 4], [4, 1, 3, -1]]
    router.set_target_indices(torch.tensor(routes))
    expected = [own[0], [3, 5, 1, 0], own[2], own[3], [7, 6, 5, 4], own[5]]
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert choose(router, scores, 4) == expected
    router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    assert choose(router, scores.flip(1), 4) == expected


def test_a_single_expert_is_never_twice(router: Any) -> None:
    scores = torch.rand(4, NUM_EXPERTS, generator=torch.Generator().manual_seed(3))
    router.set_target_indices(torch.tensor([[0], [0], [-1], [5]]))
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert choose(router, scores, 1) == [[0], [0], own_choice(scores[2:3], 1)[1][0].tolist(), [5]]


@pytest.mark.parametrize("mask", [None, torch.ones(5, dtype=torch.bool)], ids=["R2", "R3"])
def test_without_the_adapter_an_unknown_row_is_gathered(router: Any, scores: Tensor, mask: Tensor | None) -> None:
    stock_set, stock_get = RouterReplay.set_target_indices.__wrapped__, RouterReplay.get_replay_topk.__wrapped__
    stock_set(router, torch.tensor([[3, 5], [-1, -1], [6, 4], [2, 7], [1, 0]]), replay_mask=mask)
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        stock_get(router, scores, TOP_K, default_compute_topk=own_choice)


def test_without_the_adapter_a_recompute_chooses_anew(router: Any, scores: Tensor) -> None:
    stock_set, stock_get = RouterReplay.set_target_indices.__wrapped__, RouterReplay.get_replay_topk.__wrapped__
    stock_set(router, torch.zeros(5, TOP_K, dtype=torch.int64), replay_mask=torch.zeros(5, dtype=torch.bool))
    router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    _, forward = stock_get(router, scores, TOP_K, default_compute_topk=own_choice)
    router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    _, again = stock_get(router, scores.flip(1), TOP_K, default_compute_topk=own_choice)
    assert not torch.equal(forward, again)
