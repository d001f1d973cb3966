"""Two gloo ranks with a part of the batch each, against one with all of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from router_replay.errors import InputError
from router_replay.mismatch import (
    LogRatios,
    Responses,
    diagnose,
    grpo_loss,
    self_normalized_weights,
    truncated_importance_weights,
)
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.mismatch.spawned import on_ranks

SEQUENCES, WIDTH, LAYERS = 7, 9, 3
TAUS = (1.1, 2.0, 10.0)


def _joined() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rollout = -4 * torch.rand(SEQUENCES, WIDTH, generator=generator)
    trainer = (rollout + torch.randn(SEQUENCES, WIDTH, generator=generator)).clamp(max=0)
    trainer[6, 1] = -math.inf
    mask = torch.rand(SEQUENCES, WIDTH, generator=generator) < 0.7
    mask[6, 1], mask[2] = True, False
    # Sums whose largest terms are on one rank only.
    trainer[0], rollout[0] = -0.5, -9.0
    routes = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(2 * SEQUENCES * LAYERS)])
    trainer_routes, rollout_routes = routes.reshape(2, SEQUENCES, LAYERS, 2)
    valid = torch.tensor([True, True, False, True, True, True, True])
    return {
        "trainer": trainer,
        "rollout": rollout,
        "mask": mask,
        "trainer_routes": trainer_routes,
        "rollout_routes": rollout_routes,
        "routes_valid": valid,
    }


def _figures(part: dict[str, torch.Tensor], process_group: dist.ProcessGroup | None) -> dict[str, Any]:
    routes = {name: tensor for name, tensor in part.items() if "routes" in name}
    given = LogRatios.of(
        trainer=part["trainer"],
        rollout=part["rollout"],
        responses=Responses.padded(part["mask"]),
        process_group=process_group,
    )
    found = diagnose(given, taus=TAUS, process_group=process_group, **routes)
    weights = {
        level: self_normalized_weights(given, level=level, over="batch", process_group=process_group)
        for level in ("token", "sequence")
    }
    _, metrics = grpo_loss(
        current=part["trainer"],
        old=part["rollout"],
        advantages=part["rollout"] + 2,
        responses=given.responses,
        weights=truncated_importance_weights(given),
    )
    metrics = metrics if process_group is None else metrics.all_reduce(process_group)
    return {"diagnostics": found, "weights": weights, "metrics": metrics.flat()}


SPLITS = {"both have tokens": 3, "the second has none": SEQUENCES}


def _rank(rank: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, split in SPLITS.items():
        part = {key: tensor[split:] if rank else tensor[:split] for key, tensor in _joined().items()}
        found[name] = _figures(part, dist.group.WORLD)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(2, _rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SPLITS)
def test_two_ranks_equal_one(name, ranks):
    first, second = (found[name] for found in ranks)
    one = _figures(_joined(), None)
    assert first["diagnostics"] == second["diagnostics"]
    found, expected = first["diagnostics"], one["diagnostics"]
    for figure in ("num_tokens", "num_sequences", "zero_probability_tokens", "ratio_tails", "max_ratio", "min_ratio"):
        # Counts and maxima: to the last bit.
        assert getattr(found, figure) == getattr(expected, figure), figure
    assert found.routes == expected.routes
    assert found.flat() == pytest.approx(expected.flat(), rel=1e-6, abs=0)
    assert first["metrics"] == second["metrics"]
    # Sums of float64 numbers in another order.
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-12, abs=0)
    assert min(value for name, value in first["metrics"].items() if name != "loss/refused_tokens") > 0
    for level, expected_weights in one["weights"].items():
        joined = torch.cat([first["weights"][level], second["weights"][level]])
        # Float64 inside, rounded to float32 at the end: one unit in the last place at most.
        torch.testing.assert_close(joined, expected_weights, rtol=1e-6, atol=0)


def test_groups_of_prompts_are_not_split_over_ranks():
    responses = Responses.padded(torch.ones(1, 1))
    with pytest.raises(InputError, match="every prompt's group is on one rank"):
        self_normalized_weights(log_ratios(-torch.ones(1, 1), -torch.ones(1, 1), responses), process_group=object())
