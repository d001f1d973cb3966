"""Small runs for the tests of the report."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megatron_router_replay.report import RunStep, write_step

NAMES = ("own routes", "replayed")


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
        rollout,
        passes,
        mask,
        range(0, count + 1, 20),
        group_ids=[number // 4 for number in range(12)],
        rollout_routes=recorded if routes else None,
        trainer_routes=own if routes else None,
        moe_layers=range(1, layers + 1) if routes else None,
    )


def write_run(folder: Path, num_steps: int, **options) -> Path:
    """A folder with the files of a run; options as of `run_step`."""
    for step in range(num_steps):
        write_step(folder, run_step(step, **options))
    return folder
