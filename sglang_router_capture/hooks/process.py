"""What the hooks of every process ask first: whether it captures, and by which recorder."""

from __future__ import annotations

from typing import Any

from router_replay.errors import RouterReplayError
from sglang_router_capture import options, refusals
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.ranks import OtherRank
from sglang_router_capture.recorder import Recorder


def recorder_of_this_process() -> Recorder | None:
    """The recorder of this process, which holds its options; None where capture is off."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    recorder = get_global_experts_capturer()
    return recorder if isinstance(recorder, Recorder) else None


def other_rank_of_this_process() -> OtherRank | None:
    """What stands in the recorder's place on a rank that answers no request; None on others."""
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    capturer = get_global_experts_capturer()
    return capturer if isinstance(capturer, OtherRank) else None


def answers_wait_for_handles(server_args: Any) -> bool:
    """Whether handles reach the answers of a server by a mailbox, behind tickets.

    Schedulers on other nodes cannot reach it, so the one store of theirs puts the masks into the handles at once.
    """
    chosen = options.of(server_args)
    return chosen is not None and chosen.format == "masks" and server_args.nnodes == 1


def options_of_this_process() -> CaptureOptions | None:
    """What the server of this process was asked for; None where capture is off.

    A process that starts one server after another belongs to the last. Before SGLang has settings in use, the
    environment decides.
    """
    from sglang.srt.runtime_context import get_server_args

    try:
        server_args = get_server_args()
    except ValueError:
        server_args = None
    try:
        return CaptureOptions.from_environment() if server_args is None else options.of(server_args)
    except RouterReplayError as error:
        refusals.stop(error)
