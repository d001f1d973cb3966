"""A bad token on one of two data-parallel ranks: the same error on both, within seconds, or it is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from router_replay.errors import InputError, RouterReplayError
from router_replay.mismatch import LogRatios, LossMetrics, Responses, decoupled_loss, diagnose, grpo_loss
from router_replay.mismatch.corrections.self_normalized import self_normalized_weights
from router_replay.mismatch.ranks import together
from tests.router_replay.mismatch.spawned import on_ranks

SEQUENCES, WIDTH = 3, 4


def _batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rollout = -3 * torch.rand(SEQUENCES, WIDTH, generator=generator, dtype=torch.float64) - 0.1
    trainer = rollout - 0.1 * torch.rand(SEQUENCES, WIDTH, generator=generator, dtype=torch.float64)
    return trainer, rollout, torch.ones(SEQUENCES, WIDTH, dtype=torch.bool)


def _ratios(rank: int, bad: Callable[[Tensor], Tensor], bad_ranks: tuple[int, ...] = (1,), **options: Any) -> LogRatios:
    trainer, rollout, mask = _batch(rank)
    trainer = bad(trainer) if rank in bad_ranks else trainer
    responses = Responses.padded(mask, [0, 0, 1])
    group = dist.group.WORLD if dist.is_initialized() else None
    return LogRatios.of(trainer=trainer, rollout=rollout, responses=responses, process_group=group, **options)


def _alone(rank: int) -> LogRatios:
    trainer, rollout, mask = _batch(rank)
    return LogRatios.of(trainer=trainer, rollout=rollout, responses=Responses.padded(mask))


def _holding(value: float) -> Callable[[Tensor], Tensor]:
    def bad(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[1, 2] = value
        return tensor

    return bad


def _good(tensor: Tensor) -> Tensor:
    return tensor


def _diagnose(rank: int, bad: Callable[[Tensor], Tensor | None]) -> None:
    routes = torch.arange(2).expand(SEQUENCES, WIDTH, 1, 2)
    given = {"trainer_routes": routes, "rollout_routes": bad(routes) if rank == 1 else routes}
    given = {name: value for name, value in given.items() if value is not None}
    diagnose(_ratios(rank, _good), **given, process_group=dist.group.WORLD)


def _no_routes(rank: int) -> None:
    routes = torch.arange(2).expand(SEQUENCES, WIDTH, 1, 2)
    given = {} if rank == 1 else {"trainer_routes": routes, "rollout_routes": routes}
    diagnose(_ratios(rank, _good), **given, process_group=dist.group.WORLD)


def _metrics(rank: int, value: float) -> LossMetrics:
    """Of a loss that has the value on rank 1."""
    trainer, rollout, mask = _batch(rank)
    trainer = _holding(value)(trainer) if rank else trainer
    return grpo_loss(current=trainer, old=rollout, advantages=torch.ones(SEQUENCES), responses=Responses.padded(mask))[
        1
    ]


CASES: dict[str, tuple[Callable[[int], Any], str]] = {
    "NaN": (
        lambda rank: _ratios(rank, _holding(math.nan)),
        "on rank 1: 1 of 12 response tokens have no log-ratio; the first, at [1, 2], has log-probability nan in trai",
    ),
    "infinity": (
        lambda rank: _ratios(rank, _holding(math.inf)),
        "on rank 1: 1 of 12 response tokens have no log-ratio",
    ),
    "probabilities": (lambda rank: _ratios(rank, torch.exp), "on rank 1: 12 of 12 response tokens have a log-probab"),
    "a mask of another shape": (
        lambda rank: _ratios(rank, lambda trainer: trainer[:, :3]),
        "on rank 1: trainer [3, 3] and the response mask [3, 4] must have one shape",
    ),
    "of another shape, to be dropped": (
        lambda rank: _ratios(rank, lambda trainer: trainer[:, :3], bad_responses="drop"),
        "on rank 1: trainer [3, 3] and the response mask [3, 4] must have one shape",
    ),
    "no tensor": (lambda rank: _ratios(rank, Tensor.tolist), "on rank 1: trainer must be a torch.Tensor, got list"),
    "two ranks": (
        lambda rank: _ratios(rank, _holding(math.nan), (0, 1)),
        "on rank 0 (others on ranks [1]): 1 of 12 response tokens have no log-ratio",
    ),
    "routes of another shape": (lambda rank: _diagnose(rank, lambda routes: routes[..., :1]), "on rank 1: trainer ro"),
    "routes of one side": (lambda rank: _diagnose(rank, lambda routes: None), "on rank 1: routes of one side only"),
    "routes of one rank": (
        _no_routes,
        "ranks compare different routes of (layers, top-k), None where there are none, by rank: {0: (1, 2), 1: None}",
    ),
    "other taus": (
        lambda rank: diagnose(_ratios(rank, _good), taus=[1.1, 2.0][rank:], process_group=dist.group.WORLD),
        "ranks compare different taus, by rank: {0: (1.1, 2.0), 1: (2.0,)}",
    ),
    "figures of ratios that were made alone": (
        lambda rank: diagnose(_alone(rank), process_group=dist.group.WORLD),
        "these ratios were made with ranks [], and are now joined over ranks [0, 1]",
    ),
    "weights of ratios that were made alone": (
        lambda rank: self_normalized_weights(_alone(rank), over="batch", process_group=dist.group.WORLD),
        "these ratios were made with ranks [], and are now joined over ranks [0, 1]",
    ),
    "another kind of error": (
        lambda rank: together(lambda: 1 // (1 - rank), dist.group.WORLD),
        "on rank 1: ZeroDivisionError: integer division or modulo by zero",
    ),
    "a NaN in the loss": (
        lambda rank: _metrics(rank, math.nan).require(dist.group.WORLD),
        "on rank 1: 1 of 12 response tokens of the loss have log-probabilities that are NaN or infinite",
    ),
    "a NaN in reduced metrics": (
        lambda rank: _metrics(rank, math.nan).all_reduce(dist.group.WORLD).require(),
        "1 of 24 response tokens of the loss have log-probabilities that are NaN or infinite",
    ),
    "a NaN in the loss of another stage": (
        lambda rank: (_metrics(rank, math.nan) if rank else LossMetrics.total([])).require(dist.group.WORLD),
        "on rank 1: 1 of 12 response tokens of the loss have log-probabilities that are NaN or infinite",
    ),
    "nothing left": (
        lambda rank: diagnose(
            _ratios(rank, lambda trainer: trainer * math.nan, (0, 1), bad_responses="drop"),
            process_group=dist.group.WORLD,
        ),
        "every one of 6 responses was dropped",
    ),
}


def _measured(ratios: LogRatios, group: dist.ProcessGroup | None) -> dict[str, Any]:
    weights = self_normalized_weights(ratios, over="batch", process_group=group)
    return {"figures": diagnose(ratios, process_group=group).flat(), "weights": weights, "dropped": int(ratios.dropped)}


def _rank(rank: int) -> dict[str, Any]:
    raised: dict[str, Any] = {}
    for name, (call, _) in CASES.items():
        try:
            call(rank)
        except RouterReplayError as error:
            raised[name] = (type(error), str(error))
    # Both ranks make the group that the second one is not in.
    first_alone = dist.new_group([0])
    try:
        found = together(lambda: rank, first_alone)
    except RouterReplayError as error:
        found = str(error)
    # A group of one rank leaves nobody waiting.
    by_itself = None if rank else diagnose(_alone(rank), process_group=first_alone).flat()
    dropping = _ratios(rank, _holding(math.nan), bad_responses="drop")
    return {
        "raised": raised,
        "alone": found,
        "by itself": by_itself,
        "dropped": _measured(dropping, dist.group.WORLD),
        "none bad": _measured(_ratios(rank, _good), dist.group.WORLD),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, _rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_raise_the_same(name, ranks):
    first, second = (found["raised"].get(name) for found in ranks)
    assert first is not None and first == second
    kind = RouterReplayError if name == "another kind of error" else InputError
    assert first[0] is kind and first[1].startswith(CASES[name][1]), first[1]


def test_ratios_that_were_made_alone_have_figures_in_a_group_of_one(ranks):
    assert ranks[0]["by itself"] == diagnose(_alone(0)).flat()


def test_a_rank_is_told_of_a_group_that_it_is_not_in(ranks):
    assert ranks[0]["alone"] == 0
    assert ranks[1]["alone"].startswith("rank 1 is not in a process group that it was given: pass the group")


@pytest.mark.parametrize("name", ["dropped", "none bad"])
def test_bad_responses_are_dropped_and_counted_on_both(name, ranks):
    trainer, rollout, mask = (torch.cat(each) for each in zip(_batch(0), _batch(1), strict=True))
    mask[SEQUENCES + 1] = name != "dropped"
    expected = _measured(LogRatios.of(trainer=trainer, rollout=rollout, responses=Responses.padded(mask)), None)
    expected["figures"]["mismatch/dropped_sequences"] = float(name == "dropped")
    first, second = (found[name] for found in ranks)
    assert (first["dropped"], second["dropped"]) == (0, int(name == "dropped"))
    assert first["figures"] == second["figures"] == pytest.approx(expected["figures"], rel=1e-12, abs=1e-15)
    # Float64 sums of six terms in another order.
    torch.testing.assert_close(
        torch.cat([first["weights"], second["weights"]]), expected["weights"], rtol=1e-13, atol=0
    )


BAD = {"NaN": math.nan, "infinity": math.inf, "a probability": 0.7}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("side", ["trainer", "rollout"])
def test_a_bad_response_is_dropped_and_the_others_stay(side, value):
    trainer, rollout, mask = _batch(0)
    sides = {"trainer": trainer, "rollout": rollout}
    sides[side][1, 2] = value
    with pytest.raises(InputError):
        LogRatios.of(**sides, responses=Responses.padded(mask))
    found = LogRatios.of(**sides, responses=Responses.padded(mask), bad_responses="drop")
    assert int(found.dropped) == 1 and found.responses.lengths.tolist() == [4, 0, 4]
    assert found.token.isfinite().all() and diagnose(found).dropped_sequences == 1


def test_a_response_that_the_trainer_never_gives_is_dropped_for_losses_have_no_ratio_over_it():
    trainer, rollout, mask = _batch(0)
    trainer[1, 2] = -math.inf
    given = {"current": trainer.clamp(min=-9), "advantages": torch.ones(SEQUENCES)}
    kept = LogRatios.of(trainer=trainer, rollout=rollout, responses=Responses.padded(mask))
    loss, metrics = decoupled_loss(kept, **given)
    assert int(kept.dropped) == 0 and loss.isnan()
    with pytest.raises(InputError, match="1 of 12 response tokens of the loss"):
        metrics.require()
    found = LogRatios.of(trainer=trainer, rollout=rollout, responses=Responses.padded(mask), bad_responses="drop")
    loss, metrics = decoupled_loss(found, **given)
    metrics.require()
    assert int(found.dropped) == 1 and found.responses.lengths.tolist() == [4, 0, 4] and loss.isfinite()


def test_probabilities_for_logarithms_drop_everything():
    trainer, rollout, mask = _batch(0)
    found = LogRatios.of(
        trainer=trainer, rollout=rollout.exp() / 9 + 0.05, responses=Responses.padded(mask), bad_responses="drop"
    )
    assert int(found.dropped) == 3
    with pytest.raises(InputError, match="every one of 3 responses was dropped"):
        diagnose(found)


def test_a_way_with_bad_responses_is_known():
    trainer, rollout, mask = _batch(0)
    with pytest.raises(InputError, match="bad_responses must be 'raise' or 'drop', got 'ignore'"):
        LogRatios.of(trainer=trainer, rollout=rollout, responses=Responses.padded(mask), bad_responses="ignore")
