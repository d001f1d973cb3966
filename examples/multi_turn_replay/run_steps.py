"""The demo's conversations as the steps of a run, and the report about them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.multi_turn_replay.replay_report import OWN_ROUTES, REPLAYED
from examples.multi_turn_replay.rollout import Conversation
from router_replay.mismatch import Responses
from router_replay.report.page import write_report
from router_replay.report.summary import summarize
from router_replay.run import RunStep, read_tallies, write_step

STEP_MEANS = "a batch of conversations of one and the same model; nothing is trained between them"


def write_steps(
    conversations: Sequence[Conversation],
    native_logprobs: Sequence[torch.Tensor],
    replay_logprobs: Sequence[torch.Tensor],
    native_routes: Sequence[torch.Tensor],
    folder: Path,
    *,
    group_size: int = 1,
    num_steps: int = 8,
) -> list[Path]:
    """Write what a trainer would: one file for each of `num_steps` batches, or fewer of fewer groups.

    Files of an earlier run in `folder` are removed: they are steps of another run.

    Args:
        native_logprobs, replay_logprobs: float `[n]` in nats for each conversation of n tokens.
        native_routes: int `[n, L, K]`, the experts that the trainer took by itself.
        group_size: conversations about one problem, which follow each other.
    """
    for earlier in folder.glob("step-*.safetensors"):
        earlier.unlink()
    num_groups = -(-len(conversations) // group_size)
    num_steps = min(num_steps, num_groups)
    bounds = [num_groups * number // num_steps * group_size for number in range(num_steps)] + [len(conversations)]
    return [
        write_step(
            folder,
            RunStep.of(
                step,
                rollout_logprobs=torch.cat([torch.tensor(each.rollout_logprobs) for each in conversations[begin:end]]),
                trainer_logprobs={
                    OWN_ROUTES: torch.cat(list(native_logprobs[begin:end])),
                    REPLAYED: torch.cat(list(replay_logprobs[begin:end])),
                },
                responses=Responses.packed(
                    torch.cat([torch.tensor(each.sampled) for each in conversations[begin:end]]),
                    [0, *itertools.accumulate(len(each.token_ids) for each in conversations[begin:end])],
                    [conversation // group_size for conversation in range(begin, end)],
                ),
                rollout_masks=[each.masks for each in conversations[begin:end]],
                trainer_routes=torch.cat(list(native_routes[begin:end])),
            ),
        )
        for step, (begin, end) in enumerate(itertools.pairwise(bounds))
    ]


def report_steps(files: Sequence[Path], path: Path) -> None:
    """Write the page about a run's files, as `r3 report` does."""
    write_report(
        summarize(read_tallies(files)),
        path,
        title="Multi-turn rollout in SGLang, scored in Megatron-Core",
        inputs=[f"{files[0].parent.name} ({len(files)} files)"],
        step_means=STEP_MEANS,
    )
