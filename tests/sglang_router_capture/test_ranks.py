"""Which tokens of a pass are a rank's own, for each way in which SGLang lays out the tokens of all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers import dp_attention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from router_replay.masks import RoutingGeometry
from sglang_router_capture import ranks
from sglang_router_capture.ranks import OtherRank, Place, own_tokens
from sglang_router_capture.staging import Staging

GEOMETRY = RoutingGeometry(num_layers=2, moe_layers=(0, 1), num_experts=64, top_k=2)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention data parallelism of three ranks, of which this is the second."""
    monkeypatch.setattr(ranks, "is_dp_attention_enabled", lambda: True)
    # What upstream's own `get_dp_local_slice_cpu` asks for the number of this rank.
    monkeypatch.setattr(dp_attention, "dp_slot_in", lambda lengths: 1)


def batch(slots: list[int], lengths: list[int] | None, original: int | None, mode: ForwardMode) -> Any:
    return SimpleNamespace(
        out_cache_loc=torch.tensor(slots),
        out_cache_loc_virtual=None,
        global_num_tokens_cpu=lengths,
        _original_num_tokens=original,
        forward_mode=mode,
    )


def staged(layout: list[list[int]]) -> Staging:
    """Staging after a pass whose ranks have rows of these first experts, one after another, padding included."""
    staging = Staging(GEOMETRY, 32, 0, "cpu")
    experts = torch.tensor([expert for rank in layout for expert in rank])
    for layer in GEOMETRY.moe_layers:
        staging.capture(layer, torch.stack([experts, experts + 1], dim=1))
    return staging


# Where a row is padding, its expert is 40.
@pytest.mark.parametrize(
    ("pass_", "graph", "layout"),
    [
        # Prefill without a graph: the sum of lengths, each a multiple of the attention's tensor parallel size.
        (batch([7, 8, 9, 0], [2, 4, 6], 3, ForwardMode.EXTEND), (False, None), [[1, 2], [10, 11, 12, 40], [20] * 6]),
        # Decode without a graph: all as long as the longest.
        (
            batch([7, 8, 9, 0], [4, 4, 4], 3, ForwardMode.DECODE),
            (False, None),
            [[1, 2, 40, 40], [10, 11, 12, 40], [20] * 4],
        ),
        # A decode graph: all as long as the graph; the batch itself is not padded.
        (
            batch([7, 8, 9], [2, 3, 1], None, ForwardMode.DECODE),
            (True, 8),
            [[1, 2, *[40] * 6], [10, 11, 12, *[40] * 5], [20, *[40] * 7]],
        ),
        # A prefill's graph: all as long as its bucket. The size that SGLang passes is that of the decode graph.
        (
            batch([7, 8, 9, 0, 0], [5, 5, 5], 3, ForwardMode.EXTEND),
            (True, 8),
            [[1, 2, 40, 40, 40], [10, 11, 12, 40, 40], [20] * 5],
        ),
        # The same beside a rank that extends: SGLang says again that this one decodes, and passes the size of a decode
        # graph that ran before, if one did.
        *(
            (
                batch([7, 8, 9, 0, 0], [5, 5, 5], 3, ForwardMode.DECODE),
                (True, stale),
                [[1, 2, 40, 40, 40], [10, 11, 12, 40, 40], [20] * 5],
            )
            for stale in (8, None)
        ),
    ],
    ids=["sum of lengths", "longest", "decode graph", "prefill graph", "beside a prefill graph", "at first"],
)
@pytest.mark.usefixtures("gathered")
def test_own_tokens_of_a_gathered_pass(pass_: Any, graph: tuple[bool, int | None], layout: list[list[int]]) -> None:
    tokens = own_tokens(pass_, *graph)
    assert tokens.slots.tolist() == [7, 8, 9]
    assert tokens.end == sum(len(rank) for rank in layout)
    indices, valid = staged(layout).take(tokens.first, tokens.first + 3, tokens.end)
    assert valid.all()
    assert indices[:, :, 0].tolist() == [[10, 10], [11, 11], [12, 12]]


@pytest.mark.usefixtures("gathered")
@pytest.mark.parametrize("lengths", [[3, 0, 2], [3, 3, 3]], ids=["sum of lengths", "longest"])
def test_a_rank_without_requests_has_no_tokens(lengths: list[int]) -> None:
    for graph in ((False, None), (True, None), (True, 8)):
        tokens = own_tokens(batch([0] * lengths[1], lengths, 0, ForwardMode.IDLE), *graph)
        assert tokens.slots.tolist() == []


@pytest.mark.usefixtures("gathered")
def test_rows_are_not_valid_where_the_pass_is_longer_than_its_batch_says() -> None:
    """A graph that padded further than the batch tells: this rank's rows are not where they are looked for."""
    tokens = own_tokens(batch([7, 8, 9], [4, 4, 4], 3, ForwardMode.EXTEND), True, None)
    longer = staged([[1, 2, 40, 40, 40], [10, 11, 12, 40, 40], [20] * 5])
    _, valid = longer.take(tokens.first, tokens.first + 3, tokens.end)
    assert not valid.any()


def test_without_attention_data_parallelism_all_tokens_are_a_ranks_own() -> None:
    # A graph pads after them.
    tokens = own_tokens(batch([7, 8, 9], None, None, ForwardMode.DECODE), True, 8)
    assert (tokens.slots.tolist(), tokens.first, tokens.end) == ([7, 8, 9], 0, None)


def test_who_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(**numbers: int) -> Place:
        ones = {"pp_rank": 0, "pp_size": 1, "attn_tp_rank": 0, "attn_cp_rank": 0, "attn_dp_size": 1, "attn_tp_size": 1}
        return Place.of(SimpleNamespace(**{**ones, **numbers}))

    assert place() == Place()
    assert place(attn_tp_size=2).answers
    assert not place(attn_tp_size=2, attn_tp_rank=1).answers
    assert not place(pp_size=2, pp_rank=1).answers
    assert not place(attn_cp_rank=1).answers
    monkeypatch.setattr(ranks, "is_dp_attention_enabled", lambda: True)
    assert place(attn_dp_size=2, attn_tp_size=4).max_tokens_per_pass(10) == 24


def test_a_rank_that_answers_nothing_takes_part_in_nothing() -> None:
    other = OtherRank()
    other.capture(layer_id=3, topk_indices=torch.zeros(2, 2))
    assert other.on_forward_end(None, False, None, no_copy_to_cpu=True) is None
    assert other.get_topk(0, 5, None) is None
    other.destroy()
