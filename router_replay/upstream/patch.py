"""A patch: what puts a wrapper of ours around one upstream name, and takes it out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router_replay.upstream.check import path_in, require
from router_replay.upstream.installed import Installed, resolve
from router_replay.upstream.seam import Ledger

Function = Callable[..., Any]


class Patch:
    """Wraps a function of a module, or a static method of a class, while somebody needs it.

    `apply` and `remove` count their callers; the first puts the wrapper in, the last takes it out. What others wrapped
    around it in the meantime stays: ours is then left below theirs, and the next `apply` finds it there. So a wrapper
    has to pass its calls through when nobody needs it.
    """

    def __init__(self, ledger: Ledger, seam: str, wrap: Callable[[Function], Function]) -> None:
        self._ledger = ledger
        self._seam = ledger.seam(seam)
        self._wrap = wrap
        self._users = 0
        self._owner: Any = None
        self._name = ""
        self._original: Any = None
        self._wrapper: Any = None

    def apply(self) -> None:
        """Put the wrapper in, unless it is there already.

        Raises:
            SeamError: the installed release does not fit the ledger.
        """
        if self._users == 0 and not self._left_in():
            self._put_in()
        self._users += 1

    def remove(self) -> None:
        """Take the wrapper out once nobody needs it; does nothing where it was never applied."""
        if self._users == 0:
            return
        self._users -= 1
        if self._users == 0 and vars(self._owner)[self._name] is self._wrapper:
            setattr(self._owner, self._name, self._original)
            self._owner = self._original = self._wrapper = None

    def __enter__(self) -> Patch:
        self.apply()
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def _left_in(self) -> bool:
        # It is what is there, or below it; unless somebody put the original back.
        return self._owner is not None and vars(self._owner)[self._name] is not self._original

    def _put_in(self) -> None:
        require(self._ledger)
        path = path_in(self._ledger, self._seam, Installed(self._ledger.distribution))
        assert path is not None, f"the ledger does not expect {self._seam.name} in this release"
        owner, _, self._name = path.rpartition(".")
        self._owner = resolve(owner)
        self._original = vars(self._owner)[self._name]
        if isinstance(self._original, staticmethod):
            self._wrapper = staticmethod(self._wrap(self._original.__func__))
        else:
            self._wrapper = self._wrap(self._original)
        setattr(self._owner, self._name, self._wrapper)
