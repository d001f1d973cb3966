"""Settings of an upstream under which routes could be wrong, as rows that both ends write in one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from router_replay.errors import SeamError, UnsupportedError
from router_replay.upstream.check import message
from router_replay.upstream.installed import Installed
from router_replay.upstream.reader import Reader
from router_replay.upstream.seam import Ledger, in_range


@dataclass(frozen=True)
class Refusal:
    """One setting, and the values of it that are accepted.

    Attributes:
        feature: what the setting turns on, in a few words that can stand after 'refuses', as a table of what is
            supported names it.
        path: dotted path below the ledger's prefix of the field of upstream's configuration.
        accepts: whether a value is accepted.
        reason: a clause: what would go wrong with any other value.
        way_out: a clause in the imperative.
        flag: what a user calls the setting; the field's own name where it is empty.
        only_with: other fields of the same configuration; values are refused only where one of these is on.
        releases: PEP 440 range of the releases that have the field; all where it is empty.
    """

    feature: str
    path: str
    accepts: Callable[[Any], bool]
    reason: str
    way_out: str
    flag: str = ""
    only_with: tuple[str, ...] = ()
    releases: str = ""

    @property
    def owner(self) -> str:
        """Class that declares the field, as a dotted path below the prefix."""
        return self.path.rpartition(".")[0]

    @property
    def setting(self) -> str:
        """Name of the field."""
        return self.path.rpartition(".")[2]

    def expected_in(self, release: str | None) -> bool:
        """Whether a release must have the field; of an unknown one only what no range limits is expected."""
        found = in_range(self.releases, release)
        return not self.releases if found is None else found

    def judged_in(self, release: str | None, config: Any) -> bool:
        """Whether a configuration's value counts: in the row's releases, and in unknown ones that have the fields."""
        found = in_range(self.releases, release)
        return all(hasattr(config, name) for name in (self.setting, *self.only_with)) if found is None else found


def refuse(ledger: Ledger, rows: Sequence[Refusal], config: Any) -> None:
    """Refuse a configuration in which a row's setting has a value that is not accepted.

    Args:
        ledger: of the upstream that `config` belongs to; the installed release decides which rows hold.
        config: upstream's live configuration, with a field for every row's setting.

    Raises:
        UnsupportedError: naming the setting, its value, the reason and the way out.
        SeamError: naming the settings that the installed release no longer has: one that is gone would pass for one
            that is off.
    """
    release = Installed(ledger.distribution).release
    gone = [
        _gone(ledger, row, name)
        for row in rows
        if row.expected_in(release)
        for name in (row.setting, *row.only_with)
        if not hasattr(config, name)
    ]
    if gone:
        raise SeamError(message(ledger, release, gone))
    for row in rows:
        if not row.judged_in(release, config):
            continue
        value = getattr(config, row.setting)
        others = [(name, getattr(config, name)) for name in row.only_with]
        on = [f"{name} {other!r}" for name, other in others if other]
        if row.accepts(value) or (others and not on):
            continue
        joint = f" with {' and '.join(on)}" if on else ""
        raise UnsupportedError(
            f"{ledger.subject} cannot run where {row.flag or row.setting} is {value!r}{joint}: {row.reason};"
            f" {row.way_out}"
        )


def check_settings(ledger: Ledger, rows: Sequence[Refusal], reader: Reader) -> list[str]:
    """A sentence for every row whose setting a release does not declare, in the table's order."""
    return [
        _gone(ledger, row, name)
        for row in rows
        if row.expected_in(reader.release)
        for name in (row.setting, *row.only_with)
        if not _declared(ledger, row, name, reader)
    ]


def _declared(ledger: Ledger, row: Refusal, name: str, reader: Reader) -> bool:
    try:
        return reader.has_field(ledger.prefix + row.owner, name)
    except LookupError:
        return False


def _gone(ledger: Ledger, row: Refusal, name: str) -> str:
    return (
        f"{ledger.prefix}{row.owner}: expected a setting {name!r}, found none. It is read to refuse {row.feature} and"
        f" needed because {row.reason}."
    )
