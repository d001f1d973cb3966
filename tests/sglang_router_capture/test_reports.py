"""What schedulers say of themselves at their start, and what becomes of settings that are final too early."""

from __future__ import annotations

import contextlib
import logging
import pickle
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from router_replay.errors import SeamError, UnsupportedError
from sglang_router_capture import entry, live_refusals, options, refusals, server_folder, takeover
from sglang_router_capture.hooks import start
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.server_folder import ServerFolder

OURS = {"capturer": "Recorder", "ours": True, "format": "masks", "codec": "rank"}
STOCK = {"capturer": "RoutedExpertsCapturer", "ours": False, "format": "masks", "codec": None}


def test_schedulers_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        start.require_ours([{start.REPORT: [OURS]}, {start.REPORT: [OURS, OURS]}])
    assert "router capture is ours in 3 scheduler(s): format masks, codec rank" in caplog.text


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ([{start.REPORT: [OURS]}, {start.REPORT: [STOCK]}], "1 of 2 schedulers .* but RoutedExpertsCapturer: "),
        ([{start.REPORT: [OURS, STOCK]}], "1 of 2 schedulers"),
        ([{"status": "ready"}], "1 of 1 schedulers .* but one that it does not name: "),
        ([{"status": "ready", "scheduler_pids": [1]}], "1 of 1 schedulers"),
    ],
    ids=["another", "another behind a controller", "silent", "silent controller"],
)
def test_one_scheduler_that_is_not_ours(infos: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(SeamError, match=words + "|SGLANG_PLUGINS must name router_capture"):
        start.require_ours(infos)


def test_controllers_of_releases_that_pass_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.seam_check, "path_here", lambda seam: None)
    start.require_ours([{"status": "ready", "scheduler_pids": [1]}])
    with pytest.raises(SeamError):
        start.require_ours([{"status": "ready"}])


def _launched(infos: list[dict[str, Any]]) -> SimpleNamespace:
    return SimpleNamespace(scheduler_infos=infos, all_child_pids=[7, 8], wait_for_ready=lambda: None)


def test_a_parent_that_was_not_asked_checks_nothing() -> None:
    launched = _launched([{"status": "ready"}])
    wait = launched.wait_for_ready
    found = start.around_launch_scheduler_processes(lambda *args: (launched, []), object, SimpleNamespace())
    assert found == (launched, [])
    assert launched.wait_for_ready is wait


def test_a_parent_ends_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", ended.append)
    server_args, launched = SimpleNamespace(nnodes=1), _launched([{start.REPORT: [STOCK]}])
    options.attach(server_args, CaptureOptions())
    start.around_launch_scheduler_processes(lambda *args: (launched, []), object, server_args)
    server_folder.close_opened()
    with pytest.raises(SystemExit, match="router capture: 1 of 1 schedulers"):
        launched.wait_for_ready()
    assert ended == [7, 8]


def test_settings_that_came_from_another_process_start_one_server_after_another() -> None:
    """As a trainer makes them: parsed in one process, and used in others, more than once."""
    from sglang.srt.server_args import ServerArgs

    started: list[CaptureOptions | None] = []

    def launch(cls: type, server_args: Any) -> tuple[Any, Any]:
        started.append(options.of(server_args))
        return _launched([{start.REPORT: [OURS]}]), []

    server_args = ServerArgs(model_path="x", port=30123)
    arrived = entry.TravellingOptions("masks", "auto", "http:", "one-start")
    options.attach(server_args, arrived)
    for _ in range(2):
        start.around_launch_scheduler_processes(launch, object, server_args)
    first, second = started
    assert first is not None and second is not None
    assert len({"one-start", first.start, second.start}) == 3
    assert first.store == second.store == "http://127.0.0.1:30123"
    # The schedulers find the folder when they start.
    folders = [ServerFolder(each.start) for each in (first, second)]
    assert all(folder.handles.is_dir() for folder in folders)
    server_folder.close_opened()
    assert not any(folder.path.exists() for folder in folders)


def test_a_controller_passes_on_what_its_schedulers_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    controller = DataParallelController.__new__(DataParallelController)
    said = {"max_total_num_tokens": 1, "max_req_input_len": 1, "startup_time": None}
    controller._scheduler_init_info_lock = threading.Lock()
    controller._scheduler_init_infos = []
    monkeypatch.setattr(
        "sglang.srt.managers.data_parallel_controller.aggregate_scheduler_startup_times", lambda times: [*times]
    )
    controller._record_scheduler_init_infos([{**said, start.REPORT: [OURS]}, {**said, start.REPORT: [STOCK]}])
    info = controller.get_init_info()
    start.after_get_init_info_of_controller(info, controller)
    assert start.REPORT not in info
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    start.after_get_init_info_of_controller(info, controller)
    assert info[start.REPORT] == [OURS, STOCK]


def test_settings_in_use_that_lack_routes_are_refused(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stash of decisions is read once, when settings are published."""
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=str(small_model), device="cpu")
    server_args.resolve_once()
    monkeypatch.setattr("sglang.srt.arg_groups.overrides.get_context", lambda: SimpleNamespace(server_args=server_args))
    with pytest.raises(UnsupportedError, match=r"set enable_return_routed_experts=True where ServerArgs is made"):
        takeover._ask_for_routes(server_args)
    monkeypatch.undo()
    takeover._ask_for_routes(server_args)
    from sglang.srt.arg_groups.overrides import resolving_view

    assert resolving_view(server_args).enable_return_routed_experts is True
    assert server_args.enable_return_routed_experts is False


def test_models_that_do_not_generate_are_refused(tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=64, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    live_refusals.require_generation(ModelConfig(str(tmp_path)))
    with pytest.raises(UnsupportedError, match="Qwen3MoeForCausalLM generates nothing"):
        live_refusals.require_generation(ModelConfig(str(tmp_path), is_embedding=True))


def test_a_server_in_rust_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals.require_python_server()
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(UnsupportedError, match="SGLANG_RUST_SERVER is set"):
        refusals.require_python_server()


def test_actors_of_sglangs_own_engine_in_ray_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals.require_no_ray_actors()
    monkeypatch.setitem(sys.modules, "sglang.srt.ray.scheduler_actor", ModuleType("scheduler_actor"))
    with pytest.raises(UnsupportedError, match="its RayEngine, and what we put there"):
        refusals.require_no_ray_actors()


def test_a_refusal_in_a_thread_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    """`SystemExit` ends a thread without a word."""
    thread = threading.Thread(target=_refuse)
    thread.start()
    thread.join()
    assert "router capture: no" in caplog.text


def _refuse() -> None:
    with contextlib.suppress(SystemExit):
        refusals.stop(UnsupportedError("no"))


def test_each_start_with_the_same_settings_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes have the name that the last one to hold the settings before them gave it."""
    monkeypatch.setattr(takeover, "begin", lambda server_args, chosen: chosen)
    monkeypatch.setattr(entry.wrappers, "apply", lambda hooks: None)
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    server_args = _Settings()
    starts = []
    for _ in range(2):
        entry.around_resolve_once(lambda _: None, server_args)
        options.attach_for_a_start(server_args, options.of(server_args))
        starts.append(options.of(server_args).start)
        # The process that starts the others may ask again.
        entry.around_resolve_once(lambda _: None, server_args)
        assert options.of(server_args).start == starts[-1]
        child = pickle.loads(pickle.dumps(server_args))
        entry.around_resolve_once(lambda _: None, child)
        assert options.of(child).start == starts[-1]
    assert len(set(starts)) == 2


class _Settings:
    """Like SGLang's: plain attributes go with them to every process."""


def test_the_entry_hooks_are_these() -> None:
    names = ("add_cli_args", "from_cli_args", "resolve_once")
    assert list(entry.HOOKS) == [f"sglang.srt.server_args.ServerArgs.{name}" for name in names]
