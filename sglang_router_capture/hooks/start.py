"""Hooks on the start of a server: each scheduler says which capturer it runs, and whoever started it checks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from router_replay.errors import RouterReplayError, SeamError
from sglang_router_capture import options, refusals, seam_check
from sglang_router_capture.hooks.process import (
    answers_wait_for_handles,
    options_of_this_process,
    other_rank_of_this_process,
    recorder_of_this_process,
)
from sglang_router_capture.hooks.registry import hook
from sglang_router_capture.ledger import LEDGER
from sglang_router_capture.server_folder import ServerFolder

logger = logging.getLogger(__name__)

REPORT = "router_capture"
"""Key of a scheduler's report in what it says at its start: which capturer, whether it is ours, format and codec."""
_CONTROLLER = "managers.data_parallel_controller.DataParallelController.get_init_info"


@hook("managers.scheduler.Scheduler.get_init_info", "AFTER")
def after_get_init_info(info: dict[str, Any], scheduler: Any, **others: Any) -> None:
    """A scheduler tells its parent that it is ready."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    chosen = options_of_this_process()
    if chosen is None:
        return
    recorder = recorder_of_this_process()
    info[REPORT] = [
        {
            "capturer": type(get_global_experts_capturer()).__name__,
            "ours": recorder is not None or other_rank_of_this_process() is not None,
            "format": chosen.format,
            "codec": None if recorder is None else recorder.codec.name,
        }
    ]


@hook(_CONTROLLER, "AFTER")
def after_get_init_info_of_controller(info: dict[str, Any], controller: Any, **others: Any) -> None:
    """The controller of data-parallel schedulers tells its parent that they are ready."""
    if options_of_this_process() is not None:
        info[REPORT] = [report for said in controller._scheduler_init_infos for report in _reports(said)]


@hook("entrypoints.engine.Engine._launch_scheduler_processes", "AROUND")
def around_launch_scheduler_processes(
    original: Callable[..., tuple[Any, Any]], cls: type, server_args: Any, *args: Any, **others: Any
) -> tuple[Any, Any]:
    """The schedulers of a server are to be started: this is its start, whoever made the settings and how often."""
    asked = options.of(server_args)
    if asked is None:
        return original(cls, server_args, *args, **others)
    try:
        chosen = options.attach_for_a_start(server_args, asked)
        if answers_wait_for_handles(server_args):
            ServerFolder(chosen.start).open()
    except RouterReplayError as error:
        refusals.stop(error)
    result = original(cls, server_args, *args, **others)
    # Nobody has waited for them yet.
    launched = result[0]
    wait_for_ready = launched.wait_for_ready

    def wait_and_check() -> None:
        wait_for_ready()
        try:
            require_ours(launched.scheduler_infos)
        except RouterReplayError as error:
            try:
                _end(launched.all_child_pids)
            finally:
                refusals.stop(error)

    launched.wait_for_ready = wait_and_check
    return result


def require_ours(infos: list[dict[str, Any]]) -> None:
    """Check what the schedulers of a server that was asked for routes said, and log what they capture by.

    Args:
        infos: what each scheduler, or a controller for several of them, said when it was ready.

    Raises:
        SeamError: one of them runs another capturer, or says nothing of it.
    """
    from sglang.srt.managers.data_parallel_controller import SCHEDULER_PIDS_ARG

    controllers_tell = seam_check.path_here(LEDGER.seam(_CONTROLLER)) is not None
    reports = [
        report
        for info in infos
        # Older controllers pass nothing on. Their schedulers still stop by themselves.
        if controllers_tell or SCHEDULER_PIDS_ARG not in info
        for report in _reports(info)
    ]
    others = [report["capturer"] for report in reports if not report["ours"]]
    if others:
        raise SeamError(
            f"{len(others)} of {len(reports)} schedulers of this server do not run our recorder but {others[0]}: routes"
            " would be SGLang's own, wrong ones among them without a mark. SGLANG_PLUGINS must name router_capture, if"
            " it is set; another plugin, or a scheduler process of another kind, may not put its own capturer there"
        )
    if reports:
        logger.info(
            "router capture is ours in %d scheduler(s): format %s, codec %s",
            len(reports),
            reports[0]["format"],
            # Of a rank that answers requests; others have none.
            next((report["codec"] for report in reports if report["codec"]), None),
        )


def _reports(info: dict[str, Any]) -> list[dict[str, Any]]:
    return info.get(REPORT) or [{"capturer": "one that it does not name", "ours": False}]


def _end(pids: list[int]) -> None:
    from sglang.srt.utils import kill_process_tree

    for pid in pids:
        kill_process_tree(pid)
