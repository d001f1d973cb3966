"""Servers that trainers start from Python, with nothing on the command line: capture is ours, or not asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from router_replay.masks import masks_from_meta_info
from sglang_router_capture import entry
from tests.sglang_router_capture.probe import HOOKED
from tests.sglang_router_capture.requests import upstream_routes
from tests.sglang_router_capture.test_seams import ENTRY_MODULES
from tests.small_model import cpu_environment

pytestmark = pytest.mark.timeout(1200)

# As there, which imports an engine.
PROMPT = [5, 6, 7, 8]


# A tokenizer process that takes longer than ten seconds to start is killed otherwise, and the next begins.
SLOW_START = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "300"}
WAYS = {"slime_and_miles": SLOW_START, "verl": {"SGLANG_ROUTER_CAPTURE": "1"}, "engines": {}, "others": {}}
Told = tuple[dict[str, list[Any]], str]


@pytest.fixture(scope="module")
def started(small_model: Path) -> Iterator[Callable[[str], Told]]:
    """What a launcher printed, by the first word of a line; and all that it and its servers printed.

    Two at a time: most of a start are imports, of one process after the other.
    """
    with ThreadPoolExecutor(2) as pool:
        runs = {way: pool.submit(_run, way, small_model, environment) for way, environment in WAYS.items()}
        yield lambda way: runs[way].result()


def _run(way: str, model: Path, environment: dict[str, str]) -> Told:
    run = subprocess.run(
        [sys.executable, "-m", "tests.sglang_router_capture.launchers", way, str(model)],
        env=cpu_environment({"LAUNCHERS_HOOKED": json.dumps(HOOKED), **environment}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1100, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:]
    told: dict[str, list[Any]] = {"RESULT": [], "CHILD": [], "STOPPED": []}
    for line in run.stdout.splitlines():
        word, _, rest = line.partition(" ")
        if word in told:
            told[word].append(json.loads(rest))
    return told, run.stdout


def test_started_as_slime_and_miles_with_upstreams_setting_alone(started: Callable[[str], Told]) -> None:
    """Two tokenizer processes, in which SGLang loads no plugins, pass on what the scheduler answers."""
    told, output = started("slime_and_miles")
    (result,) = told["RESULT"]
    assert result["told"] == [{"capturer": "Recorder", "ours": True, "format": "sglang", "codec": "ordered"}]
    assert "router capture is ours in 1 scheduler(s): format sglang, codec ordered" in output
    routes = upstream_routes(result["answer"], 6, 4)
    assert routes.shape == (len(PROMPT) + 2, 6, 4)
    assert (routes[:, 0] == 0).all() and (routes[:, 1:].sort(-1).values.diff(dim=-1) > 0).all()
    assert "routing_masks" not in result["answer"]["meta_info"]


def test_started_as_verl_with_our_variable_alone(started: Callable[[str], Told]) -> None:
    """SGLang had resolved the settings, without routes, before it loaded a plugin."""
    told, output = started("verl")
    (result,) = told["RESULT"]
    assert result["told"] == [{"capturer": "Recorder", "ours": True, "format": "masks", "codec": "rank"}]
    assert "router capture is ours in 1 scheduler(s): format masks, codec rank" in output
    masks = masks_from_meta_info(result["answer"]["meta_info"])
    masks.check_tokens(PROMPT + result["answer"]["output_ids"])
    assert masks.valid.tolist() == [True] * 6


def test_engines_of_one_process(started: Callable[[str], Told]) -> None:
    told, _ = started("engines")
    (result,) = told["RESULT"]
    assert result["told"] == [{"capturer": "Recorder", "ours": True, "format": "masks", "codec": "bitset"}]
    masks = masks_from_meta_info(result["answer"]["meta_info"])
    masks.check_tokens(PROMPT + result["answer"]["output_ids"])
    assert masks.codec == "bitset" and masks.valid.tolist() == [True] * 6


def test_a_process_without_plugins_has_every_hook_once_it_gets_the_settings(started: Callable[[str], Told]) -> None:
    asked, _ = started("engines")[0]["CHILD"]
    assert asked["hooked"] == HOOKED
    assert "sglang_router_capture.recorder" in asked["modules"]


def test_a_server_after_one_that_captured_has_the_entry_hooks_alone(started: Callable[[str], Told]) -> None:
    _, plain = started("engines")[0]["CHILD"]
    assert sorted(plain["hooked"]) == sorted(entry.HOOKS)
    assert set(plain["modules"]) == ENTRY_MODULES


def test_a_scheduler_with_another_capturer_stops_its_parent(started: Callable[[str], Told]) -> None:
    ((message, left, trainers_own),) = started("others")[0]["STOPPED"]
    assert message.startswith("router capture: 1 of 1 schedulers of this server do not run our recorder but _Other: ")
    assert "SGLANG_PLUGINS must name router_capture" in message
    assert left == []
    # A process that the trainer had started by itself.
    assert trainers_own is None
