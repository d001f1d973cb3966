"""The main job's figures, from conversations small enough to count by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import write_json, write_whole
from examples.mismatch_plot import TAUS, plot_mismatch
from examples.replay_report import Comparison, compare, summarize
from examples.rollout import Conversation
from routing_masks import RoutingGeometry, RoutingMasks

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
    own = torch.cat([RECORDED.flip(-1), RECORDED[:1]])
    own[2, 1] = torch.tensor([1, 4])
    native = torch.tensor([-9.0, -9.0, -0.7, -0.5])
    count = len(conversations)
    return compare(conversations, [native] * count, [torch.tensor(ROLLOUT_LOGPROBS)] * count, [own] * count, TAUS)


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
