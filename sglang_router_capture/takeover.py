"""A process of a server that was asked for routes: every hook is put in place, or the process ends and says why."""

from __future__ import annotations

import atexit
from functools import cache
from typing import Any

from router_replay.errors import UnsupportedError
from sglang_router_capture import options, refusals, seam_check, server_folder, wrappers
from sglang_router_capture.options import CaptureOptions


def begin(server_args: Any, chosen: CaptureOptions) -> CaptureOptions:
    """Hook this process, and check a server's settings once they are final.

    Returns:
        What it was asked for, by the settings.

    Raises:
        SystemExit: the installed SGLang is not the one that the hooks were written for, or these settings are refused.
    """
    try:
        _put_hooks_in_place()
        _ask_for_routes(server_args)
        return _supported(server_args, chosen)
    except Exception as error:
        refusals.stop(error)


@cache
def _put_hooks_in_place() -> None:
    # The ledger first: the hooks' own imports fail on a name that is gone, and would not say what it was for.
    seam_check.check()
    from sglang_router_capture import hooks

    wrappers.apply(seam_check.targets(hooks.HOOKS))
    seam_check.require_applied(hooks.HOOKS)
    # Before SGLang registers the end of the servers that it starts here, and so after that end.
    atexit.register(server_folder.close_opened)


def _ask_for_routes(server_args: Any) -> None:
    """Set what keeps fused routers away, in settings that became final before any plugin was loaded."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    if resolving_view(server_args).enable_return_routed_experts:
        return
    try:
        declare_resolution(server_args, "router capture", enable_return_routed_experts=True)
    except ValueError as error:
        raise UnsupportedError(
            f"this server's settings are in use and {options.UPSTREAM_SETTING} is not among them, which a server that"
            f" returns routes needs: set {options.UPSTREAM_SETTING}=True where ServerArgs is made"
        ) from error


def _supported(server_args: Any, chosen: CaptureOptions) -> CaptureOptions:
    from sglang.srt.arg_groups.overrides import resolving_view

    config = resolving_view(server_args)
    chosen = options.with_servers_url(chosen, config)
    refusals.require_supported_config(config, chosen)
    return chosen
