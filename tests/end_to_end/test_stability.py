"""The study on both engines, in small: runs take turns, start from the same weights, and end as results."""

from __future__ import annotations

import dataclasses

import pytest

from cpu_engines.sglang.server import Server
from studies.stability import results
from studies.stability.protocol import ARMS, Run
from studies.stability.work import steps_done, work

pytestmark = pytest.mark.timeout(900)

SMALL = {"problems": 2, "group_size": 2, "microbatch": 2, "evaluate_every": 2, "evaluation_problems": 4}


def test_a_small_study_comes_to_its_results_and_is_not_run_twice(trained_server: Server, tmp_path, capsys):
    plan = [
        [
            Run(dataclasses.replace(ARMS[name], changes={**ARMS[name].changes, **SMALL}), seed=3, num_steps=2)
            for name in ("nothing", "R3")
        ]
    ]
    place = {"folder": tmp_path / "results", "url": trained_server.url}
    work(plan, out=tmp_path / "runs", minutes=0, **place)
    assert not (tmp_path / "results").exists()
    work(plan, out=tmp_path / "runs", minutes=60, **place)
    found = [results.read(run, tmp_path / "results") for run in plan[0]]
    nothing, replayed = found
    assert nothing is not None and replayed is not None
    assert [sorted(each.evaluations) for each in (nothing, replayed)] == [[0, 2], [0, 2]]
    assert nothing.evaluations[0] == replayed.evaluations[0]
    # The rollout engine has routers that are off; replay takes most of what that does away.
    assert min(replayed.series("k3")) < min(nothing.series("k3"))
    assert all(k3 > 1e-5 for k3 in nothing.series("k3"))
    # On another machine, where the runs' folders are not.
    assert [steps_done(run, tmp_path / "elsewhere", tmp_path / "results") for run in plan[0]] == [2, 2]
    capsys.readouterr()
    work(plan, out=tmp_path / "elsewhere", minutes=60, **place)
    assert "every run has its result" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere").exists()
