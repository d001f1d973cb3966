"""The project's command `r3`: a table of subcommands, of which only the one that runs is imported."""

import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from router_replay import __version__

if TYPE_CHECKING:
    import typer

INSTALL = 'pip install "rollout-routing-replay[report]"'


@dataclass(frozen=True)
class Subcommand:
    """One subcommand of `r3`.

    Attributes:
        target: `module:function`, the function with typer's annotations.
        summary: the line in the help of `r3`, where the function is not imported.
        needs: packages beyond this project's dependencies, which `INSTALL` brings.
        takes_any_flag: whether flags that it does not know are arguments of its own.
    """

    target: str
    summary: str
    needs: tuple[str, ...] = ()
    takes_any_flag: bool = False


SUBCOMMANDS = {
    "doctor": Subcommand(
        "router_replay_cli.doctor:doctor",
        "Say what is installed here, whether it fits, and what a server would be refused for.",
        ("rich",),
        takes_any_flag=True,
    ),
    "inspect": Subcommand(
        "router_replay_cli.inspect_files:inspect",
        "Show what files of routing masks hold.",
    ),
    "report": Subcommand(
        "router_replay_cli.report:report",
        "Write one HTML page about how far rollout and trainer are apart in a run.",
        ("matplotlib", "rich"),
    ),
}


def build_app(arguments: Sequence[str]) -> "typer.Typer":
    """The command, in which the subcommand that `arguments` name is whole and the others have a name and a summary.

    A subcommand that lacks a package is there and says so.

    Raises:
        ModuleNotFoundError: typer is not installed.
    """
    import typer

    # Without rich's markup, which would take the brackets of an extra's name for a style.
    app = typer.Typer(
        name="r3", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
    )

    def print_version(asked: bool) -> None:
        if asked:
            typer.echo(__version__)
            raise typer.Exit

    version_option = typer.Option(
        "--version", help="Show the version and leave.", callback=print_version, is_eager=True
    )

    @app.callback(epilog=f"What draws needs an extra: {INSTALL}")
    def r3(version: Annotated[bool, version_option] = False) -> None:
        """Rollout routing replay: tools for the routes that a rollout took, and for what replaying them changes."""

    asked = next((each for each in arguments if not each.startswith("-")), None)
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name, subcommand in SUBCOMMANDS.items():
        try:
            _require(subcommand.needs)
            if name == asked:
                settings = {"ignore_unknown_options": True} if subcommand.takes_any_flag else None
                app.command(name, context_settings=settings)(pkgutil.resolve_name(subcommand.target))
            else:
                app.command(name, short_help=subcommand.summary)(_nothing)
        except ModuleNotFoundError as error:
            summary = f"{subcommand.summary} Needs {error.name}: {INSTALL}"
            app.command(name, short_help=summary, context_settings=anything)(_refusal(error))
    return app


def main() -> None:
    """Run the subcommand of `r3` that this process was started with."""
    try:
        app = build_app(sys.argv[1:])
    except ModuleNotFoundError as error:
        sys.exit(f"r3 needs {error.name}, which is not installed: {INSTALL}")
    app()


def _require(packages: Sequence[str]) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _nothing() -> None: ...


def _refusal(error: ModuleNotFoundError) -> Callable[[], Any]:
    def command() -> None:
        sys.exit(f"this subcommand needs {error.name}, which is not installed: {INSTALL}")

    return command
