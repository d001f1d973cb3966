"""Errors on one of four ranks, two data-parallel by two context-parallel: whoever would wait for it raises it, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from router_replay.errors import InputError, PairingError, RouterReplayError
from router_replay.mismatch import (
    LogRatios,
    Responses,
    balance_heuristic_weights,
    diagnose,
    doubly_robust_advantages,
    exact_trust_region_mask,
    grpo_loss,
    optimal_token_baseline_advantages,
    self_normalized_weights,
)
from tests.router_replay.mismatch.spawned import on_ranks

SEQUENCES, WIDTH, BAD_RANK = 3, 4, 2


class _Rank:
    """Rank 2 d + c holds the c-th half of the columns of the d-th batch."""

    def __init__(self, rank: int) -> None:
        self.rank, (self.data, self.context) = rank, divmod(rank, 2)
        contexts = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        datas = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        self.context_group, self.data_group = contexts[self.data], datas[self.context]

    def batch(self, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, Responses]:
        trainer, rollout, whole_mask = _whole(self.data)
        columns = slice(2 * self.context, 2 * self.context + 2)
        responses = Responses.padded(
            whole_mask[:, columns] if mask is None else mask,
            [0, 0, 1],
            context_group=self.context_group,
            positions=torch.arange(WIDTH)[columns].expand(SEQUENCES, -1),
        )
        return trainer[:, columns].clone(), rollout[:, columns].clone(), responses

    def ratios(self, bad: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> LogRatios:
        trainer, rollout, responses = self.batch()
        if self.rank == BAD_RANK:
            trainer = bad(trainer)
        return LogRatios.of(
            trainer=trainer, rollout=rollout, responses=responses, process_group=self.data_group, **options
        )


def _whole(data: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(data)
    rollout = -3 * torch.rand(SEQUENCES, WIDTH, generator=generator, dtype=torch.float64) - 0.1
    trainer = rollout - 0.1 * torch.rand(SEQUENCES, WIDTH, generator=generator, dtype=torch.float64)
    return trainer, rollout, torch.ones(SEQUENCES, WIDTH, dtype=torch.bool)


def _set(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor[1, 1] = value
    return tensor


def _both(here: _Rank) -> None:
    trainer, rollout, responses = here.batch()
    trainer = _set(trainer, math.nan) if here.rank in (0, 3) else trainer
    LogRatios.of(trainer=trainer, rollout=rollout, responses=responses, process_group=here.data_group)


def _other_sequences(here: _Rank) -> None:
    rows = 2 if here.rank == BAD_RANK else 3
    Responses.padded(torch.ones(rows, 2), context_group=here.context_group)


def _bad_mask(here: _Rank) -> None:
    here.batch(torch.full((SEQUENCES, 2), 0.5) if here.rank == BAD_RANK else None)


def _logits(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[_Rank], None]:
    def call(here: _Rank) -> None:
        logits = torch.zeros(SEQUENCES, 2, 5)
        bad = change(logits.clone()) if here.rank == BAD_RANK else logits
        exact_trust_region_mask(trainer_logits=bad, rollout_logits=logits, responses=here.batch()[2])

    return call


def _shapes(function: Callable[..., Any]) -> Callable[[_Rank], None]:
    """With one argument of another shape on the bad rank."""

    def call(here: _Rank) -> None:
        trainer, rollout, responses = here.batch()
        function(trainer[:, :1] if here.rank == BAD_RANK else trainer, rollout, responses)

    return call


def _positions(of: Callable[[_Rank], torch.Tensor], group: Callable[[_Rank], dist.ProcessGroup]) -> Callable[..., None]:
    def call(here: _Rank) -> None:
        mask = torch.ones(SEQUENCES, 2)
        Responses.padded(mask, context_group=group(here), positions=of(here).expand(SEQUENCES, -1))

    return call


def _routes(here: _Rank) -> None:
    """Of other layers on one rank; every rank sees all of them, and those that it shares no group with, too."""
    routes = torch.arange(2).expand(4, 2 if here.rank == BAD_RANK else 1, 2)
    ratios = here.ratios(lambda trainer: trainer)
    diagnose(ratios, trainer_routes=routes, rollout_routes=routes, process_group=here.data_group)


def _no_tensor(here: _Rank) -> None:
    """No error of this package: the mask has no elements to look at."""

    class Broken(torch.Tensor):
        @property
        def dtype(self) -> torch.dtype:
            raise MemoryError("no room")

    mask = torch.ones(SEQUENCES, 2)
    Responses.padded(mask.as_subclass(Broken) if here.rank == BAD_RANK else mask, context_group=here.context_group)


def _no_positions(here: _Rank) -> None:
    trainer = here.batch()[0]
    responses = Responses.padded(torch.ones(SEQUENCES, 2), [0, 0, 1], context_group=here.context_group)
    optimal_token_baseline_advantages(torch.ones(SEQUENCES), trainer, trainer.exp(), responses)


# What fails, the class, and the start of the message; of errors of one context group, the two ranks that raise.
CASES: dict[str, tuple[Callable[[_Rank], Any], type[RouterReplayError], str, list[int]]] = {
    "NaN": (
        lambda here: here.ratios(lambda trainer: _set(trainer, math.nan)),
        InputError,
        "on rank 2: 1 of 6 response tokens have no log-ratio; the first, at [1, 1], has log-probability nan in trainer",
        [0, 1, 2, 3],
    ),
    "two ranks": (_both, InputError, "on rank 0 (others on ranks [3]): 1 of 6 response tokens", [0, 1, 2, 3]),
    "other sequences": (_other_sequences, PairingError, "ranks 2 and 3 of a context group must hold parts of", [2, 3]),
    "no mask": (_bad_mask, InputError, "on rank 2: a response mask must be bool", [2, 3]),
    "probabilities": (
        lambda here: here.ratios(torch.exp),
        InputError,
        "on rank 2: 6 of 6 response tokens have a log-probability above 0 in trainer",
        [0, 1, 2, 3],
    ),
    "logits": (
        _logits(lambda logits: _set(logits, math.nan)),
        InputError,
        "on rank 2: the logits of a response token hold NaN",
        [2, 3],
    ),
    "logits of another shape": (
        _logits(lambda logits: logits[..., :4]),
        InputError,
        "on rank 2: trainer logits [3, 2, 4] and rollout logits [3, 2, 5] must both be",
        [2, 3],
    ),
    "behaviours of another shape": (
        _shapes(
            lambda given, rollout, responses: balance_heuristic_weights(
                trainer=rollout, behaviours=given[None], shares=torch.ones(1), responses=responses
            )
        ),
        InputError,
        "on rank 2: behaviours [1, 3, 1] must be",
        [2, 3],
    ),
    "values of another shape": (
        _shapes(lambda given, rollout, responses: doubly_robust_advantages(torch.ones(3), given, rollout, responses)),
        InputError,
        "on rank 2: values [3, 1] and the response mask [3, 2] must have one shape",
        [2, 3],
    ),
    "log-probabilities of another shape": (
        _shapes(
            lambda given, rollout, responses: optimal_token_baseline_advantages(
                torch.ones(3), given, rollout.exp(), responses
            )
        ),
        InputError,
        "on rank 2: logprobs [3, 1] and the response mask [3, 2] must have one shape",
        [2, 3],
    ),
    "a mask of another shape to keep": (
        _shapes(lambda given, rollout, responses: responses.keep(given < 0)),
        InputError,
        "on rank 2: mask [3, 1] and the response mask [3, 2] must have one shape",
        [2, 3],
    ),
    "routes of other layers": (
        _routes,
        InputError,
        "ranks compare different routes of (layers, top-k), None where there are none, by rank:"
        " {0: (1, 2), 1: (1, 2), 2: (2, 2), 3: (1, 2)}",
        [0, 1, 2, 3],
    ),
    "another kind of error": (_no_tensor, RouterReplayError, "on rank 2: MemoryError: no room", [2, 3]),
    "positions of parts": (
        _positions(lambda here: torch.tensor([0, 1]), lambda here: here.context_group),
        InputError,
        "6 response tokens of the context group have the position",
        [0, 1, 2, 3],
    ),
    "data-parallel ranks as a context group": (
        _positions(lambda here: torch.arange(2) + 2 * here.context, lambda here: here.data_group),
        InputError,
        "6 response tokens of the context group have the position",
        [0, 1, 2, 3],
    ),
    **{
        f"{name} over data and context ranks": (
            call,
            InputError,
            "process group [0, 1, 2, 3] and context group ",
            [0, 1, 2, 3],
        )
        for name, call in {
            "ratios": lambda here: LogRatios.of(
                **dict(zip(("trainer", "rollout", "responses"), here.batch(), strict=True)),
                process_group=dist.group.WORLD,
            ),
            "figures": lambda here: diagnose(here.ratios(lambda trainer: trainer), process_group=dist.group.WORLD),
            "weights": lambda here: self_normalized_weights(
                here.ratios(lambda trainer: trainer), over="batch", process_group=dist.group.WORLD
            ),
        }.items()
    },
    "no positions": (_no_positions, InputError, "the order of a sequence's tokens counts here", [0, 1, 2, 3]),
}


def _dropped(here: _Rank) -> dict[str, Any]:
    """The second batch has a NaN in the middle response, on the first of its ranks."""
    ratios = here.ratios(lambda trainer: _set(trainer, math.nan), bad_responses="drop")
    figures = diagnose(ratios, process_group=here.data_group)
    weights = self_normalized_weights(ratios, over="batch", process_group=here.data_group)
    # A loss of all the sequences that are left, and its gradient.
    current = ratios.trainer.clone().requires_grad_()
    loss, metrics = grpo_loss(
        current=current,
        old=ratios.rollout,
        advantages=torch.tensor([1.0, 2.0, -1.0]) - here.data,
        responses=ratios.responses,
        weights=weights,
        denominator=2 * SEQUENCES - 1,
    )
    loss.backward()
    metrics.require(here.data_group)
    of_all = metrics.all_reduce(here.data_group)
    return {
        "figures": figures,
        "weights": weights,
        "dropped": int(ratios.dropped),
        "mask": ratios.responses.mask,
        "loss": loss.detach(),
        "gradient": current.grad,
        "metrics": of_all.flat(),
    }


def _rank(rank: int) -> dict[str, Any]:
    here = _Rank(rank)
    raised: dict[str, Any] = {}
    for name, (call, *_) in CASES.items():
        try:
            call(here)
        except RouterReplayError as error:
            raised[name] = (type(error), str(error))
    return {"raised": raised, "dropped": _dropped(here)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(4, _rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_raise_the_same(name, ranks):
    _, kind, message, who = CASES[name]
    raised = {rank: found["raised"][name] for rank, found in enumerate(ranks) if name in found["raised"]}
    assert list(raised) == who
    for found in raised.values():
        assert found[0] is kind and found[1].startswith(message), found
    # What a context group finds by itself names its own ranks or tokens.
    if message.startswith(("on rank", "ranks compare")):
        assert len(set(raised.values())) == 1


def test_bad_responses_are_dropped_on_every_rank_and_losses_are_those_of_one(ranks):
    whole = [_whole(data) for data in (0, 1)]
    whole[1][2][1] = False
    trainer, rollout, mask = (torch.cat(each) for each in zip(*whole, strict=True))
    ratios = LogRatios.of(trainer=trainer, rollout=rollout, responses=Responses.padded(mask))
    expected = diagnose(ratios).flat()
    all_weights = self_normalized_weights(ratios, over="batch")
    weights = all_weights.view(2, SEQUENCES, 2, 2)
    current = trainer.clone().requires_grad_()
    loss, metrics = grpo_loss(
        current=current,
        old=rollout,
        advantages=torch.tensor([1.0, 2.0, -1.0, 0.0, 1.0, -2.0]),
        responses=ratios.responses,
        weights=all_weights,
    )
    loss.backward()
    gradient = current.grad.view(2, SEQUENCES, 2, 2)
    found = [each["dropped"] for each in ranks]
    assert (found[0]["loss"] + found[2]["loss"]).item() == pytest.approx(loss.item(), rel=1e-12)
    assert found[0]["loss"].equal(found[1]["loss"]) and found[2]["loss"].equal(found[3]["loss"])
    for rank, found in enumerate(each["dropped"] for each in ranks):
        data, context = divmod(rank, 2)
        assert found["dropped"] == data
        assert found["mask"].all(-1).tolist() == [True, data == 0, True]
        assert found["figures"] == ranks[0]["dropped"]["figures"]
        assert found["figures"].flat() == pytest.approx(
            expected | {"mismatch/dropped_sequences": 1}, rel=1e-12, abs=1e-15
        )
        torch.testing.assert_close(found["weights"], weights[data, :, context], rtol=1e-12, atol=0)
        torch.testing.assert_close(found["gradient"], gradient[data, :, context], rtol=1e-12, atol=1e-15)
        assert found["metrics"] == pytest.approx(metrics.flat(), rel=1e-12)
