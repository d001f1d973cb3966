"""Entry point of the `sglang.srt.plugins` group: runs in every SGLang process before it starts its work."""

from __future__ import annotations

import sys
from typing import NoReturn

from sglang_router_capture import options, seams
from sglang_router_capture.options import CaptureOptions


def load() -> None:
    """Register the hooks if this process was asked to capture; otherwise do nothing at all.

    Raises:
        SystemExit: the installed SGLang is not the one that the hooks were written for, or the options make no sense.
            SGLang swallows every other exception of a plugin and would serve without capture.
    """
    try:
        if CaptureOptions.from_environment() is not None or options.asked_on_command_line(sys.argv[1:]):
            _register()
    except Exception as error:
        stop(error)


def stop(error: Exception) -> NoReturn:
    """Leave this process with `error` as its message: SGLang swallows a plugin's ordinary exceptions."""
    raise SystemExit(f"router capture: {error}") from error


def _register() -> None:
    # The ledger first: the hooks' own imports fail on a name that is gone, and would not say what it was for.
    seams.check()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_router_capture import hooks

    for path, (hook, kind) in hooks.HOOKS.items():
        HookRegistry.register(seams.PREFIX + path, hook, HookType[kind])
