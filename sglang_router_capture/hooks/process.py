"""What the hooks of every process ask first: whether it captures, and by which recorder."""

from __future__ import annotations

from router_replay.errors import RouterReplayError
from sglang_router_capture import refusals
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.recorder import Recorder


def recorder_of_this_process() -> Recorder | None:
    """The recorder of this process, which holds its options; None where capture is off."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    recorder = get_global_experts_capturer()
    return recorder if isinstance(recorder, Recorder) else None


def options_of_this_process() -> CaptureOptions | None:
    """What the environment says, for the hooks that run before there is a recorder."""
    try:
        return CaptureOptions.from_environment()
    except RouterReplayError as error:
        refusals.stop(error)
