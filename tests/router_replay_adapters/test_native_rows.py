"""Choices of unknown rows by themselves: when they are made, and when they are let go of."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch
from torch import Tensor

from router_replay_adapters.native_rows import FORWARD, RECOMPUTE, NativeRows

SCORES = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
RECORDED = torch.tensor([[1, 2], [-1, -1], [5, 0]])


class Queue(SimpleNamespace):
    __hash__ = object.__hash__


def _own(scores: Tensor) -> Tensor:
    return scores.topk(2, dim=1).indices


def _never(scores: Tensor) -> Tensor:
    raise AssertionError("a router's own top-k was called where every row is known")


def test_nothing_is_chosen_where_every_row_is_known() -> None:
    queue = Queue(forward_index=0, backward_index=0, top_indices_list=[RECORDED[[0, 2]]])
    assert NativeRows("miles").filled(queue, FORWARD, SCORES[:2], 2, _never) is queue


def test_what_is_no_tensor_is_the_stacks_own() -> None:
    queue = Queue(forward_index=0, backward_index=0, top_indices_list=[object()])
    assert NativeRows("slime").filled(queue, FORWARD, SCORES, 2, _never) is queue


def test_the_recorded_tensor_stays_as_it_was() -> None:
    recorded = RECORDED.clone()
    queue = Queue(forward_index=0, backward_index=0, top_indices_list=[recorded])
    queue.pop_forward = lambda: recorded
    filled = NativeRows("miles").filled(queue, FORWARD, SCORES, 2, _own)
    assert filled.pop_forward().tolist() == [[1, 2], _own(SCORES)[1].tolist(), [5, 0]]
    assert torch.equal(recorded, RECORDED)


def test_a_choice_is_no_part_of_the_graph() -> None:
    queue = Queue(forward_index=0, backward_index=0, top_indices_list=[RECORDED.clone()])
    asked = []
    scores = SCORES.clone().requires_grad_()
    NativeRows("miles").filled(queue, FORWARD, scores, 2, lambda scores: asked.append(scores) or _own(scores))
    assert [each.requires_grad for each in asked] == [False]


def test_choices_are_gone_with_what_was_recorded() -> None:
    rows = NativeRows("miles")
    queue = Queue(forward_index=0, backward_index=0, top_indices_list=[RECORDED.clone(), RECORDED.clone()])
    for index in range(2):
        queue.forward_index = index
        rows.filled(queue, FORWARD, SCORES, 2, _own)
    assert len(rows._native) == 2
    queue.top_indices_list.pop()
    gc.collect()
    assert len(rows._native) == 1


def test_a_recompute_of_equal_rows_in_another_microbatch_has_its_own_choice() -> None:
    """Recorded tensors are told apart by what they are, not by what is in them."""
    rows = NativeRows("miles")
    queue = Queue(forward_index=0, backward_index=0, top_indices_list=[RECORDED.clone(), RECORDED.clone()])
    for index, scores in enumerate((SCORES, -SCORES)):
        queue.forward_index = index
        rows.filled(queue, FORWARD, scores, 2, _own)
    for index, scores in enumerate((SCORES, -SCORES)):
        queue.backward_index = index
        queue.pop_backward = lambda index=index: queue.top_indices_list[index]
        found = rows.filled(queue, RECOMPUTE, scores * 0, 2, _never).pop_backward()
        assert found[1].tolist() == _own(scores)[1].tolist()
