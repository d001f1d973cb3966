"""What `r3 doctor --stack` says: what there is of a stack, and what it still has to be told."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from router_replay_cli.ledgers import print_ledger

if TYPE_CHECKING:
    from rich.console import Console

    from router_replay_adapters.stacks import Stack


def print_stack(
    console: Console, stack: Stack, arguments: Sequence[str], environ: Mapping[str, str] = os.environ
) -> bool:
    """Tell what there is of a stack, whether its adapter fits, and what it still has to be told.

    Args:
        arguments: of the stack's command; none where it is not known.

    Returns:
        Whether nothing is missing.
    """
    console.print(f"\nThe stack {stack.title}", style="bold")
    fits = [_print_package(console, stack)]
    if stack.adapter is None or importlib.util.find_spec(stack.adapter) is None:
        console.print("  [red]no adapter[/]:", end=" ")
        console.print(stack.remark or f"{stack.adapter} is not in this installation", markup=False)
        return False
    if fits == [True]:
        fits += [_print_names(console, name) for name in stack.ledgers]
    fits += [_print_variables(console, stack, environ), _print_arguments(console, stack, arguments)]
    if stack.remark:
        console.print(f"  {stack.remark}", markup=False)
    return all(fits)


def _print_names(console: Console, ledger: str) -> bool:
    from router_replay.errors import SeamError

    # An adapter that wraps names behind their import raises there.
    try:
        return print_ledger(console, pkgutil.resolve_name(ledger), released=False)
    except (SeamError, ImportError) as error:
        console.print("  [red]does not fit[/]:", end=" ")
        console.print(str(error), markup=False)
        return False


def _print_package(console: Console, stack: Stack) -> bool:
    if importlib.util.find_spec(stack.package) is None:
        console.print(f"  [red]not here[/]: there is no package {stack.package} to import")
        return False
    found = stack.installed()
    console.print(f"  {stack.package}, {'of an unknown release' if found is None else ' '.join(found)}")
    return True


def _print_variables(console: Console, stack: Stack, environ: Mapping[str, str]) -> bool:
    from router_replay.errors import InputError

    try:
        to_set = stack.variables_to_set(environ)
    except InputError as error:
        console.print("  [red]wrong[/]:", end=" ")
        console.print(str(error), markup=False)
        return False
    for name, value in {**stack.variables, **to_set}.items():
        if name in to_set:
            console.print(f"  [red]to set[/] {name}={value}, in Ray's runtime_env: every process of a job needs it")
        else:
            console.print(f"  [green]set[/] {name}={environ[name]}")
    return not to_set


def _print_arguments(console: Console, stack: Stack, given: Sequence[str]) -> bool:
    to_give = stack.arguments_to_give(given)
    for argument in stack.arguments:
        if argument not in to_give:
            console.print(f"  [green]given[/] {argument}")
        else:
            # Whoever asks without a command line asks what belongs into it.
            console.print(f"  [red]to give[/] {argument}" if given else f"  to give: {argument}")
    to_take_away = stack.arguments_to_take_away(given)
    for argument in to_take_away:
        console.print(f"  [red]to take away[/] {argument}, with which {stack.title} never loads the adapter")
    return not (given and to_give) and not to_take_away
