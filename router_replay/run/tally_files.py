"""StepTally <-> the tensors and the metadata of a step's file that stand for its tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from router_replay.errors import InputError
from router_replay.mismatch.figures.tally import SUMS, Tally
from router_replay.mismatch.figures.weight_sums import WeightSums
from router_replay.run.corrections import CORRECTIONS
from router_replay.run.step_tally import TAUS, PassTally, StepTally
from router_replay.run.token_sample import TokenSample
from router_replay.run.weight_tally import CELL, HALF, WeightTally

PREFIX = "tally."

_FORM = {
    "sums": list(SUMS),
    "cell": CELL,
    "half": HALF,
    "taus": list(TAUS),
    "corrections": [each.name for each in CORRECTIONS],
}
"""What the numbers mean; a release that counts something else has its own, and reads tokens in place of these."""

_OF_PASS = ("counts", "sums", "extremes", "weight_sums", "drawn", "largest", "corrections", "cells")


def to_file(tally: StepTally) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under `tally.`, and the metadata `tally`; routes, layers and dynamics are the file's own."""
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {"form": _FORM, "num_tokens": tally.num_tokens, "largest_group": tally.largest_group}
    fields |= {"refused": tally.refused, "passes": {}}
    if tally.groups is not None:
        tensors["groups"] = tally.groups
    for name, each in tally.passes.items():
        sums = [
            torch.cat([part.highest, part.sums]) for part in (each.tally.token_weights, each.tally.sequence_weights)
        ]
        numbers, cells = _weights_to_tensors(each.corrections)
        of_pass = (each.tally.counts, each.tally.sums, each.tally.extremes, torch.stack(sums), each.sample.drawn,
                   each.sample.largest, numbers, cells)  # fmt: skip
        tensors |= {f"{what}.{name}": values for what, values in zip(_OF_PASS, of_pass, strict=True)}
        fields["passes"][name] = {
            "total": each.sample.total,
            "threshold": each.sample.threshold,
            "corrections": list(each.corrections),
        }
        fields["taus"] = list(each.tally.taus)
    fields["weights"] = list(tally.weights)
    tensors["weights"], tensors["weight_cells"] = _weights_to_tensors(tally.weights)
    return {PREFIX + name: values for name, values in tensors.items()}, {"tally": json.dumps(fields, allow_nan=False)}


def from_file(
    step: int, names: tuple[str, ...], metadata: Mapping[str, str], tensors: Mapping[str, Tensor], **others: Any
) -> StepTally | None:
    """What `to_file` made, or None where the file has no tallies, or those of another form.

    Args:
        names: of the trainer's passes.
        others: routes, layers and dynamics.

    Raises:
        InputError, KeyError, TypeError, ValueError, RuntimeError: tensors and metadata that contradict each other.
    """
    fields = json.loads(metadata.get("tally", "{}"))
    if fields.get("form") != _FORM:
        return None
    found = {name.removeprefix(PREFIX): values for name, values in tensors.items()}
    passes = {}
    for name, of_pass in fields["passes"].items():
        counts, sums, extremes, weight_sums, drawn, largest, numbers, cells = (
            found[f"{what}.{name}"] for what in _OF_PASS
        )
        taus = tuple(float(tau) for tau in fields["taus"])
        if len(counts) != 5 + len(taus) or sums.shape != (len(SUMS),) or weight_sums.shape != (2, 3):
            raise InputError(f"the tallies of trainer pass {name!r} have other lengths than their names")
        token_weights, sequence_weights = (WeightSums(each[:1], each[1:]) for each in weight_sums)
        passes[name] = PassTally(
            Tally(taus, counts, sums, extremes, token_weights, sequence_weights),
            TokenSample(int(of_pass["total"]), drawn, float(of_pass["threshold"]), largest),
            _weights_from_tensors(of_pass["corrections"], numbers, cells),
        )
    return StepTally(
        step,
        names,
        num_tokens=int(fields["num_tokens"]),
        passes=passes,
        weights=_weights_from_tensors(fields["weights"], found["weights"], found["weight_cells"]),
        groups=found.get("groups"),
        largest_group=int(fields["largest_group"]),
        refused=str(fields["refused"]),
        **others,
    )


def _weights_to_tensors(tallies: Mapping[str, WeightTally]) -> tuple[Tensor, Tensor]:
    """Tokens, kept ones and sums, float64 `[W, 5]`, and (weights' number, cell, tokens) of each cell that is not empty,
    int32 `[X, 3]`.
    """
    numbers = [
        torch.cat([torch.tensor([each.tokens, each.kept]).double(), each.sums.highest, each.sums.sums])
        for each in tallies.values()
    ]
    cells = torch.stack([each.cells for each in tallies.values()]) if tallies else torch.zeros(0, 1, dtype=torch.int64)
    places = cells.nonzero()
    counts = torch.cat([places, cells[places[:, 0], places[:, 1], None]], 1).int()
    return torch.stack(numbers) if numbers else torch.zeros(0, 5, dtype=torch.float64), counts


def _weights_from_tensors(names: list[str], numbers: Tensor, counts: Tensor) -> dict[str, WeightTally]:
    cells = torch.zeros(len(names), 2 * HALF + 1, dtype=torch.int64)
    number, cell, tokens = counts.long().unbind(1)
    cells[number, cell] = tokens
    return {
        name: WeightTally(int(row[0]), int(row[1]), cells[place], WeightSums(row[2:3], row[3:5]))
        for place, (name, row) in enumerate(zip(names, numbers, strict=True))
    }
