"""What came of a replayed step: rows dispatched as recorded, and losses and gradients beside those of one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import TOLERANCE, Step, errors, joined
from tests.megatron_router_replay.parallel.data import Microbatch, microbatches
from tests.megatron_router_replay.parallel.pool import RankError, RankPool
from tests.megatron_router_replay.parallel.stock import Use, attempt, given
from tests.megatron_router_replay.parallel.stock_flex import flex_rows
from tests.megatron_router_replay.parallel.training import RankStep, native_step

# Of a rank that waits for a message which another one, that failed, will not send.
TIMEOUT = 30.0


@dataclass(frozen=True)
class Outcome:
    """One step of one use of replay, in one case.

    Attributes:
        error: the first rank's exception; "" where the step went to its end.
        rows, wrong: recorded (place, layer) rows, and those dispatched to other experts.
        recomputed_otherwise: rows that a recompute dispatched to other experts than the forward pass.
        without_row, not_own: places that something reads and that have no row, and those of them that the first MoE
            layer did not dispatch to the trainer's own choice.
        worst: largest difference of losses and gradients from the right ones, relative to the largest value.
    """

    error: str = ""
    rows: int = 0
    wrong: int = 0
    recomputed_otherwise: int = 0
    without_row: int = 0
    not_own: int = 0
    worst: float = 0.0

    @property
    def right(self) -> bool:
        """Whether every row is, and losses and gradients are those of one rank up to rounding."""
        return not self.error and not self.wrong + self.recomputed_otherwise + self.not_own and self.worst <= TOLERANCE

    def __str__(self) -> str:
        if self.error:
            return f"error: {self.error}"
        if self.right:
            return f"right ({self.rows} rows)"
        parts = []
        if self.wrong:
            parts.append(f"{self.wrong} of {self.rows} rows")
        if self.recomputed_otherwise:
            parts.append(f"{self.recomputed_otherwise} of {self.rows} rows recomputed with other experts")
        if self.not_own:
            parts.append(f"{self.not_own} of {self.without_row} places without a row not the trainer's own")
        if self.worst > TOLERANCE:
            parts.append(f"losses or gradients off by {self.worst:.0e}")
        return "wrong without a word: " + ", ".join(parts)


class Judge:
    """Runs steps on pools of ranks, and says what came of them."""

    def __init__(self, pools: dict[int, RankPool]) -> None:
        self._pools = pools
        self._steps: dict[tuple[Case, Use | None], Step] = {}

    def outcome(self, case: Case, use: Use) -> Outcome:
        """What comes of one step.

        The right step is that of one rank by the other side: Megatron's for ours and ours for Megatron's, which agree
        where every token has a row. Where some have none, only ours takes the trainer's own choice.
        """
        recomputed, found = 0, self._steps.get((case, use))
        if found is None:
            ranks = self._run(case, use)
            if isinstance(ranks, str):
                return Outcome(ranks)
            recomputed = sum(sum(rank.recomputed_otherwise.values()) for rank in ranks)
            found = joined(case, [dataclasses.replace(rank, recomputed_otherwise={}) for rank in ranks])
        other = "hand" if use.by == "ours" and use.missing is None else "ours"
        expected = self._one_rank(case.one_rank(), Use(other, missing=use.missing))
        batches = [given(microbatch, use) for microbatch in microbatches(case)]
        rows = [_rows(case, batches, ordinal, found) for ordinal in range(len(case.moe_layers))]
        without_row, not_own = self._own_choice(case, batches, found)
        return Outcome(
            rows=sum(total for total, _ in rows),
            wrong=sum(wrong for _, wrong in rows),
            recomputed_otherwise=recomputed,
            without_row=without_row,
            not_own=not_own,
            worst=max(errors(found, expected).values()),
        )

    def prepare(self, cases: Iterable[Case]) -> Iterator[Case]:
        """Compute the right steps of all cases ahead, by the pool of one rank; yields each case that is done."""
        for case in dict.fromkeys(each.one_rank() for each in cases):
            for by in ("ours", "hand"):
                self._one_rank(case, Use(by))
            yield case

    def flex(self, use: Use) -> Outcome:
        """Of DeepEP's dispatcher, which is not trained here: what it would be told to send."""
        ((rows, wrong),) = self._pools[1].run(flex_rows, use)
        return Outcome(rows=rows, wrong=wrong)

    def _run(self, case: Case, use: Use) -> list[RankStep] | str:
        try:
            answers = self._pools[case.world_size].run(attempt, case, use, timeout=TIMEOUT)
        except RankError as error:
            return f"RankError: {error}"
        failed = [answer for answer in answers if isinstance(answer, str)]
        return failed[0] if failed else answers

    def _one_rank(self, case: Case, use: Use | None) -> Step:
        if (case, use) not in self._steps:
            pool = self._pools[1]
            ranks = pool.run(native_step, case) if use is None else pool.run(attempt, case, use)
            self._steps[case, use] = joined(case, ranks)
        return self._steps[case, use]

    def _own_choice(self, case: Case, batches: list[Microbatch], found: Step) -> tuple[int, int]:
        """Of the first MoE layer, into which nothing goes that replay could have changed."""
        if all(masks.valid.all() for microbatch in batches for masks in microbatch.masks):
            return 0, 0
        layer = case.moe_layers[0]
        native = self._one_rank(case.one_rank(), None)
        without_row = not_own = 0
        for microbatch in batches:
            alone = microbatch.is_read()
            alone[[place for place, _ in microbatch.recorded(0)]] = False
            different = (native.maps[layer, microbatch.index] != found.maps[layer, microbatch.index]).any(-1)
            without_row += int(alone.sum())
            not_own += int((alone & different).sum())
        return without_row, not_own


def _rows(case: Case, batches: list[Microbatch], ordinal: int, found: Step) -> tuple[int, int]:
    """(recorded, dispatched to others) rows of one MoE layer."""
    total = wrong = 0
    for microbatch in batches:
        routing_map = found.maps[case.moe_layers[ordinal], microbatch.index]
        for place, experts in microbatch.recorded(ordinal):
            total += 1
            wrong += not torch.equal(routing_map[place], _one_hot(experts, routing_map.shape[1]))
    return total, wrong


def _one_hot(experts: list[int], num_experts: int) -> Tensor:
    row = torch.zeros(num_experts, dtype=torch.bool)
    row[experts] = True
    return row
