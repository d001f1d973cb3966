"""Hooks and the functions that they stand around, by SGLang's own wrappers; nothing of the ledger is loaded for it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

PREFIX = "sglang.srt."
"""Of every dotted path below."""

Hook = tuple[Callable[..., Any], str]
"""A function and the name of its type in SGLang's `HookType`."""


def not_in_place(hooks: Mapping[str, Hook]) -> dict[str, Hook]:
    """Those of `hooks`, by full dotted path, that do not stand around the function at their path.

    Asking SGLang's registry is not enough: it knows that a name was hooked, maybe by another plugin alone.
    """
    return {path: hook for path, hook in hooks.items() if hook[0] not in _held(pkgutil.resolve_name(path))}


def apply(hooks: Mapping[str, Hook]) -> None:
    """Put hooks, by full dotted path, in place in this process; those that are there stay as they are.

    SGLang's registry would skip a name that another plugin hooked before, and log and swallow what goes wrong.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource("router_capture", None)
    for path, (hook, kind) in not_in_place(hooks).items():
        HookRegistry._apply_target(path, [(HookType[kind], hook, source)])


def _held(function: Any) -> list[Any]:
    held = []
    while function is not None:
        held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        function = getattr(function, "__wrapped__", None)
    return held
