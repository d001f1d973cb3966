"""FSDP2 on two ranks, each with microbatches of its own, against one rank that has them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_router_replay import attach
from tests.hf_router_replay.fsdp_rank import CASES, NUM_RANKS, batches
from tests.hf_router_replay.small_models import FAMILIES, build, computed_experts, logits_of, loss_of, wrong_rows
from tests.random_batches import gradients
from tests.rank_processes import run_ranks

RANKS = range(NUM_RANKS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_ranks(Path(__file__).with_name("fsdp_rank.py"), folder, NUM_RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in RANKS]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """By family, one model's logits and experts of every rank's microbatches in order, and its gradients."""
    found = {}
    for family in FAMILIES:
        model = build(family).train()
        logits = []
        with attach(model, overlap_every=None) as replay, computed_experts(model) as seen:
            for batch in (each for rank in RANKS for each in batches(family, rank)):
                with replay.microbatch(batch.masks, batch.layout):
                    logits.append(logits_of(model, batch))
                # FSDP2 averages over ranks.
                (loss_of(logits[-1], batch) / NUM_RANKS).backward()
        found[family] = {
            "logits": [each.detach() for each in logits], "experts": seen, "gradients": gradients(model),
        }  # fmt: skip
    return found


@pytest.mark.parametrize(("family", "way"), CASES)
def test_two_ranks_are_equal_to_one(ranks, alone, family, way):
    expected = alone[family]
    for rank in RANKS:
        found = ranks[rank][family, way]
        for number, batch in enumerate(batches(family, rank)):
            assert torch.equal(found["logits"][number], expected["logits"][2 * rank + number])
            for layer, seen in found["experts"].items():
                # With checkpointing, each forward pass is followed by its recompute.
                passes = seen[:: len(seen) // 2]
                assert len(seen) == (4 if way == "checkpointed" else 2)
                assert torch.equal(passes[number], expected["experts"][layer][2 * rank + number])
                assert wrong_rows({layer: passes[: number + 1]}, batch) == 0
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in found["gradients"].items():
            one = expected["gradients"][name]
            # Four microbatches are added in another order.
            assert (gradient - one).abs().max() <= 8 * 2.0**-24 * max(one.abs().max(), 1), name
