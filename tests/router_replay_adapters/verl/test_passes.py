"""verl's replay of our routes in parallel layouts: each valid route on its token, the router's own choice elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import TOLERANCE
from tests.megatron_router_replay.parallel.data import Microbatch, places
from tests.megatron_router_replay.parallel.pool import RankError, RankPool
from tests.router_replay_adapters.verl.passes import VerlStep, microbatches, our_step, verl_step

ONE_RANK = Case(packed=True)
CASES = (
    ONE_RANK,
    Case(packed=True, dense=(0, 2)),
    Case(packed=True, recompute="full"),
    Case(packed=True, tp=2),
    Case(packed=True, cp=2),
    Case(packed=True, pp=2),
    Case(packed=True, tp=2, dense=(1,), recompute="full"),
    Case(packed=True, cp=2, dense=(1,), recompute="full"),
    Case(packed=True, pp=2, dense=(1,), recompute="full"),
    Case(packed=True, pp=2, vpp=2, recompute="full"),
)


def known(case: Case, microbatch: Microbatch, layer: int) -> dict[int, list[int]]:
    """Experts of every place of the whole microbatch that the rollout has a valid row of."""
    return dict(microbatch.recorded(case.moe_layers.index(layer)))


def judged(case: Case, ranks: list[VerlStep]) -> tuple[int, int, int]:
    """How many (row, layer) of all ranks were replayed, were the router's own choice, and were neither.

    A row is wrong as well where its experts are not those that the dispatcher got.
    """
    replayed = native = wrong = 0
    batches = microbatches(case)
    for rank in ranks:
        assert not rank.step.recomputed_otherwise
        assert rank.chosen.keys() == rank.step.maps.keys()
        for (layer, index), chosen in rank.chosen.items():
            own = places(case, batches[index], rank.step.cp_rank, rank.step.tp_rank).tolist()
            assert len(own) == len(chosen)
            expected = known(case, batches[index], layer)
            dispatched = rank.step.maps[layer, index]
            for row, place in enumerate(own):
                took = chosen[row].tolist()
                right = expected.get(place, rank.native[layer, index][row].tolist())
                if took != right or dispatched[row].nonzero().flatten().tolist() != took:
                    wrong += 1
                elif place in expected:
                    replayed += 1
                else:
                    native += 1
    return replayed, native, wrong


@pytest.mark.parametrize("case", CASES, ids=str)
def test_valid_routes_are_replayed_where_they_belong_and_others_are_native(
    case: Case, patched: dict[int, RankPool]
) -> None:
    ranks = patched[case.world_size].run(verl_step, case)
    replayed, native, wrong = judged(case, ranks)
    batches = microbatches(case)
    valid = sum(int(masks.valid.sum()) for each in batches for masks in each.masks) * len(case.moe_layers)
    rows = sum(each.token_ids.numel() for each in batches) * len(case.moe_layers)
    assert wrong == 0
    assert (replayed, native) == (valid, rows - valid)
    # A third of the rows are not valid, and none of these stands for what the model would choose anyway.
    assert native > valid / 3


def test_rows_of_zeros_are_native(patched: dict[int, RankPool]) -> None:
    """What verl and SGLang's own recorder write where nothing was recorded, in forward passes and recomputes."""
    case = Case(packed=True, recompute="full")
    replayed, native, wrong = judged(case, patched[1].run(verl_step, case, True, 0))
    valid = sum(int(masks.valid.sum()) for each in microbatches(case) for masks in each.masks) * len(case.moe_layers)
    assert wrong == 0 and replayed == valid and native > valid / 3


@pytest.fixture(scope="module")
def ours(unpatched: RankPool) -> dict[tuple[int, int], Tensor]:
    """Dispatched experts of our own replay on one rank."""
    (step,) = unpatched.run(our_step, ONE_RANK)
    return step.maps


def test_verl_replays_as_our_own_replay_does(patched: dict[int, RankPool], ours: dict[tuple[int, int], Tensor]) -> None:
    """Rows whose output is read: of padding and last tokens, ours has its own experts."""
    (found,) = patched[1].run(verl_step, ONE_RANK)
    assert found.step.maps.keys() == ours.keys()
    for (layer, index), maps in found.step.maps.items():
        read = microbatches(ONE_RANK)[index].is_read()
        assert torch.equal(maps[read], ours[layer, index][read])


def test_losses_are_those_of_our_own_replay(patched: dict[int, RankPool], unpatched: RankPool) -> None:
    (found,), (expected,) = patched[1].run(verl_step, ONE_RANK), unpatched.run(our_step, ONE_RANK)
    assert found.step.losses.keys() == expected.losses.keys()
    for index, loss in expected.losses.items():
        assert abs(float(found.step.losses[index] - loss)) <= TOLERANCE * abs(float(loss))


def test_without_the_adapter_an_unknown_row_ends_the_step(patched: dict[int, RankPool]) -> None:
    with pytest.raises(RankError, match="index -1 is out of bounds"):
        patched[1].run(verl_step, ONE_RANK, False)


def test_without_the_adapter_a_missing_row_goes_to_one_expert(patched: dict[int, RankPool]) -> None:
    """Zeros, verl's own filler, are one expert K times: the token is sent to that one alone."""
    (found,) = patched[1].run(verl_step, ONE_RANK, False, 0)
    collapsed = unknown = 0
    for (layer, index), maps in found.step.maps.items():
        microbatch = microbatches(ONE_RANK)[index]
        read, expected = microbatch.is_read(), known(ONE_RANK, microbatch, layer)
        for place in read.nonzero().flatten().tolist():
            if place not in expected:
                unknown += 1
                collapsed += maps[place].nonzero().flatten().tolist() == [0]
    assert collapsed == unknown > 60
