"""The entry hooks: all that there is of us in a process whose server was asked for no routes.

They pass through, and load neither ledger nor codecs nor anything of the scheduler's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from router_replay.errors import RouterReplayError
from sglang_router_capture import options, wrappers
from sglang_router_capture.options import CaptureOptions
from sglang_router_capture.wrappers import PREFIX, Hook


def after_add_cli_args(result: None, parser: argparse.ArgumentParser, **others: Any) -> None:
    """Our flags join the server's."""
    options.add_arguments(parser)


def after_from_cli_args(server_args: Any, cls: type, args: argparse.Namespace, **others: Any) -> None:
    """The command line is parsed: our part of it goes with the settings that were made of it."""
    try:
        chosen = options.from_arguments(args)
    except RouterReplayError as error:
        _stop(error)
    if chosen is not None:
        _attach(server_args, chosen)


def around_resolve_once(original: Callable[..., None], server_args: Any, **others: Any) -> None:
    """The settings become final; every process of a server comes here before it uses them, however it was started."""
    try:
        chosen = options.of(server_args) or CaptureOptions.from_environment()
    except RouterReplayError as error:
        _stop(error)
    # Upstream sets the attribute when it is done, and reads it in the same way.
    if chosen is not None and not getattr(server_args, "_resolution_finished", False):
        server_args.enable_return_routed_experts = True
    original(server_args, **others)
    if chosen is None and _upstream_was_asked(server_args):
        # Upstream's own setting alone keeps its format; who serves it changes.
        chosen = CaptureOptions(format="sglang")
    if chosen is not None:
        # Imported here: this is where a process becomes one that captures.
        from sglang_router_capture import takeover

        _attach(server_args, takeover.begin(server_args, chosen))


class TravellingOptions(CaptureOptions):
    """Options that hook the process in which they arrive: SGLang loads plugins in some of a server's processes only."""

    def __reduce__(self) -> tuple[Callable[..., CaptureOptions], tuple[str, ...]]:
        return _arrived, (self.format, self.codec, self.store, self.start)


def _attach(server_args: Any, chosen: CaptureOptions) -> None:
    # Of a server that was started they have the name of that start, which all of its processes know.
    if not isinstance(chosen, TravellingOptions):
        options.attach(server_args, TravellingOptions(chosen.format, chosen.codec, chosen.store))


def _arrived(format_: str, codec: str, store: str, start: str) -> TravellingOptions:
    wrappers.apply(HOOKS)
    return TravellingOptions(format_, codec, store, start)


def _upstream_was_asked(server_args: Any) -> bool:
    try:
        from sglang.srt.arg_groups.overrides import resolving_view

        return bool(resolving_view(server_args).enable_return_routed_experts)
    except (ImportError, AttributeError):
        # A release that the ledger does not fit may not stop a server that asks for nothing.
        return bool(getattr(server_args, options.UPSTREAM_SETTING, False))


def _stop(error: Exception) -> NoReturn:
    from sglang_router_capture import refusals

    refusals.stop(error)


HOOKS: dict[str, Hook] = {
    f"{PREFIX}server_args.ServerArgs.add_cli_args": (after_add_cli_args, "AFTER"),
    f"{PREFIX}server_args.ServerArgs.from_cli_args": (after_from_cli_args, "AFTER"),
    f"{PREFIX}server_args.ServerArgs.resolve_once": (around_resolve_once, "AROUND"),
}
"""The entry hooks by full dotted path."""
