"""Part of docs/stock-replay.md: where Megatron's own RouterReplay is right, where it is not, and that ours is."""

from __future__ import annotations

import pytest

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.stock import Use
from tests.megatron_router_replay.parallel.stock_outcome import Judge

WRONG = "wrong without a word"


@pytest.fixture(scope="module")
def judge(pools):
    return Judge(pools)


@pytest.mark.parametrize("by", ["guide", "hand", "ours"])
def test_one_rank_is_right(judge, by):
    assert judge.outcome(Case(), Use(by)).right


def test_rows_of_sequence_parallel_ranks_are_the_users_to_cut(judge):
    guide, hand, ours = (judge.outcome(Case(tp=2), Use(by)) for by in ("guide", "hand", "ours"))
    assert "expected index [32, 2] to be no larger than self [16, 8]" in guide.error
    assert hand.right and ours.right


def test_recomputes_of_interleaved_chunks_take_what_another_pass_left_in_the_queue(judge):
    case = Case(pp=2, vpp=2, recompute="full")
    guide, hand, ours = (judge.outcome(case, Use(by)) for by in ("guide", "hand", "ours"))
    assert guide.wrong == 0 and guide.recomputed_otherwise > 100 and guide.worst > 0.1 and not guide.error
    assert str(guide).startswith(WRONG)
    assert hand.right and ours.right


@pytest.mark.parametrize(
    ("case", "use", "words"),
    [
        (Case(mtp=1), Use("guide"), "number of replay tensors (4) does not match instances (5)"),
        (Case(), Use("guide", mistake="another model"), "does not match instances (8)"),
        (Case(), Use("guide", missing="-1"), "index -1 is out of bounds"),
        (Case(), Use("ours", mistake="next microbatch"), "other token ids than those of the layout"),
        (Case(), Use("ours", mistake="around the schedule"), "routes a second forward pass inside one block"),
    ],
    ids=str,
)
def test_what_ends_in_an_error(judge, case, use, words):
    assert words in judge.outcome(case, use).error


@pytest.mark.parametrize(
    ("case", "use"),
    [
        (Case(), Use("guide", mistake="next microbatch")),
        (Case(), Use("guide", mistake="around the schedule")),
        (Case(), Use("guide", mistake="[B, S] order")),
        (Case(packed=True), Use("guide", mistake="end to end")),
        (Case(config=(("moe_router_fusion", True),)), Use("guide")),
    ],
    ids=str,
)
def test_what_is_wrong_without_a_word(judge, case, use):
    outcome = judge.outcome(case, use)
    assert not outcome.error and outcome.wrong > outcome.rows / 3 and outcome.worst > 0.1
    assert str(outcome).startswith(WRONG)


def test_tokens_without_a_row(judge):
    stock = judge.outcome(Case(), Use("guide", missing="0..K-1"))
    assert stock.wrong == 0 and stock.not_own > 0.8 * stock.without_row > 0
    assert judge.outcome(Case(), Use("ours", missing="-1")).right


def test_fused_routers_and_experts_whose_gate_is_zero_are_replayed_by_ours_alone(judge):
    assert judge.outcome(Case(config=(("moe_router_fusion", True),)), Use("ours")).right
    stock, ours = judge.flex(Use("guide")), judge.flex(Use("ours"))
    assert stock.rows == ours.rows and stock.wrong > stock.rows / 2 and ours.right
