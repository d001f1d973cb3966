"""The ledger against the installed SGLang: before anything is hooked, and once SGLang has applied the hooks."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from router_replay.errors import SeamError
from sglang_router_capture.ledger import SEAMS, TESTED_VERSIONS, Seam


def check(seams: tuple[Seam, ...] = SEAMS) -> None:
    """Compare the ledger with the installed SGLang.

    Raises:
        SeamError: naming the first seam that differs, what was expected and what was found.
    """
    for seam in seams:
        try:
            found = _resolve(seam.target)
        except (ImportError, AttributeError) as error:
            raise SeamError(_message(seam, f"nothing of that name ({error})")) from error
        if seam.parameters is None:
            continue
        if owner := _inherited_from(seam):
            raise SeamError(_message(seam, f"nothing of that name but what {owner} bequeaths"))
        names = _parameter_names(found)
        if names != _without_receiver(seam.parameters):
            raise SeamError(_message(seam, f"parameters ({', '.join(names)})"))


def require_applied(hooks: Mapping[str, tuple[Callable[..., Any], str]]) -> None:
    """Raise SeamError unless each hook is in place: SGLang logs and swallows what goes wrong there.

    Args:
        hooks: path below `sglang.srt` to (hook, name of its type), for every hooked seam.
    """
    for seam in SEAMS:
        if seam.hooked and hooks[seam.path][0] not in _held_by_wrappers(pkgutil.resolve_name(seam.target)):
            raise SeamError(_message(seam, "it unhooked: SGLang did not apply the hook, its log above says why"))


def _resolve(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except AttributeError:
        # It hides why a module on the way cannot be imported.
        names = target.split(".")
        for end in range(1, len(names)):
            module = importlib.import_module(".".join(names[:end]))
            if not hasattr(module, "__path__"):
                break
        raise


def _held_by_wrappers(function: Any) -> list[Any]:
    # Asking SGLang's registry is not enough: it knows that a name was hooked, maybe by another plugin alone.
    held = []
    while function is not None:
        held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        function = getattr(function, "__wrapped__", None)
    return held


def _inherited_from(seam: Seam) -> str | None:
    # A method that is gone from its class may still be found in a base class, as a stub.
    owner_path, _, name = seam.target.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    if not isinstance(owner, type) or name in vars(owner):
        return None
    return next((base.__name__ for base in owner.__mro__ if name in vars(base)), None)


def _parameter_names(found: Any) -> tuple[str, ...]:
    return _without_receiver(tuple(inspect.signature(found).parameters))


def _without_receiver(names: tuple[str, ...]) -> tuple[str, ...]:
    # A bound classmethod does not show its receiver, a plain function in a class does.
    return names[1:] if names and names[0] in ("self", "cls") else names


def _message(seam: Seam, found: str) -> str:
    expected = (
        "that name" if seam.parameters is None else f"parameters ({', '.join(_without_receiver(seam.parameters))})"
    )
    return (
        f"router capture cannot hook the installed SGLang {importlib.metadata.version('sglang')}: {seam.target}:"
        f" expected {expected}, found {found}. It is needed to {seam.why}. Tested with SGLang"
        f" {', '.join(TESTED_VERSIONS)}; install one of these, or start the server without router capture."
    )
