"""Entry point of the `sglang.srt.plugins` group: runs in every SGLang process before it starts its work."""

from __future__ import annotations

import sys

from sglang_router_capture import options
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
        from sglang_router_capture import refusals

        refusals.stop(error)


def _register() -> None:
    # Imported here: a process that captures nothing loads no ledger.
    from sglang_router_capture import seam_check

    # The ledger first: the hooks' own imports fail on a name that is gone, and would not say what it was for.
    seam_check.check()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_router_capture import hooks

    for path, (hook, kind) in seam_check.targets(hooks.HOOKS).items():
        HookRegistry.register(path, hook, HookType[kind])
