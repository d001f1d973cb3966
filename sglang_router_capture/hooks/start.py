"""Hooks on the command line and the server's settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from router_replay.errors import RouterReplayError
from sglang_router_capture import options, refusals, seam_check
from sglang_router_capture.hooks.process import options_of_this_process
from sglang_router_capture.hooks.registry import HOOKS, hook


@hook("server_args.ServerArgs.add_cli_args", "AFTER")
def after_add_cli_args(result: None, parser: argparse.ArgumentParser, **others: Any) -> None:
    """Our flags join the server's."""
    options.add_arguments(parser)


@hook("server_args.ServerArgs.from_cli_args", "AFTER")
def after_from_cli_args(result: Any, cls: type, args: argparse.Namespace, **others: Any) -> None:
    """The command line is parsed: hand our part of it to this process and its children."""
    try:
        chosen = options.from_arguments(args)
    except RouterReplayError as error:
        refusals.stop(error)
    if chosen is not None:
        chosen.export()


@hook("server_args.ServerArgs.resolve_once", "AROUND")
def around_resolve_once(original: Callable[..., None], server_args: Any, **others: Any) -> None:
    """Ask SGLang for routes, which keeps fused routers out of its choice of kernels; then refuse what cannot be."""
    from sglang.srt.arg_groups.overrides import resolving_view

    chosen = options_of_this_process()
    if chosen is None:
        return original(server_args, **others)
    # Upstream sets the attribute when it is done, and reads it in the same way.
    if not getattr(server_args, "_resolution_finished", False):
        server_args.enable_return_routed_experts = True
    original(server_args, **others)
    try:
        seam_check.require_applied(HOOKS)
        refusals.require_supported_config(resolving_view(server_args))
        if chosen.format == "masks":
            refusals.require_whole_answers(resolving_view(server_args))
    except RouterReplayError as error:
        refusals.stop(error)
