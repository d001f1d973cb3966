"""What is drawn equals what the functions of the mismatch package say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from router_replay.errors import DataError
from router_replay.mismatch import (
    Diagnostics,
    diagnose,
    icepop_weights,
    masked_importance_weights,
    metropolis_chain,
    self_normalized_weights,
    truncated_importance_weights,
)
from router_replay.report.ratio_plots import scatter, tails
from router_replay.report.sections import sections
from router_replay.report.step_plots import MAX_COLUMNS, kl_over_steps, route_heat_map
from router_replay.report.summary import RunSummary, StepFigures, summarize
from router_replay.report.weight_figures import LADDER, WeightFigures
from router_replay.report.weight_plots import effective_sample_sizes, weight_histograms
from router_replay.run import RunStep
from router_replay.run.step_tally import CURVE_TAUS
from router_replay.run.token_sample import TokenSample
from router_replay.run.weight_tally import WeightTally
from tests.router_replay.mismatch.pairs import log_ratios
from tests.router_replay.report.runs import NAMES, STEPS, run_step, series, whole_run


@pytest.fixture(scope="module")
def summary() -> RunSummary:
    return summarize(STEPS)


def _diagnose(step: RunStep, name: str, **options) -> Diagnostics:
    return diagnose(log_ratios(step.trainer_logprobs[name], step.rollout_logprobs, step.responses), **options)


def test_curves_are_the_tails_of_all_steps(summary: RunSummary):
    taus = tuple(sorted({*CURVE_TAUS, *summary.taus}))
    lines = tails({name: figures.diagnostics for name, figures in summary.passes.items()}).axes[0].lines
    for line, name in zip(lines, NAMES, strict=False):
        expected = {tau: share for tau, share in whole_run(name, taus).ratio_tails.items() if share > 0}
        assert line.get_label().startswith(f"{name}: KL (k3) ")
        assert np.asarray(line.get_xdata()) + 1 == pytest.approx(list(expected))
        assert list(line.get_ydata()) == list(expected.values())


def test_scatter_is_each_tokens_ratio(summary: RunSummary):
    figure = scatter({name: figures.sample for name, figures in summary.passes.items()})
    for axes, name in zip(figure.axes, NAMES, strict=True):
        # All tokens fit into the sample, in another order.
        expected = []
        for step in STEPS:
            ratio = (step.trainer_logprobs[name] - step.rollout_logprobs)[step.responses.mask]
            expected += zip(step.rollout_logprobs[step.responses.mask].exp().tolist(), ratio.tolist(), strict=True)
        drawn = {line.get_label(): line for line in axes.lines}
        points = np.stack(drawn["sampled tokens"].get_data(), 1)
        finite = [pair for pair in sorted(expected) if pair[1] > -math.inf]
        drawn_points = sorted(map(tuple, points[~np.isnan(points[:, 1])]))
        assert np.array(drawn_points) == pytest.approx(np.array(finite))
        rings = drawn["largest |ln r|"].get_ydata()
        largest = sorted((abs(ratio) for _, ratio in expected), reverse=True)[: len(rings)]
        assert len(rings) == len(expected) // 100 + 1
        assert np.where(np.isnan(rings), math.inf, abs(rings)) == pytest.approx(largest)
        impossible = drawn.get("trainer's probability is 0")
        assert (0 if impossible is None else len(impossible.get_xdata())) == (2 if name == NAMES[0] else 0)
        assert f"{len(expected):,} of {len(expected):,} tokens" in axes.get_title(loc="left")


def test_sample_is_uniform_and_keeps_the_extremes():
    ratio = torch.arange(100_000.0)
    parts = ratio.split([400, 49_600, 50_000])
    samples = [TokenSample.of(part, -part, seed=seed, size=1000) for seed, part in enumerate(parts)]
    assert [len(each.points) for each in samples] == [400, 1000, 1000]
    sample = samples[0] + samples[1] + samples[2]
    assert sample.total == 100_000
    # As many of each part as it has tokens, and none of those that drew less than what a part has kept.
    first, second, third = ((sample.points[:, 0] >= low) & (sample.points[:, 0] < high) for low, high in
                            ((0, 400), (400, 50_000), (50_000, 100_000)))  # fmt: skip
    assert 0 < int(first.sum()) < 30
    assert int(second.sum()) + int(third.sum()) > 1900 and max(int(second.sum()), int(third.sum())) == 1000
    # The mean of 2000 uniform numbers; 6 standard deviations are 0.039.
    assert float(sample.points[:, 0].mean()) / 100_000 == pytest.approx(0.5, abs=0.039)
    assert sample.extremes.tolist() == [[99_999.0 - place, place - 99_999.0] for place in range(200)]


def test_kl_is_that_of_each_step(summary: RunSummary):
    k3, k1 = kl_over_steps(summary.steps, NAMES).axes
    for number, name in enumerate(NAMES):
        for axes, estimator in ((k3, "k3"), (k1, "k1")):
            line = axes.lines[number]
            assert list(line.get_xdata()) == [0, 1, 5]
            assert list(line.get_ydata()) == [getattr(_diagnose(step, name), estimator) for step in STEPS]
    assert k3.get_yscale() == "log"


@pytest.mark.parametrize(("taus", "tau"), [((1.01, 1.1, 2.0, 3.0), 2.0), ((1.3, 1.01), 1.3)])
def test_tails_and_sample_sizes_are_those_of_each_step(taus: tuple[float, ...], tau: float):
    steps = [run_step(step, scale=0.8) for step in (0, 1, 5)]
    found = {each.name: each for each in sections(summarize(steps, taus=taus), "a step")}["tails-over-steps"]
    assert f"F({tau:g})" in found.alternative and f"F({tau:g})" in found.caption
    assert found.figure is not None
    for axes, value in zip(
        found.figure.axes,
        (lambda each: each.ratio_tails[tau], lambda each: each.ess_token, lambda each: each.ess_sequence),
        strict=True,
    ):
        for line, name in zip(axes.lines, NAMES, strict=True):
            assert line.get_label() == name
            assert list(line.get_xdata()) == [0, 1, 5]
            assert list(line.get_ydata()) == [value(_diagnose(step, name, taus=taus)) for step in steps]
    assert found.figure.axes[0].get_ylabel() == f"F({tau:g}), share of tokens"
    assert found.figure.axes[0].get_yscale() == ("log" if tau == 1.3 else "linear")


def test_kl_of_one_step_is_a_point():
    step = run_step(7)
    exact = {**step.trainer_logprobs, "exact": step.rollout_logprobs}
    k3, _ = kl_over_steps(summarize([replace(step, trainer_logprobs=exact)]).steps, [*NAMES, "exact"]).axes
    assert [line.get_marker() for line in k3.lines] == ["o", "s", "^"]
    # A KL of 0 has no logarithm.
    assert k3.get_yscale() == "linear"
    assert list(k3.lines[2].get_ydata()) == [0]


def test_heat_map_has_a_row_for_each_layer_and_a_column_for_each_step(summary: RunSummary):
    assert summary.routes is not None
    heat, bars, _ = route_heat_map(summary.steps, summary.routes, summary.moe_layers).axes
    expected = np.array([step.routes.agreement().differing_by_layer for step in STEPS if step.routes]).T
    assert np.asarray(heat.images[0].get_array()) == pytest.approx(100 * expected)
    assert expected[:, 0] == pytest.approx([24 / 240, 27 / 240, 30 / 240])
    assert [text.get_text() for text in heat.get_xticklabels()] == ["0", "1", "5"]
    assert [heat.yaxis.get_major_formatter()(place, 0) for place in heat.get_yticks()] == ["1", "2", "3"]
    assert heat.get_ylim() == bars.get_ylim() == (2.5, -0.5)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(100 * expected.mean(1))


def test_many_steps_share_columns():
    step = run_step(0)
    assert step.routes is not None
    same = replace(step.routes, differing=torch.zeros_like(step.routes.differing))
    steps = [StepFigures(number, {}, (step.routes, same)[number % 2]) for number in range(MAX_COLUMNS * 2)]
    heat = route_heat_map(steps, step.routes.agreement(), None).axes[0]
    assert heat.images[0].get_array().shape == (3, MAX_COLUMNS)
    assert np.asarray(heat.images[0].get_array())[2] == pytest.approx(12.5 / 2)
    assert heat.get_xlabel() == "step, the first of 2 in a column"
    assert [text.get_text() for text in heat.get_xticklabels()][1] == "24"


WEIGHTS = {
    "token TIS, cap 2": truncated_importance_weights,
    "sequence TIS, cap 2": lambda given: truncated_importance_weights(given, level="sequence"),
    "token MIS, 0.5 to 2": masked_importance_weights,
    "geometric MIS, 0.999 to 1.001": lambda given: masked_importance_weights(
        given, level="geometric", lower=0.999, upper=1.001
    ),
    "IcePop, 0.5 to 5": icepop_weights,
    "SNIS over prompts' groups": self_normalized_weights,
    "Metropolis, sequences": lambda given: (
        metropolis_chain(given, generator=torch.Generator().manual_seed(0)).multiplicity
    ),
}


def _weights(title: str, name: str) -> list[torch.Tensor]:
    return [
        WEIGHTS[title](log_ratios(step.trainer_logprobs[name], step.rollout_logprobs, step.responses))[
            step.responses.mask
        ].double()
        for step in STEPS
    ]


PANELS = {
    "ratio-tails": [("ratio τ", "F(τ), share of tokens")],
    "ratio-scatter": [("probability under the rollout", "ln r, r = trainer / rollout")] * 2,
    "kl-over-steps": [("step", "k3, nats per token"), ("step", "k1, nats per token")],
    "tails-over-steps": [
        ("step", "F(2), share of tokens"),
        ("step", "effective share of tokens"),
        ("step", "effective share of sequences"),
    ],
    "route-heat-map": [("step", "decoder layer (0-based)"), ("% of tokens", ""), ("", "% of tokens")],
    "weight-histogram": [("weight", "share of tokens")] * len(WEIGHTS),
    "effective-sample-size": [("% of response tokens", "")] * 2,
}


def test_each_section_has_its_own_plot(summary: RunSummary):
    found = list(sections(summary, "a step"))
    assert [each.name for each in found] == list(PANELS)
    for each in found:
        assert each.figure is not None
        drawn = [(axes.get_xlabel(), axes.get_ylabel()) for axes in each.figure.axes]
        if each.name == "ratio-scatter":
            # Labels between panels of the same range are left out.
            drawn[1] = (drawn[1][0], drawn[0][1])
        assert drawn == PANELS[each.name], each.name


def test_histograms_are_the_weights_of_each_correction(summary: RunSummary):
    figure = weight_histograms(series(summary), list(NAMES))
    assert len(figure.axes) == len(WEIGHTS)
    for axes, title in zip(figure.axes, WEIGHTS, strict=True):
        lines = axes.get_title(loc="left").split("\n")
        assert lines[0] == title
        zeros = []
        for stairs, name in zip(axes.patches, NAMES, strict=True):
            weights = torch.cat(_weights(title, name))
            shares, edges, _ = stairs.get_data()
            zeros.append(f"{float((weights == 0).double().mean()):.2%}")
            assert shares.sum() + float((weights == 0).double().mean()) == pytest.approx(1)
            # A cell's width is the precision of what is known of a weight.
            cell = math.log(LADDER[0]) / 20
            logs = weights[weights > 0].log().clamp(edges[0] + 1e-9, edges[-1] - 1e-9).numpy()
            below = np.array([(logs < edge - cell).mean() for edge in edges]) * len(logs) / len(weights)
            above = np.array([(logs < edge + cell).mean() for edge in edges]) * len(logs) / len(weights)
            drawn = np.concatenate([[0], shares.cumsum()])
            assert (below <= drawn + 1e-9).all() and (drawn <= above + 1e-9).all()
        assert lines[1] == f"weight 0: {', '.join(zeros)}"


def test_effective_sample_sizes_are_kish(summary: RunSummary):
    figure = effective_sample_sizes(series(summary), list(NAMES))
    sizes, kept = figure.axes
    assert [text.get_text() for text in sizes.get_yticklabels()] == list(WEIGHTS)
    for number, name in enumerate(NAMES):
        for place, title in enumerate(WEIGHTS):
            by_step = _weights(title, name)
            weights = torch.cat(by_step)
            share = float(weights.sum() ** 2 / weights.square().sum()) / len(weights)
            assert sizes.containers[number][place].get_width() == pytest.approx(100 * share), (title, name)
            assert kept.containers[number][place].get_width() == pytest.approx(
                100 * float((weights > 0).double().mean())
            )
            # A step whose every token is left out is worth nothing.
            lowest = min(float(each.sum() ** 2 / each.square().sum().clamp(min=1e-9)) / len(each) for each in by_step)
            tick = sizes.lines[number * len(WEIGHTS) + place]
            assert list(tick.get_xdata()) == pytest.approx([100 * lowest] * 2)


def test_weights_beyond_the_histogram_are_in_its_last_bars():
    figures = WeightFigures()
    figures.add(WeightTally.of(torch.tensor([1e-30, 0.0, 1.0, 1e30])), step=3)
    assert figures.reach == LADDER[-1]
    edges, shares = figures.histogram(LADDER[-1])
    assert (len(edges), len(shares)) == (42, 41)
    assert shares.nonzero().flatten().tolist() == [0, 20, 40]
    assert shares.sum() == pytest.approx(0.75)
    assert (figures.total.tokens, figures.total.kept) == (4, 3)
    assert (figures.total.effective_share, figures.lowest) == (pytest.approx(0.25), (pytest.approx(0.25), 3))
    narrow = WeightFigures()
    narrow.add(WeightTally.of(torch.tensor([1.0, 1.0015])), step=0)
    assert narrow.reach == LADDER[0]
    nothing = WeightFigures()
    nothing.add(WeightTally.of(torch.zeros(2)), step=0)
    assert (nothing.total.effective_share, nothing.reach) == (0, LADDER[0])
    assert not nothing.histogram(LADDER[0])[1].any()


def test_weights_that_the_trainer_applied_are_shown():
    step = run_step(0)
    applied = torch.full((240,), 0.5, dtype=torch.float64)
    summary = summarize([replace(step, weights={"mine": applied})])
    found = {section.name: section for section in sections(summary, "a step")}
    assert "applied: mine, as applied by the trainer: 100.0% effective" in found["effective-sample-size"].alternative
    for weights in (-applied, applied / 0):
        with pytest.raises(DataError, match=r"step 0: weights.mine of response tokens must be finite"):
            summarize([replace(step, weights={"mine": weights})])
