"""Wrappers of ours around names of a package that nobody has imported yet, put in when somebody imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from wrapt import when_imported

from router_replay.errors import SeamError
from router_replay.upstream import Ledger, Patch, require

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def wrap_on_import(ledger: Ledger, module: str, wraps: Mapping[str, Wrap], told: Callable[[str], None]) -> None:
    """Check a module against its ledger and wrap names of it, right behind its import; now where that is over.

    Whoever imports the module gets what the check raises, each time. It loads nothing earlier than it would be loaded.

    Args:
        ledger: of names of that module and of no other, since a check imports the modules of all of its names.
        module: full dotted name.
        wraps: by the name of the ledger's row.
        told: is called with the module's name afterwards.

    Raises:
        SeamError: of the import, where the installed release does not fit the ledger.
    """
    patches = [Patch(ledger, seam, wrap) for seam, wrap in wraps.items()]

    @when_imported(module)
    def imported(_: object) -> None:
        try:
            require(ledger)
        except SeamError:
            # wrapt forgets a hook when it calls it: whoever tried again would get the module as it is.
            sys.modules.pop(module, None)
            when_imported(module)(imported)
            raise
        for patch in patches:
            patch.apply()
        told(module)
