"""The registry of hooks: each stands below the seam that it hooks, and nothing else lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_Hook = TypeVar("_Hook", bound=Callable[..., Any])

HOOKS: dict[str, tuple[Callable[..., Any], str]] = {}
"""Row's name in the ledger to (hook, name of its type in SGLang's `HookType`). Filled when the hooks are imported."""


def hook(seam: str, kind: str) -> Callable[[_Hook], _Hook]:
    """Register a function as the hook of a row of the ledger, by the row's name. SGLang gives its calling convention.

    Args:
        kind: 'BEFORE', 'AFTER' or 'AROUND'.

    Raises:
        ValueError: the row has a hook already.
    """

    def register(function: _Hook) -> _Hook:
        if seam in HOOKS:
            raise ValueError(f"{seam} is hooked by {HOOKS[seam][0].__name__} already")
        HOOKS[seam] = function, kind
        return function

    return register
