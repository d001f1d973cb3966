"""A process of a server that was asked for routes: every hook is put in place, or the process ends and says why."""

from __future__ import annotations

from functools import cache
from typing import Any

from router_replay.errors import UnsupportedError
from sglang_router_capture import options, refusals, seam_check, wrappers
from sglang_router_capture.options import CaptureOptions


def begin(server_args: Any, chosen: CaptureOptions) -> None:
    """Hook this process, and check a server's settings once they are final.

    Raises:
        SystemExit: the installed SGLang is not the one that the hooks were written for, or these settings are refused.
    """
    try:
        _put_hooks_in_place()
        _ask_for_routes(server_args)
        _require_supported(server_args)
    except Exception as error:
        refusals.stop(error)


@cache
def _put_hooks_in_place() -> None:
    # The ledger first: the hooks' own imports fail on a name that is gone, and would not say what it was for.
    seam_check.check()
    from sglang_router_capture import hooks

    wrappers.apply(seam_check.targets(hooks.HOOKS))
    seam_check.require_applied(hooks.HOOKS)


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


def _require_supported(server_args: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    refusals.require_supported_config(resolving_view(server_args))
