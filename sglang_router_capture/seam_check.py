"""The ledger against the installed SGLang: before anything is hooked, and once the hooks are in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from router_replay.errors import SeamError
from router_replay.upstream import Installed, Ledger, Problem, Seam, message, require
from router_replay.upstream.check import path_in
from sglang_router_capture import wrappers
from sglang_router_capture.ledger import LEDGER


def check(ledger: Ledger = LEDGER) -> None:
    """Compare a ledger with the installed SGLang.

    Raises:
        SeamError: naming everything that differs, what was expected and what was found.
    """
    require(ledger)


def path_here(seam: Seam) -> str | None:
    """Full dotted path of a row in the installed SGLang, which the ledger fits; None where it needs none."""
    return path_in(LEDGER, seam, Installed(LEDGER.distribution))


def targets(hooks: Mapping[str, tuple[Callable[..., Any], str]]) -> dict[str, tuple[Callable[..., Any], str]]:
    """Hooks by the full dotted path at which the installed SGLang has their seam.

    Args:
        hooks: row's name to (hook, name of its type), for every hooked row of the ledger.
    """
    paths = {name: path_here(LEDGER.seam(name)) for name in hooks}
    return {path: hooks[name] for name, path in paths.items() if path is not None}


def require_applied(hooks: Mapping[str, tuple[Callable[..., Any], str]]) -> None:
    """Raise SeamError unless each hook is in place: another plugin may have put something else there since.

    Args:
        hooks: row's name to (hook, name of its type), for every hooked row of the ledger.
    """
    names = {path_here(LEDGER.seam(name)): name for name in hooks}
    problems = [
        Problem(LEDGER.seam(names[path]), path, "a hooked function", "a function that is not")
        for path in wrappers.not_in_place(targets(hooks))
    ]
    if problems:
        raise SeamError(message(LEDGER, Installed(LEDGER.distribution).release, problems))
