"""Hooks on updates of the weights: every one of them is told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_router_capture.hooks.process import other_rank_of_this_process, recorder_of_this_process
from sglang_router_capture.hooks.registry import hook
from sglang_router_capture.recorder import Recorder

_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


@hook(f"{_UPDATER}.update_weights_from_disk", "BEFORE")
@hook(f"{_UPDATER}.update_weights_from_distributed", "BEFORE")
@hook(f"{_UPDATER}.update_weights_from_tensor", "BEFORE")
@hook(f"{_UPDATER}.update_weights_from_ipc", "BEFORE")
def before_update(updater: Any, *args: Any, **others: Any) -> None:
    """Weights are about to change, by whichever way they come."""
    if recorder := _recorder_without_passes():
        recorder.weight_versions.change()


@hook(f"{_UPDATER}.record_weight_version_after_update", "AFTER")
def after_record_weight_version(result: None, updater: Any, weight_version: str | None, **others: Any) -> None:
    """An update, or one part of it, was loaded."""
    if recorder := recorder_of_this_process():
        recorder.weight_versions.changed(weight_version)


@hook(f"{_UPDATER}.begin_weight_update", "AROUND")
def around_begin_weight_update(original: Callable[..., Any], updater: Any, *args: Any, **others: Any) -> Any:
    """An update in several parts may begin."""
    recorder = _recorder_without_passes()
    result = original(updater, *args, **others)
    if recorder and result.success:
        recorder.weight_versions.begin_parts()
    return result


@hook(f"{_UPDATER}.end_weight_update", "AROUND")
def around_end_weight_update(original: Callable[..., Any], updater: Any, *args: Any, **others: Any) -> Any:
    """An update in several parts may end."""
    recorder = _recorder_without_passes()
    result = original(updater, *args, **others)
    if recorder and result.success:
        recorder.weight_versions.end_parts()
    return result


def _recorder_without_passes() -> Recorder | None:
    """The recorder, once no pass is in flight.

    A pass runs on a stream of its own, and its result may wait for a paused scheduler: one that is still computed while
    the weights are written would be of no version at all. Each rank of a model writes its own part of them.
    """
    if recorder := recorder_of_this_process():
        # The version of a pass is taken when it is launched, so that it need not be in the table.
        recorder.log.wait()
    elif other_rank_of_this_process() and torch.cuda.is_available():
        torch.cuda.synchronize()
    return recorder
