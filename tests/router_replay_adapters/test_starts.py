"""What adapters do and say when a stack starts."""

from __future__ import annotations

import importlib.metadata
import logging
from argparse import Namespace
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from router_replay.errors import SeamError, UnsupportedError
from router_replay.upstream import Installed, check_settings
from router_replay_adapters import miles as miles_adapter
from router_replay_adapters import slime as slime_adapter
from router_replay_adapters.native_rows import FORWARD
from router_replay_adapters.refusals import MEGATRON, SETTINGS
from tests.router_replay_adapters.stacks_here import MEGATRON_ARGS, applied, remove

ASKED = Namespace(**MEGATRON_ARGS, use_rollout_routing_replay=True)


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
        ({"moe_router_fusion": True}, "--moe-router-fusion is True: a fused router asks"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type is 'sinkhorn'"),
        ({"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]}, "this balancing chooses"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl is 'local'"),
        ({"enable_cuda_graph": True}, "--enable-cuda-graph is True"),
        ({"external_cuda_graph": True}, "--external-cuda-graph is True"),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor is 1.0: tokens over"),
        ({"moe_router_force_load_balancing": True}, "--moe-router-force-load-balancing is True: gates would come"),
        ({"moe_router_force_biased": 0.0}, "--moe-router-force-biased is 0.0: gates would come"),
        ({"moe_flex_dispatcher_backend": "hybridep"}, "--moe-flex-dispatcher-backend is 'hybridep'"),
        ({"qkv_format": "bshd", "micro_batch_size": 2}, "--qkv-format is bshd and --micro-batch-size is 2"),
    ],
    ids=lambda part: "" if isinstance(part, str) else "-".join(part),
)
def test_arguments_under_which_replay_is_none_or_undone_stop_the_start(
    adapter: ModuleType, variables: None, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"^replay by \w+'s own queues cannot run where .*{message}"):
        adapter.init(Namespace(**{**vars(ASKED), **arguments}))
    adapter.init(Namespace(**{**vars(ASKED), **arguments, "use_rollout_routing_replay": False}))
    remove(adapter.PATCHES)


def test_arguments_that_change_no_route_are_left_alone(adapter: ModuleType, variables: None) -> None:
    own = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "qkv_format": "bshd", "micro_batch_size": 1}
    # Megatron's own way to say that there is none.
    own["moe_expert_capacity_factor"] = -1.0
    adapter.init(Namespace(**{**vars(ASKED), **own, "moe_token_dispatcher_type": "flex"}))


def test_an_argument_that_is_gone_is_not_taken_for_one_that_is_off(adapter: ModuleType, variables: None) -> None:
    """Stacks bring forks of Megatron, whose numbers do not say which of the newer and older names are there."""
    in_some_releases = {row.setting for row in SETTINGS if row.releases}
    adapter.init(Namespace(**{name: value for name, value in vars(ASKED).items() if name not in in_some_releases}))
    remove(adapter.PATCHES)
    for gone in MEGATRON_ARGS.keys() - in_some_releases:
        with pytest.raises(SeamError, match=f"expected a setting '{gone}', found none"):
            adapter.init(Namespace(**{name: value for name, value in vars(ASKED).items() if name != gone}))


def test_a_fork_is_judged_by_what_it_has_and_not_by_its_number(
    adapter: ModuleType, variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As miles' own Megatron, which is 0.16.0rc0 and has what others have since 0.17."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.16.0rc0")
    with pytest.raises(UnsupportedError, match=r"--moe-router-force-biased is 0\.5"):
        adapter.init(Namespace(**{**vars(ASKED), "moe_router_force_biased": 0.5}))


def test_megatron_has_every_setting_that_is_looked_at() -> None:
    assert check_settings(MEGATRON, SETTINGS, Installed(MEGATRON.distribution)) == []


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
