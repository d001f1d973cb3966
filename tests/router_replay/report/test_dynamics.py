"""How training went: the curves are what the steps say, and several runs stand side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path

import matplotlib.figure
import pytest
import torch

from router_replay.report import style
from router_replay.report.comparison import write_comparison
from router_replay.report.dynamics import QUANTITIES, RunDynamics, not_finite, shown, smooth
from router_replay.report.dynamics_plots import dynamics_over_steps
from router_replay.report.page import html_page
from router_replay.report.runs import named_runs
from router_replay.report.sections import dynamics_section
from router_replay.report.summary import RunSummary, summarize
from router_replay.report.table import warnings
from router_replay.run import Dynamics, RunStep
from tests.router_replay.report.runs import run_step

GIVEN = {
    "reward": 0.5,
    "response_length": 10.0,
    "longest_response": 14,
    "cut_off": 0.25,
    "entropy": 1.5,
    "clipped": 0.01,
    "dropped": 0.02,
    "dropped_responses": 3,
    "dropped_groups": 1,
    "effective_share": 0.75,
    "route_drift": 0.03,
    "route_overlap": 0.99,
    "gradient_norm": 0.5,
    "evaluation": 0.25,
    "seconds": 12.0,
}


def steps_of(*dynamics: Dynamics | None, scale: float = 0.1) -> list[RunStep]:
    """A step each, of even numbers: places and numbers are not to be taken for each other."""
    tokens = run_step(0, names=("old",), routes=False, scale=scale)
    return [replace(tokens, step=2 * place, dynamics=each) for place, each in enumerate(dynamics)]


def run_of(*rewards: float, name: str = "run", scale: float = 0.1, **others: float) -> RunDynamics:
    said = (Dynamics(reward=reward, **others) for reward in rewards)
    return RunDynamics.of(name, summarize(steps_of(*said, scale=scale)))


COLLAPSING = (1.0,) * 25 + (0.0,) * 15


def panels(figure: matplotlib.figure.Figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_every_quantity_of_a_step_has_a_curve():
    every = [replace(Dynamics(**GIVEN), gradient_norm=norm) for norm in (0.5, 20.0, math.inf)]
    run = RunDynamics.of("run", summarize(steps_of(*every)))
    measured = summarize(steps_of(None)).steps[0].passes["old"]
    for quantity in QUANTITIES:
        given = {"k3": measured.k3, "f2": measured.ratio_tails[2.0], **GIVEN}[quantity.name]
        wanted = [0.5, 20.0, math.inf] if quantity.name == "gradient_norm" else [given] * 3
        assert run.curves[quantity.name] == dict(zip((0, 2, 4), wanted, strict=True)), quantity.name
    assert not_finite([run]) == {"gradient norm": [4]}
    assert set(GIVEN) == {quantity.name for quantity in QUANTITIES} - {"k3", "f2"}


def test_only_what_a_run_has_is_drawn():
    run = run_of(0.5, 0.75, dropped=0.0)
    # F(2) of close log-probabilities is 0, as the dropped share is.
    assert [quantity.name for quantity in shown([run])] == ["reward", "k3"]
    section = dynamics_section([run], "a batch")
    assert section.figure is not None and list(panels(section.figure)) == ["reward", "KL (k3) to the rollout"]
    assert (
        section.caption.startswith("A step is a batch.") and "not drawn: dropped (weight 0), F(2)." in section.caption
    )
    nothing = RunDynamics.of("run", summarize([replace(each, trainer_logprobs={"old": each.rollout_logprobs})
                                               for each in steps_of(None)]))  # fmt: skip
    assert dynamics_section([nothing], "a step").figure is None


def test_f2_is_there_whatever_taus_are_told():
    steps = steps_of(Dynamics(reward=1.0), scale=1.0)
    found = RunDynamics.of("run", summarize(steps, taus=(1.5,))).curves["f2"]
    assert found == RunDynamics.of("run", summarize(steps)).curves["f2"] and found[0] > 0.1


def test_the_share_of_applied_weights_is_taken_from_them_where_no_other_is_given():
    weights = torch.linspace(0, 2, 240, dtype=torch.float64)
    steps = [replace(each, weights={"TIS": weights}) for each in steps_of(Dynamics(reward=1.0), None)]
    used = weights[steps[0].responses.mask]
    share = float(used.sum() ** 2 / used.square().sum()) / len(used)
    assert RunDynamics.of("run", summarize(steps)).curves["effective_share"] == pytest.approx({0: share, 2: share})
    steps[0] = replace(steps[0], dynamics=Dynamics(effective_share=0.5))
    assert RunDynamics.of("run", summarize(steps)).curves["effective_share"] == {0: 0.5}


def test_scores_and_collapse_are_of_steps():
    run = run_of(*COLLAPSING, name="own")
    # Means of five after the fall: 0.8, 0.6, 0.4, which is the first that is low, at place 27.
    assert (run.collapse, run.last_step, run.best_reward, run.best_evaluation) == (54, 78, (1.0, 8), None)
    evaluated = [Dynamics(evaluation=score) for score in (0.1, 0.6, math.nan, 0.6)]
    scored = RunDynamics.of("R3", summarize([*steps_of(*evaluated), RunStep.without_tokens(90, evaluated[0])]))
    assert (scored.collapse, scored.last_step, scored.best_reward, scored.best_evaluation) == (None, 90, None, (0.6, 2))
    table = dynamics_section([run, scored, run_of(*[0.5] * 9)], "a step").table
    assert table is not None
    assert [list(row) for row in table[1]] == [
        ["own", "78", "none", "", "1", "8", "step 54"],
        ["R3", "90", "0.6", "2", "none", "", "not known"],
        ["run", "16", "none", "", "0.5", "8", "none"],
    ]
    assert len(table[0]) == 7


def test_what_is_wrong_is_told():
    steps = steps_of(*(Dynamics(reward=reward, entropy=math.nan if place < 2 else 1.0)
                       for place, reward in enumerate(COLLAPSING)))  # fmt: skip
    told = warnings(summarize(steps))
    assert told[0].startswith("The reward collapses at step 54: ")
    assert told[1] == "Entropy is not finite in steps 0, 2."
    assert not any("collapses" in each or "finite" in each for each in warnings(summarize(steps[2:20])))


def test_lines_are_the_curves_and_colours_the_runs():
    runs = [run_of(*[0.5] * 30, name="R3"), run_of(*COLLAPSING, name="own"), run_of(*[0.75] * 6, name="own")]
    drawn = panels(dynamics_over_steps(runs))
    reward = drawn["reward"].lines
    wanted = [runs[0].curves["reward"], smooth(runs[0].curves["reward"]), runs[1].curves["reward"],
              smooth(runs[1].curves["reward"]), runs[2].curves["reward"]]  # fmt: skip
    assert [dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in reward[:5]] == wanted
    assert [line.get_color() for line in reward[:5]] == [style.colour(number) for number in (0, 0, 1, 1, 1)]
    for axes in drawn.values():
        marks = [line for line in axes.lines if list(line.get_xdata()) == [54, 54]]
        assert len(marks) == 1 and marks[0].get_color() == style.colour(1)
    assert {axes.get_xlim() for axes in drawn.values()} == {(-1.56, 79.56)}
    (legend,) = dynamics_over_steps(runs).legends
    assert [text.get_text() for text in legend.get_texts()] == ["R3", "own (2 runs)", "collapse"]
    assert not dynamics_over_steps(runs[:1]).legends


def test_eight_runs_have_eight_colours():
    assert len({style.colour(number) for number in range(8)}) == 8


def test_values_that_are_not_finite_are_marked():
    run = RunDynamics.of(
        "run", summarize(steps_of(*(Dynamics(gradient_norm=norm) for norm in (1.0, math.inf, math.nan))))
    )
    figure = dynamics_over_steps([run])
    axes = panels(figure)["gradient norm"]
    (line, marks) = axes.lines
    assert list(line.get_xdata()) == [0, 2, 4] and [math.isnan(each) for each in line.get_ydata()] == [
        False,
        True,
        True,
    ]
    assert list(marks.get_xdata()) == [2, 4] and marks.get_marker() == "x" and axes.get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not finite"]


@pytest.mark.parametrize(("norms", "scale"), [((0.1, 10.0), "log"), ((0.0, 10.0), "symlog"), ((0.0, 0.0), None)])
def test_a_gradient_of_zero_has_a_place(norms: Sequence[float], scale: str | None):
    run = RunDynamics.of("run", summarize(steps_of(*(Dynamics(gradient_norm=norm) for norm in norms))))
    drawn = panels(dynamics_over_steps([run]))
    assert (drawn["gradient norm"].get_yscale() if scale else None) == scale
    assert ("gradient norm" in drawn) == (scale is not None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 2, 8])
def test_panels_are_laid_out(count: int):
    """Labels of one panel are not on another: the layout has found room for all."""
    runs = [RunDynamics.of(f"a run of number {number}", summarize(steps_of(*[Dynamics(**GIVEN)] * 25, scale=1.0)))
            for number in range(count)]  # fmt: skip
    figure = dynamics_over_steps(runs)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == len(QUANTITIES)
    for number, box in enumerate(boxes):
        assert box.width > 200 and box.height > 150
        assert not any(box.shrunk(0.98, 0.98).overlaps(other.shrunk(0.98, 0.98)) for other in boxes[number + 1 :])


def two_runs() -> list[tuple[str, RunSummary]]:
    own = summarize(steps_of(*(Dynamics(reward=reward) for reward in COLLAPSING)))
    return [("own <routes>", own), ("R3", summarize([run_step(step) for step in (1, 2)]))]


def test_a_page_of_several_runs(tmp_path: Path):
    path = tmp_path / "page.html"
    write_comparison(two_runs(), path, title="Two & more", inputs=["own", "R3"], notes=["a note"])
    text = path.read_text()
    assert "<h1>Two &amp; more</h1>" in text and "<routes>" not in text
    cells = [unescape(each) for each in re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text)]
    assert cells[7:14] == ["own <routes>", "78", "none", "", "1", "8", "step 54"]
    assert cells[14:21] == ["R3", "2", "none", "", "none", "", "not known"]
    assert cells[21:24] == ["over all steps", "own <routes>: old", "R3: own routes"]
    assert cells[24:27] == ["response tokens", "6,720", "336"]
    # Only one of the runs has routes.
    assert cells[cells.index("tokens with routes") :][1:][:2] == ["none", "480"]
    told = [unescape(each) for each in re.findall(r"<li>(.*?)</li>", text)]
    assert told[0] == "a note" and told[1].startswith("own <routes>: The reward collapses at step 54")
    assert text.count("<img ") == 1 and 'id="dynamics"' in text


def test_a_page_of_one_run_has_the_section_if_its_steps_say_something():
    (_, own), (_, plain) = two_runs()
    pages = [html_page(each, title="t", inputs=(), step_means="a step", notes=()) for each in (own, plain)]
    assert ['id="dynamics"' in page for page in pages] == [True, False]
    assert "<td>step 54</td>" in pages[0]


def test_which_paths_are_runs(tmp_path: Path):
    for name in ("a/mismatch", "b/mismatch", "c"):
        (tmp_path / name).mkdir(parents=True)
    a, b, c = tmp_path / "a/mismatch", tmp_path / "b/mismatch", tmp_path / "c"
    file = tmp_path / "more.jsonl.gz"
    file.touch()
    assert named_runs([a]) == [("mismatch", [a])]
    assert named_runs([a, file]) == [("mismatch", [a, file])]
    assert named_runs([file, file]) == [("more", [file, file])]
    assert named_runs([a, c]) == [("mismatch", [a]), ("c", [c])]
    found = named_runs([a, b, file])
    assert [name for name, _ in found][:2] == ["a/mismatch", "b/mismatch"] and [each for _, each in found] == [
        [a],
        [b],
        [file],
    ]
    assert named_runs([a, file], ["x", "x"]) == [("x", [a]), ("x", [file])]
    # The same folder twice has one name; nobody can tell them apart.
    assert named_runs([c, c]) == [("c", [c]), ("c", [c])]
