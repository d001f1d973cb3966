"""What adapters do and say when a stack starts."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from router_replay.errors import SeamError, UnsupportedError
from router_replay_adapters import miles as miles_adapter
from router_replay_adapters import slime as slime_adapter
from router_replay_adapters.native_rows import FORWARD
from tests.router_replay_adapters.stacks_here import applied, remove

ASKED = Namespace(use_rollout_routing_replay=True)


@pytest.fixture(params=["miles", "slime"])
def adapter(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """An adapter whose stack can be imported; `init` is undone."""
    request.getfixturevalue({"miles": "miles_replay_base", "slime": "slime_routing_replay"}[request.param])
    made = {"miles": miles_adapter, "slime": slime_adapter}[request.param]
    yield made
    remove(made.PATCHES)


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs into Ray's runtime_env."""
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE_FORMAT", "sglang")


def _line(caplog: pytest.LogCaptureFixture, level: int) -> str:
    (record,) = [each for each in caplog.records if each.name.startswith("router_replay_adapters")]
    assert record.levelno == level
    return record.getMessage()


def test_one_line_at_the_start(adapter: ModuleType, variables: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        adapter.init(ASKED)
    line = _line(caplog, logging.INFO)
    assert line.startswith(f"{adapter.__name__} is on (")
    assert line.endswith("rows without routes take the router's own experts")


def test_variables_that_are_missing_are_named(
    adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    monkeypatch.delenv("SGLANG_ROUTER_CAPTURE_FORMAT", raising=False)
    with caplog.at_level(logging.INFO):
        adapter.init(ASKED)
    line = _line(caplog, logging.WARNING)
    assert "lacks SGLANG_ROUTER_CAPTURE_FORMAT=sglang:" in line and "runtime_env" in line


def test_a_stack_that_does_not_replay_is_told(
    adapter: ModuleType, variables: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        adapter.init(Namespace(use_rollout_routing_replay=False))
    assert "--use-rollout-routing-replay is not given" in _line(caplog, logging.WARNING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moe_router_fusion": True}, "cannot replay with --moe-router-fusion"),
        ({"cuda_graph_impl": "local"}, "cannot replay with --cuda-graph-impl local"),
        ({"cuda_graph_impl": "none", "external_cuda_graph": True}, "cannot replay with external_cuda_graph"),
        ({"qkv_format": "bshd", "micro_batch_size": 2}, "--qkv-format bshd and --micro-batch-size 2"),
    ],
)
def test_arguments_under_which_replay_is_none_stop_the_start(
    adapter: ModuleType, variables: None, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        adapter.init(Namespace(**{**vars(ASKED), **arguments}))
    adapter.init(Namespace(**{**arguments, "use_rollout_routing_replay": False}))
    remove(adapter.PATCHES)
    adapter.init(Namespace(**vars(ASKED), moe_router_fusion=False, qkv_format="bshd", micro_batch_size=1))


def test_a_name_with_other_parameters_stops_the_start(
    adapter: ModuleType,
    miles_replay_base: ModuleType,
    slime_routing_replay: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(self: object, compute_topk: object) -> None: ...

    if adapter is miles_adapter:
        owner, name = miles_replay_base.BaseReplayManager, "get_topk_fn"
    else:
        owner, name = slime_routing_replay, "get_routing_replay_compute_topk"
    monkeypatch.setattr(owner, name, other)
    with pytest.raises(SeamError, match=rf"{name}: expected parameters \(old_"):
        adapter.init(ASKED)
    assert getattr(owner, name) is other


def test_starts_of_a_second_role_in_one_process_wrap_once(adapter: ModuleType, variables: None) -> None:
    adapter.init(ASKED)
    module = __import__(adapter.LEDGER.prefix.rstrip("."), fromlist=["x"])
    owner = module.BaseReplayManager if adapter is miles_adapter else module
    name = adapter.LEDGER.seams[0].name.rpartition(".")[2]
    wrapped = vars(owner)[name]
    adapter.init(ASKED)
    assert vars(owner)[name] is wrapped
    remove(adapter.PATCHES)


def test_managers_of_token_positions_are_left_alone(miles_replay_base: ModuleType, pinned_memory: None) -> None:
    """Other things are replayed by the same class, whose rows of -1 mean something else."""
    manager = miles_replay_base.BaseReplayManager()
    manager.enabled, manager.stage = True, FORWARD
    manager.enable_check_replay_result = False
    queue = miles_replay_base.Replay()
    queue.record(torch.full((1, 4), -1, dtype=torch.int32))
    manager.set_current(queue)
    with applied(miles_adapter.PATCHES):
        topk = manager.get_topk_fn(lambda scores, topk: scores.topk(topk, dim=1).indices, return_probs=False)
        assert topk(torch.arange(16.0).expand(1, 16), 4).tolist() == [[0, 1, 2, 3]]
