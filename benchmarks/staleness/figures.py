"""What trust region masks drop of a rollout that is some updates old, by the length of its responses.

A recurrent policy of 32 tokens learns by GRPO to write tokens in rising order. The policy of a moment is kept as the
rollout engine's, and goes on learning from fresh samples; after each number of updates the mask compares it with what
the kept one samples. The ratios are those of real updates in contexts, with tails as they come.
"""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import hardware, versions, write_json
from benchmarks.markdown import spread
from router_replay.mismatch import (
    LogRatios,
    Responses,
    diagnose,
    group_relative_advantages,
    grpo_loss,
    trust_region_mask,
)

VOCABULARY, HIDDEN = 32, 64
PROMPTS, GROUP_SIZE, TRAINING_LENGTH = 8, 8, 64
WARMUP, LEARNING_RATE = 40, 2e-3
UPDATES = (4, 8, 10, 12, 16, 32)
LENGTHS, RESPONSES = (64, 512, 2048), 128
BOUNDS: dict[str, dict[str, float | None]] = {
    "default": {},
    "max k2 0.1 alone": {"max_k2": 0.1, "mean_k3": None},
    "max k2 2.5 alone": {"max_k2": 2.5, "mean_k3": None},
    "mean k3 0.01 alone": {"max_k2": None, "mean_k3": 0.01},
}


class Policy(nn.Module):
    """Logits of the next token from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.cell = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found, state = self.cell(self.embedding(tokens), state)
        return self.head(found), state

    def logprobs(self, tokens: Tensor) -> Tensor:
        """Of all tokens but the first, `[B, T]` of `[B, T + 1]`."""
        return self(tokens[:, :-1])[0].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    @torch.no_grad()
    def sample(self, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Sequences that go on from a first token each, `[B, T + 1]`."""
        tokens, state = [first[:, None]], None
        for _ in range(length):
            logits, state = self(tokens[-1], state)
            tokens.append(torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator))
        return torch.cat(tokens, -1)


@dataclass
class Training:
    """GRPO on fresh samples, an update at a time."""

    policy: Policy
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=LEARNING_RATE)

    def update(self) -> None:
        prompts = torch.randint(VOCABULARY, (PROMPTS,), generator=self.generator).repeat_interleave(GROUP_SIZE)
        tokens = self.policy.sample(prompts, TRAINING_LENGTH, self.generator)
        rewards = (tokens[:, 1:] > tokens[:, :-1]).float().mean(-1)
        responses = Responses.padded(
            torch.ones_like(tokens[:, 1:]), torch.arange(PROMPTS).repeat_interleave(GROUP_SIZE)
        )
        current = self.policy.logprobs(tokens)
        advantages = group_relative_advantages(rewards, responses)
        loss, _ = grpo_loss(current=current, old=current.detach(), advantages=advantages, responses=responses)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()


def measure(seeds: int, first_seed: int, json_file: Path | None) -> None:
    """Print shares of dropped responses for each number of updates and length; write them to `json_file`."""
    found = [_of_seed(seed) for seed in track(range(first_seed, first_seed + seeds), "seeds", transient=True)]
    figures = {
        "date": datetime.date.today().isoformat(),
        "seeds": seeds,
        "hardware": hardware(),
        "versions": versions(),
        "rows": [
            {
                "updates": updates,
                "length": length,
                "k3": [of_seed[updates, length]["k3"] for of_seed in found],
                "f_2": [of_seed[updates, length]["f_2"] for of_seed in found],
                "dropped": {name: [of_seed[updates, length]["dropped"][name] for of_seed in found] for name in BOUNDS},
            }
            for updates in UPDATES
            for length in LENGTHS
        ],
    }
    table = Table("updates", "tokens", "k3", "F(2)", *BOUNDS, title="dropped responses", title_justify="left")
    for each in figures["rows"]:
        shares = (spread(values, "{:.0%}") for values in each["dropped"].values())
        of_ratios = spread(each["k3"], "{:.2g}"), spread(each["f_2"], "{:.2g}")
        table.add_row(str(each["updates"]), str(each["length"]), *of_ratios, *shares)
    console = Console(width=160)
    console.print(table)
    console.print(f"{figures['hardware']}\n{figures['versions']}")
    if json_file is not None:
        write_json(figures, json_file)


def _of_seed(seed: int) -> dict[tuple[int, int], dict[str, Any]]:
    """Figures by number of updates and length of the responses."""
    torch.manual_seed(seed)
    training = Training(Policy(), torch.Generator().manual_seed(seed))
    for _ in range(WARMUP):
        training.update()
    rollout = copy.deepcopy(training.policy)
    sampled = {}
    for length in LENGTHS:
        first = torch.randint(VOCABULARY, (RESPONSES,), generator=training.generator)
        tokens = rollout.sample(first, length, training.generator)
        with torch.no_grad():
            sampled[length] = tokens, rollout.logprobs(tokens)
    found: dict[tuple[int, int], dict[str, Any]] = {}
    done = 0
    for updates in UPDATES:
        for _ in range(updates - done):
            training.update()
        done = updates
        for length, (tokens, logprobs) in sampled.items():
            responses = Responses.padded(torch.ones_like(tokens[:, 1:]))
            with torch.no_grad():
                ratios = LogRatios.of(trainer=training.policy.logprobs(tokens), rollout=logprobs, responses=responses)
            seen = diagnose(ratios)
            found[updates, length] = {
                "k3": float(seen.k3),
                "f_2": float(seen.ratio_tails[2.0]),
                "dropped": {
                    name: 1 - float(trust_region_mask(ratios, **bounds)[:, 0].float().mean())
                    for name, bounds in BOUNDS.items()
                },
            }
    return found
