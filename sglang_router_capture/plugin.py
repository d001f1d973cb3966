"""Entry point of the `sglang.srt.plugins` group: runs in every process in which SGLang loads plugins."""

from __future__ import annotations

import sys

from sglang_router_capture import entry, options, wrappers
from sglang_router_capture.options import CaptureOptions


def load() -> None:
    """Register the entry hooks, by which a process hears whether its server was asked for routes.

    Raises:
        SystemExit: this process was asked to capture by its command line or its environment, and the installed SGLang
            is not the one that the hooks were written for, or the options make no sense. SGLang swallows every other
            exception of a plugin and would serve without capture.
    """
    try:
        if options.asked_on_command_line(sys.argv[1:]) or CaptureOptions.from_environment() is not None:
            # Imported here: a process that captures nothing loads no ledger.
            from sglang_router_capture import seam_check

            seam_check.check()
    except Exception as error:
        from sglang_router_capture import refusals

        refusals.stop(error)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for path, (hook, kind) in wrappers.not_in_place(entry.HOOKS).items():
        HookRegistry.register(path, hook, HookType[kind])
