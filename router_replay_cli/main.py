"""`r3`: the project's command. Each of its subcommands is an entry point, so that this package knows neither end."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

GROUP = "r3.commands"
"""Entry points of functions with typer's annotations; the entry point's name is the subcommand's."""

_INSTALL = 'pip install "rollout-routing-replay[report]"'


def build_app() -> typer.Typer:
    """The command with the subcommands of all installed packages.

    A subcommand that cannot be imported, because something that it needs is not installed, is there and says so.

    Raises:
        ModuleNotFoundError: typer is not installed.
    """
    import typer

    app = typer.Typer(name="r3", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    # With a callback, a single subcommand still has its name.
    @app.callback()
    def r3() -> None:
        """Rollout routing replay: tools for the routes that a rollout took, and for what replaying them changes."""

    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            app.command(entry.name)(entry.load())
        except ModuleNotFoundError as error:
            anything = {"allow_extra_args": True, "ignore_unknown_options": True}
            app.command(entry.name, help=f"Needs {error.name}: {_INSTALL}", context_settings=anything)(_missing(error))
    return app


def main() -> None:
    """Run `r3`."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        sys.exit(f"r3 needs {error.name}, which is not installed: {_INSTALL}")
    app()


def _missing(error: ModuleNotFoundError) -> Callable[[], Any]:
    def command() -> None:
        sys.exit(f"this subcommand needs {error.name}, which is not installed: {_INSTALL}")

    return command
