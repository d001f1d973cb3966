"""The table of the diagnostics: a row for each, a column for each trainer pass; and what they warn of, in words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router_replay.mismatch.figures.diagnostics import Diagnostics
from router_replay.mismatch.log_ratios import SATURATION
from router_replay.report.dynamics import RunDynamics, not_finite
from router_replay.report.summary import RunSummary
from router_replay.run.step_tally import OF_GROUPS

LOW_EFFECTIVE_SHARE = 0.5
"""Effective sample size of plain token weights below which the report warns."""

_NAMED = 10


@dataclass(frozen=True)
class Row:
    """A diagnostic: its name, what it means in a few words, and a cell for each pass, or one for all of them."""

    name: str
    meaning: str
    cells: tuple[str, ...]


def rows(summary: RunSummary) -> list[Row]:
    """The table's rows, in order."""
    found = [figures.diagnostics for figures in summary.passes.values()]

    def row(name: str, meaning: str, cell: Callable[[Diagnostics], str]) -> Row:
        return Row(name, meaning, tuple(cell(each) for each in found))

    table = [
        row("response tokens", "sampled by the rollout", lambda each: f"{each.num_tokens:,}"),
        row("sequences", "with a response token", lambda each: f"{each.num_sequences:,}"),
        row("KL, k3", "estimate of KL(rollout || trainer), nats per token, never negative", lambda e: _small(e.k3)),
        row("KL, k1", "the same, unbiased and noisy, may be negative", lambda each: _small(each.k1)),
        row("KL, k2", "half the mean squared ln r", lambda each: _small(each.k2)),
        *(
            row(f"F({tau:g})", f"share of tokens with max(r, 1/r) > {tau:g}", functools.partial(_share, tau=tau))
            for tau in summary.taus
        ),
        row("largest r", "r = probability under the trainer / under the rollout", lambda e: _ratio(e.max_ratio)),
        row("smallest r", "0: the trainer would never take the token", lambda each: _ratio(each.min_ratio)),
        row("tokens of probability 0", "under the trainer", lambda each: f"{each.zero_probability_tokens:,}"),
        row("mean |ln r|", "nats per token", lambda each: _small(each.mean_abs_difference)),
        row("correlation", "of the log-probabilities of both sides", lambda each: _or_none(each.correlation)),
        row("chi-squared, tokens", "variance of the weights r", lambda each: _small(each.chi2_token)),
        row("chi-squared, sequences", "of the products of r", lambda each: _small(each.chi2_sequence)),
        row("effective sample size, tokens", "of the weights r, 100 % is best", lambda e: f"{e.ess_token:.2%}"),
        row("effective sample size, sequences", "of the products of r", lambda each: f"{each.ess_sequence:.2%}"),
        row("perplexity, rollout", "mean over sequences", lambda each: _ratio(each.perplexity_rollout)),
        row("perplexity, trainer", "mean over sequences", lambda each: _ratio(each.perplexity_trainer)),
        row("perplexity ratio", "trainer / rollout, 1 is best", lambda each: _ratio(each.perplexity_ratio)),
    ]
    if summary.routes is not None:
        routes = summary.routes
        table += [
            Row("tokens with routes", "on both sides, prompt tokens included", (f"{routes.num_tokens:,}",)),
            Row(
                "routes that differ", "(token, layer) pairs, trainer's own routes", (f"{routes.differing_routes:.3%}",)
            ),
            Row("tokens that differ", "in at least one layer", (f"{routes.differing_tokens:.3%}",)),
        ]
    return table


def warnings(summary: RunSummary) -> list[str]:
    """What a reader must know before the plots; empty where there is nothing."""
    found: list[str] = []
    dynamics = RunDynamics.of("", summary)
    if dynamics.collapse is not None:
        found.append(
            f"The reward collapses at step {dynamics.collapse}: from there on its mean of five steps is below half of"
            " its best for ten steps and more."
        )
    found += [
        f"{title[0].upper()}{title[1:]} is not finite in {listed_steps(steps)}."
        for title, steps in not_finite([dynamics]).items()
    ]
    for name, figures in summary.passes.items():
        each = figures.diagnostics
        if each.zero_probability_tokens:
            found.append(
                f"“{name}” gives probability 0 to {each.zero_probability_tokens:,} of {each.num_tokens:,} sampled"
                " tokens: KL(rollout || trainer) is infinite, and the estimates are over the other tokens. Look for a"
                " vocabulary mask or top-p mask that only one side applies."
            )
        if each.mean_abs_difference == 0 and not each.zero_probability_tokens:
            found.append(
                f"“{name}” equals the rollout bit for bit in every token: two engines never do. Check that the"
                " trainer's log-probabilities were computed, and not copied."
            )
        if each.ess_token < LOW_EFFECTIVE_SHARE:
            found.append(
                f"Uncorrected token weights of “{name}” leave an effective sample size of {each.ess_token:.1%}: a few"
                " tokens decide the gradient. Truncate or mask the weights, and look for the cause first."
            )
    if summary.routes is None:
        found.append(
            "No routes in these files: whether router mismatch causes the difference cannot be seen. Record them with"
            " --enable-router-capture, and give the trainer's own routes as well."
        )
    elif summary.routes.differing_routes == 0:
        found.append(
            "The trainer's routes are the rollout's in every token and layer: these are probably routes under replay,"
            " not the trainer's own choice."
        )
    if summary.groups_of_one:
        found.append(
            "Every prompt has one response: self-normalised weights are 1 and the Metropolis chain keeps everything,"
            " because both compare responses to one prompt."
        )
    if summary.ungrouped_steps:
        absent = " and ".join(f"“{name}”" for name in OF_GROUPS)
        found.append(
            f"Which responses are to one prompt is not known of {listed_steps(summary.ungrouped_steps)}: {absent} are"
            " not shown, because they compare those. Give group_ids to Responses.packed, or the key group in JSON"
            " lines."
        )
    if summary.split_steps:
        absent = " and ".join(f"“{name}”" for name in OF_GROUPS)
        found.append(
            f"Responses to one prompt are in several parts of {listed_steps(summary.split_steps)}, without their"
            f" tokens: {absent} are not shown, because they compare those. Write all responses to a prompt from one"
            " rank, or the tokens as well."
        )
    if summary.empty_steps:
        found.append(f"Left out, because no token of theirs was sampled: {listed_steps(summary.empty_steps)}.")
    found += [f"Step {each.step} is left out: {each.reason}." for each in summary.left_out[:_NAMED]]
    if len(summary.left_out) > _NAMED:
        others = [each.step for each in summary.left_out[_NAMED:]]
        found.append(f"Left out for reasons of this kind: {listed_steps(others)}.")
    return found


def listed_steps(numbers: Sequence[int]) -> str:
    """Some steps in words, the first by number."""
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"step{'s' if len(numbers) > 1 else ''} {', '.join(str(each) for each in numbers[:_NAMED])}{more}"


def _small(value: float) -> str:
    return f"{value:.3e}" if 0 < abs(value) < 0.01 else f"{value:.4g}"


def _share(found: Diagnostics, tau: float) -> str:
    share = found.ratio_tails[tau]
    return "0" if share == 0 else f"{share:.3%}" if share >= 1e-4 else f"{share:.1e}"


def _ratio(value: float) -> str:
    return f"{'≥ ' if value >= math.exp(SATURATION) else ''}{value:.5g}"


def _or_none(value: float | None) -> str:
    return "none: one side is constant" if value is None else f"{value:.6f}"
