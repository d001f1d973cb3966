"""The sections of the page: which plots, and how to read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from router_replay.report.dynamics import FEW_STEPS, QUANTITIES, RunDynamics, shown
from router_replay.report.dynamics_plots import dynamics_over_steps
from router_replay.report.ratio_plots import scatter, tails
from router_replay.report.step_plots import (
    MAX_COLUMNS,
    kl_over_steps,
    route_heat_map,
    tails_and_sizes_over_steps,
)
from router_replay.report.summary import RunSummary
from router_replay.report.weight_figures import LADDER
from router_replay.report.weight_plots import Series, effective_sample_sizes, weight_histograms


@dataclass(frozen=True, eq=False)
class Section:
    """A plot with its words.

    Attributes:
        name: of the HTML element.
        figure: or None where the run has nothing to draw.
        alternative: for a reader who does not see the picture.
        caption: how to read it, and what is good and bad; or why there is nothing.
        table: a head and rows, to stand above the plot.
    """

    name: str
    title: str
    figure: Figure | None
    alternative: str
    caption: str
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


def dynamics_section(runs: Sequence[RunDynamics], step_means: str) -> Section:
    """How training went in one run, or in several on the same axes."""
    drawn = shown(runs)
    zero = [quantity.title for quantity in QUANTITIES
            if quantity not in drawn and any(quantity.name in run.curves for run in runs)]  # fmt: skip
    return Section(
        "dynamics",
        "Dynamics",
        dynamics_over_steps(runs) if drawn else None,
        f"{', '.join(quantity.title for quantity in drawn)} over steps, for {', '.join(run.name for run in runs)}",
        f"A step is {step_means}. Of more than {FEW_STEPS} values the bold line is the mean of five, the faint one each"
        " of them. Collapse (dotted) is where the reward's mean of five steps falls below half of its best so far and"
        " stays there for ten steps."
        " What to look for before it: KL (k3) and F(2) that rise, a gradient norm that grows by orders of magnitude, an"
        " effective sample size that falls, entropy that runs to 0 or away upwards, responses that get shorter or are"
        " cut off. KL and F(2) compare trainer and rollout, in the first of the trainer's passes."
        + (f" 0 at every step, and not drawn: {', '.join(zero)}." if zero else ""),
        _scores(runs),
    )


def _scores(runs: Sequence[RunDynamics]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    head = ("run", "last step", "best evaluation", "at step", "best reward, mean of 5", "at step", "collapse")
    rows = []
    for run in runs:
        scores: list[str] = []
        for best in (run.best_evaluation, run.best_reward):
            scores += ["none", ""] if best is None else [f"{best[0]:.4g}", f"{best[1]:,}"]
        collapse = "none" if run.collapse is None else f"step {run.collapse:,}"
        # Nobody can say that a run without rewards did not collapse.
        rows.append([run.name, f"{run.last_step:,}", *scores, collapse if run.best_reward else "not known"])
    return head, rows


def sections(summary: RunSummary, step_means: str) -> Iterator[Section]:
    """All sections, each drawn when its turn comes."""
    found = {name: figures.diagnostics for name, figures in summary.passes.items()}
    samples = {name: figures.sample for name, figures in summary.passes.items()}
    names = list(summary.passes)
    if summary.dynamics:
        yield dynamics_section([RunDynamics.of("this run", summary)], step_means)
    yield Section(
        "ratio-tails",
        "Tails of the probability ratio, F(τ)",
        tails(found),
        "Curves of the share of tokens whose ratio exceeds tau, for "
        + "; ".join(f"{name}: F(2) = {_tail(summary, name):.2e}" for name in names),
        "Read it at a τ on the horizontal axis: the height is the share of sampled tokens whose probability differs"
        " between trainer and rollout by more than that factor, in either direction. Lower and further left is better;"
        " a curve that goes on to the right, with a flat tail, means few tokens with huge ratios: the extreme tokens"
        " that were seen before training collapsed (arXiv 2510.11370). Below the dotted line there is less than one"
        " token.",
    )
    sample = samples[names[0]]
    yield Section(
        "ratio-scatter",
        "Ratio of each token",
        scatter(samples),
        "Dots of tokens: natural logarithm of the ratio by the rollout's probability",
        f"Each dot is a sampled token ({len(sample.points):,} drawn at random of {sample.total:,}), the rings are the"
        f" {len(sample.extremes):,} tokens with the largest |ln r|. Height 0 is perfect agreement, 0.69 above or below"
        " it (dotted) is a factor of 2; the axis is linear near 0, then logarithmic. Good is a narrow band around 0."
        " A band that widens to the left is usual, since rare tokens are the hardest to agree on; a cloud that leans to"
        " one side, or far dots at high probability, is a bug or a token computed with other experts.",
    )
    yield Section(
        "kl-over-steps",
        "KL over steps",
        kl_over_steps(summary.steps, names),
        f"KL estimates k3 and k1 of {len(summary.steps)} steps for {', '.join(names)}",
        f"A step is {step_means}. Both estimate KL(rollout || trainer) of the sampled tokens, in nats. Flat and low is"
        " good; k3 that rises from step to step is the drift that ends in collapse, a single spike is a batch to look"
        " at. k1 should scatter around k3; k1 that stays below 0 says that tokens are systematically likelier in the"
        " trainer, as after a temperature or a mask that only one side applies.",
    )
    tau = 2.0 if 2.0 in summary.taus else max(summary.taus)
    yield Section(
        "tails-over-steps",
        "Tails and effective sample size over steps",
        tails_and_sizes_over_steps(summary.steps, names, tau),
        f"F({tau:g}) and the effective sample sizes by token and by sequence of {len(summary.steps)} steps for"
        f" {', '.join(names)}",
        f"Left: F({tau:g}), the share of the step's tokens whose probability differs by more than a factor of {tau:g};"
        " a rise from step to step is what to look for, a mean of ratios hides it. Middle and right: the effective"
        " sample size (Σw)² / (n Σw²) of the uncorrected weights, w = r for each of n tokens and the product of r for"
        " each of n sequences. 100 % is best. A fall from step to step means that fewer and fewer"
        " tokens or sequences decide the gradient; that of sequences is usually the lower one, the more so the longer"
        " they are. Truncate or mask the weights, and look for the cause.",
    )
    if summary.routes is None:
        yield Section(
            "route-heat-map",
            "Route disagreement by layer",
            None,
            "",
            "Not drawn: no step has the routes of both sides. Start the server with --enable-router-capture, and write"
            " rollout_masks (or rollout_routes) and the trainer's own trainer_routes with each step.",
        )
    else:
        several = " (several steps share a column)" if len(summary.steps) > MAX_COLUMNS else ""
        yield Section(
            "route-heat-map",
            "Route disagreement by layer",
            route_heat_map(summary.steps, summary.routes, summary.moe_layers),
            f"Share of tokens whose experts differ, {len(summary.routes.differing_by_layer)} layers by"
            f" {len(summary.steps)} steps; over all {summary.routes.differing_routes:.2%} of routes differ",
            "Share of tokens for which the trainer's router, left alone, takes another set of experts than the"
            f" rollout's did: a row for each MoE layer, a column for each step{several}, brighter is worse; the bars"
            " are all steps together. Some per cent in every layer is what two engines with other kernels give."
            " One layer at many times the others points to a bug in that layer; everything near 100 % to misaligned"
            " routes or other weights; brighter from some step on to a change of weights that one side missed.",
        )
    series = _series(summary)
    yield Section(
        "weight-histogram",
        "Importance weights of each correction",
        weight_histograms(series, names),
        "Histograms of the importance weights of " + ", ".join(series),
        "Share of response tokens (vertical, logarithmic) by weight (horizontal, logarithmic), every panel on its own"
        " scale; weight 0, a token that is left out, is in the panel's title, in the order of the legend. Good is a"
        " narrow peak at 1: the correction has nothing to correct. A wide or one-sided histogram means that the"
        " correction changes the gradient; a wall at the cap, that it is biased. The outermost bars also hold what lies"
        f" beyond {1 / LADDER[-1]:g} and {LADDER[-1]:g}.",
    )
    yield Section(
        "effective-sample-size",
        "Effective sample size of each correction",
        effective_sample_sizes(series, names),
        "; ".join(
            f"{title}, {name}: {figures.total.effective_share:.1%} effective, {figures.kept_share:.1%} kept"
            for title, by_pass in series.items()
            for name, figures in by_pass.items()
        ),
        "Left: (Σw)² / (n Σw²), the share of the n response tokens that the weighted batch is worth; the black line is"
        " the lowest of all steps. Right: the share of tokens that keep any weight, which the left bar never exceeds."
        " 100 % is best. Bars of the same length mean that the kept tokens weigh about the same, and short ones that"
        " the filter is strict; a left bar much shorter than its right one means that a few tokens carry the gradient.",
    )


def _series(summary: RunSummary) -> Series:
    first = next(iter(summary.passes.values()))
    series = {
        title: {name: figures.corrections[title] for name, figures in summary.passes.items()}
        for title in first.corrections
    }
    # Names of the trainer's own choosing may be those of the corrections.
    return series | {f"applied: {name}": {"as applied by the trainer": each} for name, each in summary.weights.items()}


def _tail(summary: RunSummary, name: str) -> float:
    tails_of = summary.passes[name].diagnostics.ratio_tails
    return tails_of[min(tails_of, key=lambda tau: abs(tau - 2))]
