"""A step of several ranks joined to that of one rank, and the bound within which the two must agree."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import microbatches, places
from tests.megatron_router_replay.parallel.training import RankStep, Shard

# Relative to the largest value of a tensor; u = 2^-53 is what one float64 operation rounds by.
#
# Two layouts compute the same sums in other orders. The longest have n = 96 terms (the vocabulary; hidden size, tokens
# of a pack and places of an expert are fewer), which rounds by at most n u in either order. At most 40 of them follow
# each other: 7 products in each of 5 layers, forward, and back through the same ones. What one of them passes on is
# larger than what came in by a factor that norms keep near to one; over all layers, forward and back, allow 10.
# 2 * 96 * 2 * 40 * 10 * 2^-53 = 1.7e-11. Found are at most 6e-15, since roundings cancel; a message crossed, a gradient
# scaled by a rank too many or a token left out is 1e-2 and more.
TOLERANCE = 2 * 96 * 2 * 40 * 10 * 2.0**-53


@dataclass
class Step:
    """What a whole step computed, in the terms of one rank.

    Attributes:
        losses: float64 `[num_microbatches]`.
        maps: experts `bool [S * B, E]` of every place, flattened from `[S, B]`, by (decoder layer, microbatch).
        gradients: by the parameter's name in the model of one rank, full.
    """

    losses: Tensor
    maps: dict[tuple[int, int], Tensor]
    gradients: dict[str, Tensor]


def joined(case: Case, ranks: list[RankStep]) -> Step:
    """Put the parts of all ranks together.

    Raises:
        AssertionError: ranks that hold the same part hold different values, a part is missing, or a recompute went to
            other experts than its forward pass.
    """
    for number, rank in enumerate(ranks):
        others = rank.recomputed_otherwise
        assert not others, f"rank {number} recomputed rows with other experts, by (layer, microbatch): {others}"
    return Step(_losses(case, ranks), _maps(case, ranks), _gradients(ranks))


def assert_same_step(found: Step, expected: Step, read: Sequence[Tensor] | None = None) -> None:
    """Dispatched experts are equal, losses and gradients within `TOLERANCE`.

    Experts come first: another choice changes everything behind it.

    Args:
        read: places of each microbatch whose experts matter, `bool [S * B]`; all by default.
    """
    assert found.maps.keys() == expected.maps.keys()
    for key in sorted(expected.maps):
        different = (found.maps[key] != expected.maps[key]).any(-1)
        if read is not None:
            different &= read[key[1]]
        assert not different.any(), (
            f"decoder layer {key[0]}, microbatch {key[1]}: places {different.nonzero().flatten().tolist()} go to others"
        )
    worst = errors(found, expected)
    wrong = {name: f"{error:.1e}" for name, error in worst.items() if not error <= TOLERANCE}
    assert not wrong, f"relative to one rank, beyond {TOLERANCE:.1e}: {wrong}"


def errors(found: Step, expected: Step) -> dict[str, float]:
    """Largest difference of the losses and of each gradient, relative to the largest value."""
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = {"losses": (found.losses, expected.losses)}
    pairs |= {name: (found.gradients[name], expected.gradients[name]) for name in sorted(expected.gradients)}
    result = {}
    for name, (one, other) in pairs.items():
        assert one.shape == other.shape, f"{name} is {list(one.shape)}, of one rank {list(other.shape)}"
        largest, difference = float(other.abs().max()), float((one - other).abs().max())
        # An expert that no token goes to has no gradient; anything else without one would tell nothing.
        assert largest > 0 or ".experts." in name, f"{name} is 0 on one rank"
        result[name] = difference / largest if largest else difference and math.inf
    return result


def _losses(case: Case, ranks: list[RankStep]) -> Tensor:
    parts: dict[tuple[int, int], Tensor] = {}
    for rank in ranks:
        for microbatch, loss in rank.losses.items():
            key = microbatch, rank.cp_rank
            assert torch.equal(parts.setdefault(key, loss), loss), (
                f"ranks differ in the loss of microbatch {microbatch}"
            )
    return torch.stack(
        [torch.stack([parts[index, cp] for cp in range(case.cp)]).sum() for index in range(case.num_microbatches)]
    )


def _maps(case: Case, ranks: list[RankStep]) -> dict[tuple[int, int], Tensor]:
    batches = microbatches(case)
    maps: dict[tuple[int, int], Tensor] = {}
    filled: dict[tuple[int, int], Tensor] = {}
    for rank in ranks:
        for key, part in rank.maps.items():
            batch = batches[key[1]]
            own = places(case, batch, rank.cp_rank, rank.tp_rank)
            assert part.shape[0] == len(own), f"a router of {key} has {part.shape[0]} rows where {len(own)} were due"
            whole = maps.setdefault(key, torch.zeros(batch.token_ids.numel(), part.shape[1], dtype=torch.bool))
            count = filled.setdefault(key, torch.zeros(batch.token_ids.numel(), dtype=torch.int))
            whole[own] = part
            count[own] += 1
    for key, count in filled.items():
        assert (count == 1).all(), f"places of {key} were dispatched {count.tolist()} times"
    return maps


def _gradients(ranks: list[RankStep]) -> dict[str, Tensor]:
    parts: dict[str, dict[int, tuple[Shard, Tensor]]] = defaultdict(dict)
    for rank in ranks:
        for shard, value in rank.gradients:
            _, first = parts[shard.name].setdefault(shard.index, (shard, value))
            assert torch.equal(first, value), f"replicas of {shard.name} have different gradients"
    full = {}
    for name, pieces in parts.items():
        shard = pieces[0][0]
        assert sorted(pieces) == list(range(shard.count)), f"{name} has parts {sorted(pieces)} of {shard.count}"
        full[name] = shard.join([pieces[index][1] for index in range(shard.count)])
    return full
