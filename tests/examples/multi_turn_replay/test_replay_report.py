"""The main job's figures, from conversations small enough to count by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import write_json
from examples.multi_turn_replay.mismatch_plot import plot_mismatch
from examples.multi_turn_replay.replay_report import OWN_ROUTES, REPLAYED, REPORTED_TAUS, Comparison, compare, summarize
from examples.multi_turn_replay.rollout import Conversation
from examples.multi_turn_replay.run_steps import report_steps, write_steps
from router_replay.files import write_whole
from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.report.summary import summarize as summarize_run
from router_replay.run import read_run
from router_replay.run.step_tally import CURVE_TAUS

GEOMETRY = RoutingGeometry(num_layers=3, moe_layers=(1, 2), num_experts=8, top_k=2)
ROLLOUT_LOGPROBS = [0.0, 0.0, -1.0, -0.5]
# Four tokens, the last two sampled: rows for three of them, in two layers.
RECORDED = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]]])


def _conversation(correct: bool = True) -> Conversation:
    token_ids = [5, 6, 7, 8]
    masks = RoutingMasks.from_indices(
        RECORDED, torch.ones(3, dtype=torch.bool), start=0, geometry=GEOMETRY, codec="bitset", token_ids=token_ids
    )
    return Conversation(
        token_ids=token_ids,
        sampled=[False, False, True, True],
        rollout_logprobs=ROLLOUT_LOGPROBS,
        masks=masks,
        num_turns=2,
        correct=correct,
        prefix_cached_tokens=1,
        masks_bytes=90,
    )


def _comparison(conversations: list[Conversation]) -> Comparison:
    """Natively the third token is exp(0.3) times as likely and takes other experts in layer 2; replay hits exactly."""
    return compare(conversations, *_scores(len(conversations)), sorted({*REPORTED_TAUS, *CURVE_TAUS}))


def _scores(count: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    own = torch.cat([RECORDED.flip(-1), RECORDED[:1]])
    own[2, 1] = torch.tensor([1, 4])
    native = torch.tensor([-9.0, -9.0, -0.7, -0.5])
    return [native] * count, [torch.tensor(ROLLOUT_LOGPROBS)] * count, [own] * count


def _report() -> dict[str, Any]:
    conversations = [_conversation(), _conversation(correct=False)]
    return summarize(conversations, _comparison(conversations))


def test_every_figure_counts_what_it_says():
    report = _report()
    assert (report["conversations"], report["turns"], report["accuracy"]) == (2, 4, 0.5)
    assert (report["tokens"], report["sampled_tokens"], report["prefix_cached_tokens"]) == (8, 4, 2)
    assert (report["valid_rows"], report["invalid_rows"]) == (6, 2)
    assert report["route_mismatch"] == {
        "rows": pytest.approx(1 / 6),
        "tokens": pytest.approx(1 / 3),
        "per_layer": {"1": 0.0, "2": pytest.approx(1 / 3)},
    }
    assert report["kl_k1"] == {"native": pytest.approx(-0.15), "replay": 0}
    assert report["kl_k3"] == {"native": pytest.approx((math.exp(0.3) - 1 - 0.3) / 2), "replay": 0}
    assert report["f_tau"]["1.1"] == {"native": 0.5, "replay": 0}
    assert report["f_tau"]["2"] == {"native": 0, "replay": 0}
    # Three rows of 3 layers x 2 experts x 4 bytes are 72 bytes, 96 in base64.
    assert report["bytes_per_token"] == {"sglang_base64": 32, "masks": 30, "masks_rows_only": 2}


def test_report_and_picture_are_written_whole(tmp_path: Path):
    report = _report()
    folder = tmp_path / "made" / "here"
    write_json(report, folder / "demo.json")
    plot_mismatch(_comparison([_conversation()]), folder / "mismatch.png")
    assert json.loads((folder / "demo.json").read_text()) == report
    assert (folder / "mismatch.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "mismatch.png"]


def test_the_runs_files_say_what_the_comparison_says(tmp_path: Path):
    conversations = [_conversation() for _ in range(10)]
    (tmp_path / "mismatch").mkdir()
    (tmp_path / "mismatch" / "step-00000099.safetensors").write_text("of an earlier run")
    files = write_steps(conversations, *_scores(10), tmp_path / "mismatch", num_steps=4)
    assert sorted((tmp_path / "mismatch").iterdir()) == files
    steps = list(read_run(files))
    assert [step.responses.num_sequences for step in steps] == [2, 3, 2, 3]
    assert all(step.moe_layers == (1, 2) for step in steps)
    found, compared = summarize_run(steps), _comparison(conversations)
    assert found.routes == compared.routes
    for name, expected in ((OWN_ROUTES, compared.native), (REPLAYED, compared.replay)):
        of_run = found.passes[name].diagnostics
        # Sums of the same numbers in another order; the rollout's are float32 in the files.
        assert of_run.flat() == pytest.approx(replace(expected, routes=None).flat(), rel=1e-6, abs=1e-12)
    report_steps(files, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "nothing is trained between them" in page and str(tmp_path) not in page


def test_groups_are_whole_in_every_step(tmp_path: Path):
    files = write_steps([_conversation() for _ in range(10)], *_scores(10), tmp_path, group_size=4, num_steps=2)
    assert [step.responses.group_ids for step in read_run(files)] == [(0,) * 4, (1,) * 4 + (2,) * 2]


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path):
    def fail(partial: Path) -> None:
        partial.write_text("half of")
        raise OSError("disk full")

    path = tmp_path / "demo.json"
    write_json({"run": 1}, path)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert json.loads(path.read_text()) == {"run": 1}
    assert list(tmp_path.iterdir()) == [path]
