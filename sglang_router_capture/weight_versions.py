"""Weight versions: which weights compute what runs now, by a number in the tables and a name in the answers."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable


class WeightVersions:
    """Names of weights, the number behind each, and the weights that a pass launched now is computed with.

    The server's own name (`--weight-version`, `/update_weight_version`, the name that an update is given) is taken
    where it says which weights these are. Where it does not, they get a name that is told nowhere else:

    - `<server's name>+<start>.<change>` after an update that nobody named; all ranks that one launcher started, which
      are those of a node, say the same;
    - `<server's name>+<start>.<change>-incomplete-<process>` after an update that failed, which may have changed a part
      of the weights, and between the parts of one update (`begin_weight_update` to `end_weight_update`).

    Any thread may ask for names and numbers; weights change on the scheduler's thread alone.
    """

    def __init__(self, servers_name: Callable[[], str], start: str) -> None:
        """Args:
        servers_name: what the server calls its weights now.
        start: a name of this start of the server that no other has, the same in all processes of one launcher.
        """
        self._servers_name = servers_name
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._process = uuid.uuid4().hex[:12]
        self._start = start
        # The server's name that `_present` was derived from: another one means that the weights were renamed.
        self._heard: str | None = None
        self._present = -1
        self._changes = 0
        self._not_whole = 0
        self._in_parts = False
        self._parts_named = False

    def number(self, name: str) -> int:
        """The number of a name, which may come from storage, and so from another server."""
        with self._lock:
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
            return self._numbers[name]

    def name(self, number: int) -> str:
        """The name behind a number."""
        return self._names[number]

    def __len__(self) -> int:
        """How many names there are."""
        return len(self._names)

    @property
    def present(self) -> int:
        """Number of the weights that a pass launched now is computed with."""
        if not self._in_parts and (said := self._servers_name()) != self._heard:
            self._heard, self._present = said, self.number(said)
        return self._present

    def change(self) -> None:
        """The weights are about to change; unless `changed` follows, nobody can say which they are."""
        self._not_whole += 1
        self._leave_incomplete()

    def changed(self, name: str | None) -> None:
        """The change that began last is whole: the update, or this part of it, is in.

        Args:
            name: that it was given, by which the server calls its weights already; None where it was given none.
        """
        self._not_whole -= 1
        self._parts_named |= name is not None
        if not self._in_parts:
            self._leave_whole(named=name is not None)

    def begin_parts(self) -> None:
        """An update in several parts begins: until it ends the weights are neither the old nor the new ones."""
        self._leave_incomplete()
        self._in_parts, self._parts_named, self._not_whole = True, False, 0

    def end_parts(self) -> None:
        """It ends. The weights are whole if each part is, and named if a part was, or the server was told a name."""
        self._in_parts = False
        if self._not_whole:
            self._leave_incomplete()
        else:
            self._leave_whole(named=self._parts_named or self._servers_name() != self._heard)

    def _leave_whole(self, *, named: bool) -> None:
        said = self._servers_name()
        self._heard, self._not_whole = said, 0
        self._present = self.number(said if named else f"{said}+{self._start}.{self._changes}")

    def _leave_incomplete(self) -> None:
        self._changes += 1
        said = self._servers_name()
        if not self._in_parts:
            self._heard = said
        self._present = self.number(f"{said}+{self._start}.{self._changes}-incomplete-{self._process}")
