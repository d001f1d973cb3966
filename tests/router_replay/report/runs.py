"""Small runs for the tests of the report."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import torch

from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.mismatch import Diagnostics, Responses, Tally
from router_replay.report.summary import RunSummary
from router_replay.report.weight_figures import WeightFigures
from router_replay.run import RunStep, write_step
from tests.router_replay.mismatch.pairs import log_ratios

NAMES = ("own routes", "replayed")

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(0, 2), num_experts=8, top_k=2)
RECORDED = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]], [[0, 1], [0, 1]]])
# Token 0 has its experts in another order, token 1 another expert in each layer; token 3 was never recorded.
OWN = torch.tensor([[[1, 0], [3, 2]], [[4, 6], [6, 5]], [[0, 2], [1, 3]], [[6, 7], [6, 7]]])
LINE = {
    "step": 3,
    "rollout_logprobs": [None, -1.5, -0.25, -2.0],
    "trainer_logprobs": {"old": [0.0, -1.0, -0.5, -2.0], "new": [0.0, -1.25, -0.25, -3.0]},
    "response_mask": [0, 1, True, 1],
}


def run_step(
    step: int,
    *,
    names: tuple[str, ...] = NAMES,
    routes: bool = True,
    layers: int = 3,
    scale: float = 0.1,
    zeros: int = 0,
) -> RunStep:
    """Twelve sequences of 20 tokens, four to a prompt; each further pass is five times closer to the rollout.

    Args:
        scale: standard deviation of log r in the first pass.
        zeros: response tokens to which the first pass gives probability 0.
    """
    generator = torch.Generator().manual_seed(step)
    count = 12 * 20
    rollout = -3 * torch.rand(count, generator=generator, dtype=torch.float64) - 10
    mask = torch.arange(count) % 20 >= 6
    passes = {}
    for number, name in enumerate(names):
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        passes[name] = rollout + noise * scale / 5**number
    passes[names[0]][mask.nonzero()[:zeros].flatten()] = -math.inf
    own = torch.arange(4).repeat(count, layers, 1)
    recorded = own.clone()
    # Layer l differs in every token whose number a multiple of 10 - l.
    for layer in range(layers):
        recorded[:: 10 - layer, layer, 0] = 9
    return RunStep.of(
        step,
        rollout_logprobs=rollout,
        trainer_logprobs=passes,
        responses=Responses.packed(mask, range(0, count + 1, 20), [number // 4 for number in range(12)]),
        rollout_routes=recorded if routes else None,
        trainer_routes=own if routes else None,
        moe_layers=range(1, layers + 1) if routes else None,
    )


def write_run(folder: Path, num_steps: int, **options) -> Path:
    """A folder with the files of a run; options as of `run_step`."""
    for step in range(num_steps):
        write_step(folder, run_step(step, **options))
    return folder


def masks(begin: int, end: int) -> RoutingMasks:
    return RoutingMasks.from_indices(
        RECORDED[begin:end],
        torch.ones(end - begin, dtype=torch.bool),
        start=begin,
        geometry=GEOMETRY,
        codec="rank",
        token_ids=[5, 6, 7, 8],
    )


def write_lines(path: Path, *lines: object) -> Path:
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


STEPS = [run_step(step, zeros=2 if step == 1 else 0) for step in (0, 1, 5)]


def whole_run(name: str, taus: tuple[float, ...]) -> Diagnostics:
    first, *others = (
        Tally.of(log_ratios(step.trainer_logprobs[name], step.rollout_logprobs, step.responses), taus) for step in STEPS
    )
    return Diagnostics.of(sum(others, start=first))


def series(summary: RunSummary) -> dict[str, dict[str, WeightFigures]]:
    titles = summary.passes[NAMES[0]].corrections
    return {title: {name: summary.passes[name].corrections[title] for name in NAMES} for title in titles}
