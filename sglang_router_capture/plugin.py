"""Entry point of the `sglang.srt.plugins` group: runs in every SGLang process before it starts its work."""

from __future__ import annotations

import sys

from routing_masks import RoutingMaskError
from sglang_router_capture import options
from sglang_router_capture.options import CaptureOptions


def load() -> None:
    """Register the hooks if this process was asked to capture; otherwise do nothing at all.

    Raises:
        SystemExit: the installed SGLang is not the one that the hooks were written for, or the options make no sense.
            SGLang swallows every other exception of a plugin and would serve without capture.
    """
    try:
        asked = CaptureOptions.from_environment() is not None or options.asked_on_command_line(sys.argv[1:])
    except RoutingMaskError as error:
        raise SystemExit(f"router capture: {error}") from error
    if not asked:
        return
    # The hooks import SGLang and torch, which a process that captures nothing should not pay for.
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_router_capture import hooks, seams

    try:
        seams.check()
    except seams.SeamError as error:
        raise SystemExit(f"router capture: {error}") from error
    for seam in seams.SEAMS:
        if seam.hooked:
            hook, kind = hooks.HOOKS[seam.path]
            HookRegistry.register(seam.target, hook, HookType[kind])
