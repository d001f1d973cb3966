"""Handles on their way from the scheduler that stores masks to the process that writes the answer.

An answer's tokens go SGLang's way, at once, with a ticket in the place of the handle. The handle follows when the masks
are in the store: a file of the ticket's name, in a folder that the server's processes share, for which whoever writes
the answer waits. So a store that takes its time delays the answer whose masks it takes, and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec

from router_replay.files import write_whole

_TICKET = "ticket"
_LONGEST_WAIT_S = 600.0
# Answers whose clients went away are waited for by nobody, and no other waits for longer than this.
_UNCLAIMED_S = _LONGEST_WAIT_S + 60.0
_SWEEP_S = 60.0
_MOST_BYTES = 4 << 30


class Mailbox:
    """Handles by their tickets.

    Args:
        folder: where they wait, the same in all processes of a server on a node. Whoever starts the server makes it.
        most_bytes: of handles that wait.
    """

    def __init__(self, folder: Path, *, most_bytes: int = _MOST_BYTES) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._swept = time.monotonic()

    def post(self, ticket: dict[str, str], handle: dict[str, Any]) -> None:
        """Give the handle of a ticket, or what stands in its place where the masks were not stored.

        Raises:
            OSError: the folder is gone, full, or cannot be written to.
        """
        if time.monotonic() - self._swept > _SWEEP_S:
            self._swept = time.monotonic()
            self._remove_unclaimed()
        # As SGLang encodes its messages. Of masks that travel in their handle JSON takes forty times as long, in which
        # no other thread of the scheduler's runs.
        data = msgspec.msgpack.encode(handle)
        # Nobody makes it again: a server that stops has removed it for good.
        if not self._folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the server's folder is gone", str(self._folder))
        if self._bytes() + len(data) > self._most_bytes:
            raise OSError(errno.ENOSPC, f"handles of {self._most_bytes:,} bytes wait for their answers")
        write_whole(self._folder / ticket[_TICKET], lambda partial: partial.write_bytes(data))

    def post_nothing(self, ticket: dict[str, str]) -> None:
        """Tell the answer that waits for a ticket that its handle will not come; as far as that can be told."""
        with contextlib.suppress(OSError):
            (self._folder / ticket[_TICKET]).touch()

    async def redeemed(self, handle: dict[str, Any]) -> dict[str, Any]:
        """The handle, or if it is a ticket the handle that was, or will be, posted for it."""
        if _TICKET not in handle:
            return handle
        file = self._folder / handle[_TICKET]
        began = time.monotonic()
        while not file.exists():
            waited = time.monotonic() - began
            if waited > _LONGEST_WAIT_S:
                return no_masks("", f"the store has not answered in {_LONGEST_WAIT_S:.0f} s")
            # Soon for a store that is quick; hundreds that wait for a slow one may not keep the event loop busy.
            await asyncio.sleep(min(0.002 + waited / 10, 0.05))
        # Masks that travel in their handle are megabytes: other answers are not to wait for the disk.
        return await asyncio.to_thread(_read_and_remove, file)

    def _bytes(self) -> int:
        total = 0
        for file in self._folder.iterdir():
            with contextlib.suppress(OSError):
                total += file.stat().st_size
        return total

    def _remove_unclaimed(self) -> None:
        with contextlib.suppress(OSError):
            for file in self._folder.iterdir():
                # It may be claimed just now.
                with contextlib.suppress(OSError):
                    if time.time() - file.stat().st_mtime > _UNCLAIMED_S:
                        file.unlink()


def new_ticket() -> dict[str, str]:
    """A ticket that nobody can guess."""
    return {_TICKET: secrets.token_hex(16)}


def is_ticket(handle: dict[str, Any]) -> bool:
    """Whether the handle itself is still to come."""
    return _TICKET in handle


def no_masks(store: str, reason: str) -> dict[str, Any]:
    """What stands in the place of a handle where masks are not in their store."""
    return {"store": store, "error": reason}


def _read_and_remove(file: Path) -> dict[str, Any]:
    try:
        data = file.read_bytes()
        file.unlink()
        return msgspec.msgpack.decode(data, type=dict[str, Any])
    except (OSError, ValueError, msgspec.DecodeError) as error:
        # One answer of a batch may not take the others with it.
        return no_masks("", f"their handle did not arrive ({error}): see the server's log")
