"""`python -m benchmarks.transport`, as a user runs it, on few tokens: every way brings the same experts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.transport import page
from benchmarks.transport.figures import targets
from benchmarks.transport.ways import ANSWERED, FILE, HANDED, HTTP, INLINE, KEPT, NOTHING, RAY, SCHEDULED, STOCK, WAYS
from tests.house.repository import ROOT
from tests.small_model import cpu_environment

pytestmark = pytest.mark.timeout(900)

TOKENS = 600
# 48 layers of top-8 as int32, in base64; packed in 41 bits a layer.
STOCK_BYTES = (TOKENS - 1) * 48 * 8 * 4
PACKED_BYTES = (TOKENS - 1) * 48 * 41 // 8


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("transport") / "transport.json"
    asked = (f"--tokens={TOKENS}", "--model=Qwen3-30B-A3B", "--rounds=1", "--turns=3")
    command = [sys.executable, "-m", "benchmarks.transport", *asked, "--conversation=2048", f"--json={file}"]
    run = subprocess.run(command, cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, check=False)
    # Ways that bring other experts than the others end the run.
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{TOKENS} tokens of Qwen3-30B-A3B: CPU ms by process" in run.stdout
    return json.loads(file.read_text())


def test_bytes_are_those_that_cross_each_hop(figures: dict) -> None:
    (case,) = figures["requests"]
    hops = {row["way"]: row["bytes_by_hop"] for row in case["rows"]}
    assert tuple(hops) == WAYS
    for hop, factor in ((SCHEDULED, 1), (ANSWERED, 4 / 3)):
        assert STOCK_BYTES * factor < hops[STOCK][hop] < STOCK_BYTES * factor + 2000
    assert PACKED_BYTES * 4 / 3 < hops[INLINE][ANSWERED] < PACKED_BYTES * 4 / 3 + 6000
    for way in (FILE, HTTP, RAY):
        assert PACKED_BYTES < hops[way][KEPT] < PACKED_BYTES + 3000
        assert hops[way][ANSWERED] < 1000
        assert 0 < hops[way][HANDED] < 500
    assert hops[NOTHING][KEPT] == hops[NOTHING][HANDED] == hops[STOCK][KEPT] == 0


def test_every_process_is_counted(figures: dict) -> None:
    for case in figures["requests"] + figures["conversations"]:
        for row in case["rows"]:
            taken = row["cpu_s_by_process"]
            assert all(taken[name] > 0 for name in ("scheduler", "detokenizer", "server", "trainer"))
            assert row["cpu_s"] == pytest.approx(sum(taken.values()))


def test_a_conversation_in_deltas_reads_each_row_once(figures: dict) -> None:
    (case,) = figures["conversations"]
    read = {(row["way"], row["asked"]): row["bytes_read"] for row in case["rows"]}
    # Of three equal turns the prefixes are 1 + 2 + 3 turns.
    whole = read[STOCK, "whole prefixes"] / read[STOCK, "routed_experts_start_len"]
    assert whole == pytest.approx(2, rel=0.01)
    assert read[INLINE, "whole prefixes"] / read[INLINE, "Rollout"] == pytest.approx(2, rel=0.05)
    assert read[FILE, "Rollout"] < read[INLINE, "Rollout"]


def test_pages_are_made_of_the_figures(figures: dict) -> None:
    assert f"| {TOKENS}, Qwen3-30B-A3B | `file:` |" in page.requests(figures)
    assert "| file: | Rollout |" in page.conversation(figures)
    assert "3 turns, 2,048 tokens of Qwen3-30B-A3B" in page.conversation(figures)


def test_targets_are_of_what_routes_cost() -> None:
    rows = [{"way": way, "cpu_of_stock": 1 / 18, "bytes_of_stock": 1 / 8} for way in WAYS]
    cases = [{"model": "Qwen3-30B-A3B", "tokens": tokens, "rows": rows} for tokens in (2048, 32768)]
    found = {aim["what"]: aim["holds"] for aim in targets(cases)}
    assert len(found) == 2 + 4 + 2 and all(found.values())
    for row in rows:
        row["cpu_of_stock"], row["bytes_of_stock"] = 1 / 13, 1 / 7
    failed = [aim["what"] for aim in targets(cases) if not aim["holds"]]
    assert failed == [
        "bytes, file: of SGLang's own, 2,048 tokens of Qwen3-30B-A3B",
        "CPU, file: of SGLang's own, 32,768 tokens of Qwen3-30B-A3B",
        "bytes, file: of SGLang's own, 32,768 tokens of Qwen3-30B-A3B",
    ]
