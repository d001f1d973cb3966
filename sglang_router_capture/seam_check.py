"""The ledger against the installed SGLang: before anything is hooked, and once SGLang has applied the hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from router_replay.errors import SeamError
from router_replay.upstream import Installed, Ledger, Problem, Seam, message, require
from router_replay.upstream.check import path_in
from router_replay.upstream.installed import resolve
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
    """Raise SeamError unless each hook is in place: SGLang logs and swallows what goes wrong there.

    Args:
        hooks: row's name to (hook, name of its type), for every hooked row of the ledger.
    """
    problems = []
    for name, (hook, _) in hooks.items():
        seam = LEDGER.seam(name)
        path = path_here(seam)
        if path is not None and hook not in _held_by_wrappers(resolve(path)):
            found = "a function that is not, since SGLang did not apply the hook (its log above says why)"
            problems.append(Problem(seam, path, "a hooked function", found))
    if problems:
        raise SeamError(message(LEDGER, Installed(LEDGER.distribution).release, problems))


def _held_by_wrappers(function: Any) -> list[Any]:
    # Asking SGLang's registry is not enough: it knows that a name was hooked, maybe by another plugin alone.
    held = []
    while function is not None:
        held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        function = getattr(function, "__wrapped__", None)
    return held
