"""What the handles of stores that keep containers by id hold, and how an id looks."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from router_replay.errors import DataError
from router_replay.masks.container import stated_crc32
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores.store import Handle, Stat

ID = r"[0-9a-f]{48}"
"""An id: 16 digits of the nanosecond in which it was made, so that ids sort by age on every file system, and 32 that
nobody can guess. Whatever else a handle says, no such name leads out of a folder."""


@dataclass(frozen=True)
class Entry:
    """A container in a store, as a handle names it.

    Attributes:
        id: its name in the store.
        num_bytes: size of the container.
        start: position in its sequence of the first row in it.
        num_tokens: rows in it, valid or not.
        crc32: the checksum that the container states, by which another one in its place is told from it.
    """

    id: str
    num_bytes: int
    start: int
    num_tokens: int
    crc32: str

    @classmethod
    def new(cls, data: bytes, masks: RoutingMasks) -> Entry:
        """An entry with a new id for masks and the bytes of their container."""
        return cls(new_id(), len(data), **place_of(masks), crc32=stated_crc32(data))

    def handle(self, url: str) -> dict[str, Any]:
        """The handle of this entry in the store at `url`, in plain JSON types."""
        return {"store": url, **asdict(self)}

    def stat(self, num_bytes: int, url: str) -> Stat:
        """What is behind the handle, of which the store says that it has so many bytes.

        Raises:
            DataError: it has not as many as were put.
        """
        if num_bytes != self.num_bytes:
            raise DataError(
                f"{self.id} in the store {url!r} has {num_bytes:,} bytes, but {self.num_bytes:,} were put: truncated,"
                " or replaced"
            )
        return Stat(there=True, num_bytes=num_bytes, num_tokens=self.num_tokens)


def place_of(masks: RoutingMasks) -> dict[str, int]:
    """Where in their sequence masks have rows, for who has the handle alone: `start` and `num_tokens`."""
    return {"start": masks.start, "num_tokens": len(masks)}


def entry_of(handle: Handle, url: str) -> Entry:
    """What a handle of the store at `url` names.

    Raises:
        DataError: no handle, one of another store, or one without a right id, sizes and checksum.
    """
    require_store(handle, url)
    try:
        entry = Entry(**{key: value for key, value in handle.items() if key != "store"})
    except TypeError as error:
        raise DataError(f"a handle of {url!r} that lacks a field, or has another: {str(handle)[:200]!r}") from error
    if not is_id(entry.id) or not isinstance(entry.crc32, str):
        raise DataError(f"a handle of {url!r} whose id or crc32 none of its stores gave: {str(handle)[:200]!r}")
    if any(type(number) is not int or number < 0 for number in (entry.num_bytes, entry.start, entry.num_tokens)):
        raise DataError(f"a handle of {url!r} whose num_bytes, start or num_tokens is no size: {str(handle)[:200]!r}")
    return entry


def require_store(handle: Handle, url: str) -> None:
    """Raise DataError unless this is a handle of the store at `url`."""
    if not isinstance(handle, Mapping) or handle.get("store") != url:
        raise DataError(f"not a handle of the store {url!r}: {str(handle)[:80]!r}; load(handle) finds a handle's own")


def new_id() -> str:
    """An id that no other entry of any store has."""
    return f"{time.time_ns():016x}{secrets.token_hex(16)}"


def is_id(value: object) -> bool:
    """Whether a value can be the id of an entry."""
    return isinstance(value, str) and re.fullmatch(ID, value) is not None


def gone(entry: Entry, url: str) -> DataError:
    """The error of a handle behind which nothing is any more."""
    return DataError(
        f"nothing is behind {entry.id} in the store {url!r} any more: it was deleted, or dropped as the oldest when the"
        " store was full (max_bytes)"
    )
