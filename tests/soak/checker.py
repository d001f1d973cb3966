"""Every row of every answer, held against the reference and against the names of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.soak.answers import ORIGINS, Answer
from tests.soak.checkpoints import Checkpoints
from tests.soak.oracle import Judged, Oracle, margins_of
from tests.soak.tally import Tally
from tests.soak.weights import WeightHistory


@dataclass
class Checker:
    """Holds answers against the reference and writes what it finds into the tally."""

    oracle: Oracle
    checkpoints: Checkpoints
    history: WeightHistory
    tally: Tally

    def check(self, answers: list[Answer]) -> None:
        """Check some answers, in one pass of the reference."""
        recorded = []
        for answer in answers:
            before = torch.full((answer.start, *answer.experts.shape[1:]), -1)
            recorded.append(torch.cat([before, answer.experts]))
        token_ids = [answer.token_ids[:-1] for answer in answers]
        for answer, judged in zip(answers, self.oracle.judge(token_ids, recorded), strict=True):
            self._check(answer, judged)

    def _check(self, answer: Answer, judged: Judged) -> None:
        last = self._last_margins(answer, judged.last_logits[answer.start :])
        margins = torch.cat([judged.margins[answer.start :], last[:, None]], dim=-1)
        wrong = answer.valid & (margins < -self.oracle.bounds).any(-1)
        ties = answer.valid[:, None] & ~wrong[:, None] & (margins < 0)
        for number, origin in enumerate(ORIGINS):
            of_origin = answer.origins == number
            self.tally.rows[origin] += int(of_origin.sum())
            self.tally.invalid[origin] += int((of_origin & ~answer.valid).sum())
            self.tally.wrong[origin] += int((of_origin & wrong).sum())
        computed = _computed(answer)
        self.tally.distinct += int(computed.sum())
        self.tally.near_ties += int(ties.sum())
        if ties.any():
            self.tally.closest = max(self.tally.closest, float((-margins / self.oracle.bounds)[ties].max()))
        if wrong.any():
            self.tally.fault(_describe(answer, margins, wrong))
        self._check_names(answer, computed)

    def _last_margins(self, answer: Answer, logits: Tensor) -> Tensor:
        """Margins of the last layer, each row under the checkpoint that its version names."""
        last = answer.experts[:, -1]
        # [checkpoints, rows]
        under_all = torch.stack([margins_of(logits[:, order], last) for order in self.checkpoints.orders])
        if answer.names[:1] == [None] and len(set(answer.names)) == 1 and answer.valid.any():
            # A format without names: right under any of the checkpoints is as much as can be asked.
            return under_all.amax(0)
        margins = torch.full((len(answer),), -torch.inf)
        for name in set(answer.names) - {None}:
            assert name is not None
            rows = torch.tensor([each == name for each in answer.names]) & answer.valid
            checkpoint = self.history.checkpoints.get(name)
            if checkpoint is None:
                checkpoint = self._learned(name, under_all[:, rows])
            if checkpoint is not None:
                margins[rows] = under_all[checkpoint, rows]
        return margins

    def _learned(self, name: str, under_all: Tensor) -> int | None:
        """The checkpoint behind a name that the server gave: the only one that all of its first rows are of."""
        fitting = [c for c in self.history.unnamed() if bool((under_all[c] >= -self.oracle.bounds[-1]).all())]
        if len(fitting) != 1:
            self.tally.fault(f"the unknown weight version {name!r} fits {len(fitting)} of the updates without a name")
            return None
        self.tally.happened("names given by the server")
        self.history.checkpoints[name] = fitting[0]
        return fitting[0]

    def _check_names(self, answer: Answer, computed: Tensor) -> None:
        if answer.meta_info["num_retractions"]:
            # What it lost may have been taken from the cache again, with older names.
            return
        for name in {answer.names[row] for row in (computed & answer.valid).nonzero().flatten().tolist()} - {None}:
            assert name is not None
            given = self.history.given(name)
            if given and not self.history.in_force(name, answer.sent, answer.received):
                self.tally.fault(f"rows of version {name!r} were computed when it was not in force: {answer.meta_info}")


def _computed(answer: Answer) -> Tensor:
    """Rows that the request computed itself, as far as its answer tells."""
    computed = answer.origins == ORIGINS.index("computed")
    if answer.meta_info["num_retractions"]:
        # It was admitted once before it was retracted, and said then what was cached.
        positions = torch.arange(len(answer)) + answer.start
        computed = positions >= answer.meta_info["cached_tokens"]
    return computed


def _describe(answer: Answer, margins: Tensor, wrong: Tensor) -> str:
    rows = wrong.nonzero().flatten().tolist()
    lines = [f"{len(rows)} wrong rows of {len(answer)}, marked valid: {answer.meta_info}"]
    for row in rows[:8]:
        lines.append(
            f"  token {answer.start + row}: {ORIGINS[int(answer.origins[row])]}, version {answer.names[row]!r}, margins"
            f" {[round(each, 6) for each in margins[row].tolist()]}, recorded {answer.experts[row].tolist()}"
        )
    lines.append(f"  tokens: {answer.token_ids}")
    runs = [(row, name) for row, name in enumerate(answer.names) if row == 0 or answer.names[row - 1] != name]
    lines.append(f"  versions: {runs}; origins {answer.origins.tolist()}")
    return "\n".join(lines)
