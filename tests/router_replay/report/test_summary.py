"""What of a run goes into the page's table and warnings, and what is left out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from router_replay.errors import DataError
from router_replay.mismatch import (
    Responses,
)
from router_replay.report.sections import sections
from router_replay.report.summary import RunSummary, summarize
from router_replay.report.table import rows, warnings
from router_replay.report.weight_plots import weight_histograms
from router_replay.run.corrections import CORRECTIONS
from tests.router_replay.report.runs import NAMES, STEPS, run_step, series, whole_run

NAMES_OF_CORRECTIONS = {each.name for each in CORRECTIONS}


@pytest.fixture(scope="module")
def summary() -> RunSummary:
    return summarize(STEPS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trainer_logprobs": {NAMES[0]: -1.0, NAMES[1]: math.nan}}, "trainer pass 'replayed': 1 of 168 response tok"),
        ({"trainer_logprobs": {NAMES[0]: math.inf, NAMES[1]: -1.0}}, "trainer pass 'own routes': 1 of 168 response"),
        ({"rollout_logprobs": -math.inf}, "trainer pass 'own routes': 1 of 168 response tokens have no log-ratio"),
        ({"weights": -1.0}, "weights.mine of response tokens must be finite and not below 0"),
    ],
)
def test_a_step_with_a_bad_token_is_in_no_figure(changes: dict, reason: str):
    good, bad = replace(run_step(2), weights={"mine": torch.ones(240)}), run_step(3)

    def with_token(values: torch.Tensor, token: float) -> torch.Tensor:
        changed = values.clone()
        changed[6] = token
        return changed

    passes = changes.get("trainer_logprobs", {})
    bad = replace(
        bad,
        rollout_logprobs=with_token(bad.rollout_logprobs, changes.get("rollout_logprobs", -1.0)),
        trainer_logprobs={name: with_token(bad.trainer_logprobs[name], passes.get(name, -1.0)) for name in NAMES},
        weights={"mine": with_token(torch.ones(240), changes.get("weights", 1.0))},
    )
    alone, found = summarize([good]), summarize([good, bad])
    assert [each.step for each in found.steps] == [2]
    for name in NAMES:
        mine, theirs = found.passes[name], alone.passes[name]
        assert mine.diagnostics == theirs.diagnostics
        assert mine.sample.total == theirs.sample.total
        assert {title: each.total.tokens for title, each in mine.corrections.items()} == dict.fromkeys(
            NAMES_OF_CORRECTIONS, 168
        )
    assert found.weights["mine"].total.tokens == 168
    assert found.routes == alone.routes
    (warning,) = set(warnings(found)) - set(warnings(alone))
    assert warning.startswith(f"Step 3 is left out: {reason}")
    with pytest.raises(DataError, match=f"no step is left: 1 cannot be compared; the first, step 3: {reason[:20]}"):
        summarize([bad])


def test_of_many_steps_that_are_left_out_some_are_explained():
    good = run_step(0)
    broken = replace(good, trainer_logprobs=dict.fromkeys(NAMES, torch.full((240,), math.nan)))
    told = warnings(summarize([good, *(replace(broken, step=step) for step in range(1, 25))]))
    assert len(told) == 11
    assert told[-1] == ("Left out for reasons of this kind: steps 11, 12, 13, 14, 15, 16, 17, 18, 19, 20 and 4 more.")


def test_table_has_a_row_for_each_diagnostic(summary: RunSummary):
    found = {row.name: row.cells for row in rows(summary)}
    whole = {name: whole_run(name, (1.01, 1.1, 1.5, 2.0)) for name in NAMES}
    assert found["response tokens"] == ("504", "504")
    assert found["tokens of probability 0"] == ("2", "0")
    assert [float(cell) for cell in found["KL, k3"]] == pytest.approx([each.k3 for each in whole.values()], rel=1e-3)
    assert found["F(1.1)"] == (f"{whole[NAMES[0]].ratio_tails[1.1]:.3%}", "0")
    assert found["effective sample size, tokens"] == tuple(f"{each.ess_token:.2%}" for each in whole.values())
    assert found["tokens with routes"] == ("720",)
    few = replace(summary.passes[NAMES[0]].diagnostics, ratio_tails={1.01: 0.0001, 1.1: 5.8e-6, 1.5: 0.0, 2.0: 0.5})
    small = replace(summary, passes={"a": replace(summary.passes[NAMES[0]], diagnostics=few)})
    cells = {row.name: row.cells for row in rows(small)}
    assert [cells[f"F({tau:g})"] for tau in summary.taus] == [("0.010%",), ("5.8e-06",), ("0",), ("50.000%",)]
    # Routes, F and the others: nothing of Diagnostics is left out.
    assert len(found) == 17 + len(summary.taus) + 3


def test_warnings_say_what_is_wrong(summary: RunSummary):
    (zero,) = warnings(summary)
    assert "“own routes” gives probability 0 to 2 of 504 sampled tokens" in zero
    step = run_step(0, routes=False)
    alone = Responses.packed(step.responses.mask, step.responses.cu_seqlens, range(12))
    assert alone.groups is not None and int(alone.groups.counts.max()) == 1
    same = replace(step, trainer_logprobs={"copy": step.rollout_logprobs}, responses=alone)
    empty = replace(same, step=9, responses=alone.keep(torch.zeros(240, dtype=torch.bool)))
    copied, no_routes, lonely, left_out = warnings(summarize([same, empty]))
    assert "“copy” equals the rollout bit for bit" in copied
    assert "No routes in these files" in no_routes
    assert "Every prompt has one response" in lonely
    assert "step 9" in left_out
    routes = run_step(0)
    assert routes.routes is not None
    under_replay = replace(routes.routes, differing=torch.zeros_like(routes.routes.differing))
    assert "probably routes under replay" in warnings(summarize([replace(routes, routes=under_replay)]))[0]
    assert "leave an effective sample size of" in warnings(summarize([run_step(0, scale=3.0)]))[0]


@pytest.mark.parametrize("ungrouped", [(1,), (2,), (1, 2)])
def test_without_groups_the_corrections_that_need_them_are_left_out(ungrouped: tuple[int, ...]):
    steps = [run_step(step) for step in (1, 2)]
    unknown = Responses.packed(steps[0].responses.mask, steps[0].responses.cu_seqlens)
    found = summarize([replace(step, responses=unknown) if step.step in ungrouped else step for step in steps])
    needed = {"SNIS over prompts' groups", "Metropolis, sequences"}
    for figures in found.passes.values():
        assert figures.corrections.keys() == NAMES_OF_CORRECTIONS - needed
        assert {each.total.tokens for each in figures.corrections.values()} == {336}
    (warning,) = warnings(found)
    assert f"not known of step{'s' if len(ungrouped) > 1 else ''} {', '.join(map(str, ungrouped))}: " in warning
    assert all(f"“{title}”" in warning for title in needed)
    assert len(weight_histograms(series(found), list(NAMES)).axes) == 5
    assert "SNIS" not in "".join(each.alternative for each in sections(found, "a step"))


def test_a_run_that_cannot_be_summarised_is_refused():
    step = run_step(3)
    empty = replace(step, responses=step.responses.keep(torch.zeros(240, dtype=torch.bool)))
    broken = replace(step, trainer_logprobs={"old": torch.full((240,), math.nan)})
    for steps, passes, message in (
        ([], (), "no response token in any of 0 steps"),
        ([empty], (), "no response token in any of 1 steps: nothing was sampled, or the mask is inverted"),
        ([step], ("new",), r"no step has the trainer passes \['new'\]; the run has \['own routes', 'replayed'\]"),
        (
            [broken],
            (),
            "no step is left: 1 .* step 3: trainer pass 'old': 168 of 168 response tokens have no log-ratio",
        ),
        ([step, replace(step, step=4, moe_layers=(7, 8, 9))], (), "step 4: routes are of decoder layers"),
    ):
        with pytest.raises(DataError, match=message):
            summarize(steps, passes=passes)
    assert list(summarize([step], passes=["replayed"]).passes) == ["replayed"]
