"""Which name the weights have after each kind of update, with SGLang's own code around a model that does not load."""

from __future__ import annotations

import contextlib
import pickle
import pkgutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_router_capture import hooks
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.weight_versions import WeightVersions


class Server:
    """SGLang's updater with our hooks, over workers that load what they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
        from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

        self.said = "default"
        self.loads = True
        self.waited = 0
        self.versions = WeightVersions(lambda: self.said, "start")
        log = SimpleNamespace(wait=self._wait)
        recorder = SimpleNamespace(weight_versions=self.versions, log=log)
        monkeypatch.setattr(hooks.weights, "recorder_of_this_process", lambda: recorder)
        for name, (hook, kind) in hooks.HOOKS.items():
            if hook.__module__ == hooks.weights.__name__:
                target = f"sglang.srt.{name}"
                monkeypatch.setattr(target, _wrap_fn(pkgutil.resolve_name(target), hook, HookType[kind]))
        monkeypatch.setattr(torch.distributed, "barrier", lambda **_: None)

        def load(*_: Any, **__: Any) -> tuple[bool, str]:
            return self.loads, ""

        loader = SimpleNamespace(
            update_weights_from_disk=load,
            update_weights_from_tensor=load,
            update_weights_from_ipc=load,
            load_weights_from_distributed=load,
            receive_weights_from_distributed=lambda **_: [],
            begin_weight_update=lambda: None,
            end_weight_update=lambda **_: None,
        )
        runner = SimpleNamespace(weight_updater=loader)
        manager = SchedulerWeightUpdaterManager.__new__(SchedulerWeightUpdaterManager)
        manager.tp_worker = SimpleNamespace(
            model_runner=runner, weight_update_runners=lambda: [("target", runner)], deserialize_own_rank=lambda _: []
        )
        manager.draft_worker = manager.metrics_collector = manager.tp_cpu_group = manager._session = None
        manager.flush_cache = lambda **_: True
        manager.scheduler = SimpleNamespace(record_weight_version_change=self._record)
        self.manager: Any = manager

    def _wait(self) -> None:
        self.waited += 1

    def _record(self, new_version: str | None) -> None:
        self.said = self.said if new_version is None else new_version

    def update(self, way: str, name: str | None = None) -> str:
        """The weights' name after an update, or a part of one, that comes from a disk, tensors, a group or by IPC."""
        request = SimpleNamespace(
            model_path="x", load_format=None, recapture_cuda_graph=False, weight_version=name, flush_cache=True,
            torch_empty_cache=False, names=[], dtypes=[], shapes=[], group_name="g", selector="all",
            serialized_named_tensors=[],
        )  # fmt: skip
        before = self.waited
        getattr(self.manager, f"update_weights_from_{way}")(request)
        # No pass is computed while the weights are written.
        assert self.waited == before + 1
        return self.present

    @property
    def present(self) -> str:
        return self.versions.name(self.versions.present)

    @contextlib.contextmanager
    def parts(self) -> Any:
        assert self.manager.begin_weight_update(SimpleNamespace(selector="all")).success
        yield
        assert self.manager.end_weight_update(SimpleNamespace()).success


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def test_the_servers_names_are_taken(server: Server) -> None:
    assert server.present == "default"
    assert server.update("disk", "1") == "1"
    assert server.update("ipc", "2") == "2"
    # Renamed without an update, and the name of old weights again.
    server.said = "1"
    assert server.present == "1"
    assert server.versions.number("1") == server.versions.present


@pytest.mark.parametrize("way", ["disk", "ipc"])
def test_an_update_that_nobody_names_has_a_name_of_its_own(server: Server, way: str) -> None:
    assert server.update(way) == "default+start.1"
    assert server.present == "default+start.1"
    assert server.update(way) == "default+start.2"
    assert server.update(way, "7") == "7"
    assert server.update(way) == "7+start.4"
    server.said = "8"
    assert server.present == "8"


def test_names_are_unique_across_restarts() -> None:
    """Of servers that one trainer's process starts, one after the other; the ranks of each agree."""
    names = set()
    for _ in range(3):
        chosen = CaptureOptions()
        ranks = [WeightVersions(lambda: "default", pickle.loads(pickle.dumps(chosen)).start) for _ in range(2)]
        for versions in ranks:
            versions.change()
            versions.changed(None)
        (name,) = {versions.name(versions.present) for versions in ranks}
        names.add(name)
    assert len(names) == 3


def test_a_failed_update_leaves_weights_without_a_plain_name(server: Server) -> None:
    server.loads = False
    failed = server.update("disk", "1")
    assert failed.startswith("default+start.1-incomplete-")
    assert server.present == failed
    # Another rank may have got all of them: it calls them otherwise.
    other = WeightVersions(lambda: "default", "start")
    other.change()
    assert other.name(other.present) != failed
    server.loads = True
    assert server.update("disk", "1") == "1"


def test_weights_are_whole_when_the_last_part_is_in(server: Server) -> None:
    for way in ("tensor", "distributed"):
        old = server.present
        with server.parts():
            seen = [server.present]
            for part in range(3):
                seen.append(server.update(way, "9" if part == 2 else None))
                assert server.present == seen[-1]
        assert all(name.startswith(f"{old}+start.") or name.startswith("9+start.") for name in seen)
        assert all("-incomplete-" in name for name in seen)
        # Rows of weights that differ by one part are told apart, too.
        assert len({*seen}) == 4
        assert server.present == "9"


def test_parts_that_nobody_names(server: Server) -> None:
    server.said = "5"
    with server.parts():
        server.update("tensor")
        server.update("tensor")
    assert server.present == "5+start.3"
    # Written by others, through no call of SGLang's, and named before it ends.
    with server.parts():
        server.said = "6"
        assert "-incomplete-" in server.present
    assert server.present == "6"
    with server.parts():
        pass
    assert server.present == "6+start.5"


def test_a_part_that_fails_spoils_the_whole(server: Server) -> None:
    with server.parts():
        server.update("tensor", "2")
        server.loads = False
        server.update("tensor", "2")
        server.loads = True
        server.update("tensor", "2")
    assert server.present.startswith("2+start.5-incomplete-")
    with server.parts():
        server.update("tensor", "2")
    assert server.present == "2"


def test_what_sglang_refuses_to_open_or_close_changes_nothing(server: Server) -> None:
    assert not server.manager.end_weight_update(SimpleNamespace()).success
    assert server.present == "default"
    with server.parts():
        first = server.update("tensor")
        assert not server.manager.begin_weight_update(SimpleNamespace(selector="all")).success
        assert server.present == first


def test_names_from_storage_have_numbers(server: Server) -> None:
    numbers: list[int] = [server.versions.number(name) for name in ("a", "default", "a", "b")]
    assert numbers[0] == numbers[2] and len({*numbers}) == 3
    assert [server.versions.name(number) for number in numbers] == ["a", "default", "a", "b"]
    assert server.present == "default"


def _updates() -> dict[str, Callable[..., Any]]:
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Manager

    return {name: value for name, value in vars(Manager).items() if name.startswith("update_weights_from")}


def test_every_way_of_an_update_is_hooked() -> None:
    hooked = {name.rpartition(".")[2] for name, (hook, _) in hooks.HOOKS.items() if hook is hooks.weights.before_update}
    assert hooked == set(_updates())
