"""The policies, their exact gradient, and what each correction's gradient is off by.

A policy without context: T positions, V tokens, logits of its own at each position. The trainer's logits are random;
the rollout's are the trainer's plus an error. A response is rewarded with 1 if at least as many of its tokens are
"good" as in the trainer's mean, so that the value of a token hangs on the others, as in a real task. The expected
reward under the trainer's policy is a Poisson-binomial tail, its gradient exact by automatic differentiation. Each
correction's gradient, from batches that the rollout sampled, is compared with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.machine import hardware, versions, write_json
from router_replay import mismatch
from router_replay.mismatch import LogRatios, Responses

VOCABULARY, GROUP_SIZE = 8, 16
GROUPS, GROUPS_AT_ONCE = 8, 256
"""Prompts in the batch whose noise is reported, and in what is computed at once: gradients of batches are means."""


@dataclass(frozen=True)
class Scenario:
    """Errors of the rollout's logits: `noise` at every position, `outlier` at a share of positions.

    Positions with outliers stand for tokens whose routes differ; noise for kernels and precision, or for staleness.
    """

    name: str
    length: int
    noise: float
    outlier: float = 0.0
    share: float = 0.0


SCENARIOS = (
    Scenario("engine noise, as with R3", 64, noise=0.05),
    Scenario("and routes that differ, as without R3", 64, noise=0.05, outlier=0.3, share=0.1),
    Scenario("and tokens that are far off", 64, noise=0.05, outlier=1.0, share=0.1),
    Scenario("stale", 64, noise=0.2),
    Scenario("stale, long", 256, noise=0.2),
    Scenario("very stale", 64, noise=0.5),
)


CORRECTIONS: dict[str, Callable[[LogRatios], Tensor]] = {
    "none": lambda ratios: ratios.responses.mask.float(),
    "token IS": lambda ratios: mismatch.truncated_importance_weights(ratios, cap=math.inf),
    "token TIS, 2": mismatch.truncated_importance_weights,
    "IcePop, 0.5 to 5": mismatch.icepop_weights,
    "token MIS, 0.5 to 2": mismatch.masked_importance_weights,
    "trust region mask, 0.1, 0.01": lambda ratios: mismatch.trust_region_mask(ratios).float(),
    "sequence IS": lambda ratios: mismatch.truncated_importance_weights(ratios, level="sequence", cap=math.inf),
    "sequence TIS, 2": lambda ratios: mismatch.truncated_importance_weights(ratios, level="sequence"),
    "sequence SNIS, group": lambda ratios: mismatch.self_normalized_weights(ratios, over="group"),
    "sequence Metropolis": lambda ratios: mismatch.metropolis_chain(ratios).multiplicity,
}


class Task:
    """A scenario's policies, and the trainer's exact gradient `[T, V]`."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        # Of the chains, which draw from torch's own.
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.generator = generator
        self.logits = 1.5 * normal(scenario.length, VOCABULARY)
        self.good = torch.rand(scenario.length, VOCABULARY, generator=generator) < 0.5
        scale = torch.full((scenario.length, 1), scenario.noise)
        outliers = torch.randperm(scenario.length, generator=generator)[: round(scenario.share * scenario.length)]
        scale[outliers] = scenario.outlier
        self.rollout_logits = self.logits + scale * normal(scenario.length, VOCABULARY)
        self.threshold = round((self.logits.softmax(-1) * self.good).sum().item())
        logits = self.logits.double().requires_grad_()
        self._expected_reward(logits).backward()
        assert logits.grad is not None
        self.gradient = logits.grad

    def _expected_reward(self, logits: Tensor) -> Tensor:
        good = (logits.softmax(-1) * self.good).sum(-1)
        counts = torch.ones(1, dtype=torch.float64)
        for p in good:
            none = counts.new_zeros(1)
            counts = torch.cat([counts * (1 - p), none]) + torch.cat([none, counts * p])
        return counts[self.threshold :].sum()

    def batch(self) -> tuple[Tensor, Responses, Tensor]:
        """Sampled tokens `[B, T]`, their responses in groups, and advantages over the group's other rewards `[B]`."""
        size = GROUPS_AT_ONCE * GROUP_SIZE
        probs = self.rollout_logits.softmax(-1)
        tokens = torch.multinomial(probs, size, replacement=True, generator=self.generator).T
        rewards = (self.good[torch.arange(len(probs)), tokens].sum(-1) >= self.threshold).float()
        groups = rewards.view(GROUPS_AT_ONCE, GROUP_SIZE)
        others = (groups.sum(-1, keepdim=True) - groups) / (GROUP_SIZE - 1)
        responses = Responses.padded(
            torch.ones_like(tokens), torch.arange(GROUPS_AT_ONCE).repeat_interleave(GROUP_SIZE)
        )
        return tokens, responses, (groups - others).flatten()

    def diagnose(self) -> mismatch.Diagnostics:
        """The scenario as a run would see it."""
        tokens, responses, _ = self.batch()
        trainer, rollout = (
            logits.log_softmax(-1).gather(-1, tokens.T).T for logits in (self.logits, self.rollout_logits)
        )
        return mismatch.diagnose(LogRatios.of(trainer=trainer, rollout=rollout, responses=responses))

    def estimate(
        self, weigh: Callable[[LogRatios], Tensor], batch: tuple[Tensor, Responses, Tensor]
    ) -> tuple[Tensor, float]:
        """The gradient `[T, V]` that a loss with these weights has, and the effective share of its samples."""
        tokens, responses, advantages = batch
        logits = self.logits.clone().requires_grad_()
        index = tokens.T
        current = logits.log_softmax(-1).gather(-1, index).T
        rollout = self.rollout_logits.log_softmax(-1).gather(-1, index).T
        weights = weigh(LogRatios.of(trainer=current, rollout=rollout, responses=responses))
        loss, metrics = mismatch.grpo_loss(
            current=current, old=current.detach(), advantages=advantages, responses=responses, weights=weights
        )
        # The mean over tokens is 1 / T of the sum that the score of a response is.
        (-loss * tokens.shape[-1]).backward()
        assert logits.grad is not None
        return logits.grad.double(), float(metrics.weight_ess)


def errors_of(scenario: Scenario, batches: int, seed: int) -> dict[str, dict[str, float]]:
    """Of each correction, relative to the norm of the exact gradient: bias, noise of a batch, and their root sum."""
    task = Task(scenario, seed)
    sums = {name: torch.zeros_like(task.gradient) for name in CORRECTIONS}
    squares, shares = dict.fromkeys(CORRECTIONS, 0.0), dict.fromkeys(CORRECTIONS, 0.0)
    for _ in track(range(batches), scenario.name, transient=True):
        batch = task.batch()
        for name, weigh in CORRECTIONS.items():
            gradient, share = task.estimate(weigh, batch)
            sums[name] += gradient
            squares[name] += float(gradient.square().sum())
            shares[name] += share
    norm = float(task.gradient.square().sum())
    found = {}
    for name in CORRECTIONS:
        mean = sums[name] / batches
        variance = (squares[name] - batches * float(mean.square().sum())) / (batches - 1)
        # The mean's own noise is part of its distance from the truth.
        bias = float((mean - task.gradient).square().sum()) - variance / batches
        of_a_batch = variance * GROUPS_AT_ONCE / GROUPS
        found[name] = {
            "bias": math.sqrt(max(bias, 0) / norm),
            "bias_resolution": math.sqrt(variance / batches / norm),
            "noise": math.sqrt(of_a_batch / norm),
            "error": math.sqrt((max(bias, 0) + of_a_batch) / norm),
            "effective_share": shares[name] / batches,
        }
    return found


def measure(batches: int, seed: int, json_file: Path | None) -> None:
    """Print a table for each scenario, and write the figures to `json_file`.

    Args:
        batches: for each scenario, of `GROUPS_AT_ONCE` prompts with `GROUP_SIZE` responses each; two at least.
        seed: of policies and samples.
    """
    console = Console(width=120)
    report: dict[str, Any] = {"batches": batches, "seed": seed, "hardware": hardware(), "versions": versions()}
    for scenario in SCENARIOS:
        found = errors_of(scenario, batches, seed)
        seen = Task(scenario, seed).diagnose()
        report[scenario.name] = {"diagnostics": seen.flat(""), "corrections": found}
        title = (
            f"{scenario.name}: {scenario.length} tokens, k3 {seen.k3:.1e}, F(2) {seen.ratio_tails[2.0]:.1e},"
            f" ESS {seen.ess_token:.3f} of tokens, {seen.ess_sequence:.3f} of sequences"
        )
        table = Table("correction", title=title, title_justify="left")
        for heading in ("bias", "resolved to", "noise of a batch", "error", "effective share"):
            table.add_column(heading, justify="right")
        for name, figures in found.items():
            errors = [f"{figures[key]:.3f}" for key in ("bias", "bias_resolution", "noise", "error")]
            table.add_row(name, *errors, f"{figures['effective_share']:.3f}")
        console.print(table)
    console.print(
        f"noise of a batch of {GROUPS} prompts with {GROUP_SIZE} responses each; all relative to the gradient's norm"
    )
    console.print(f"{report['hardware']}\n{report['versions']}")
    if json_file is not None:
        write_json(report, json_file)
