"""The folder of one start of a server on one node, in memory where there is such a place; gone when the server is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from router_replay.errors import InputError

_PREFIX = "router-capture-"
_LOCK = "lock"
_LEAST_MEMORY = 1 << 30


class ServerFolder:
    """What the processes of a server on one node share.

    Args:
        start: the name of the server's start, which all its processes know.
        parent: where the folder is.

    Attributes:
        path: the folder.
    """

    def __init__(self, start: str, parent: Path | None = None) -> None:
        self.path = (_memory() if parent is None else parent) / f"{_PREFIX}{start}"
        self._lock: int | None = None

    @property
    def handles(self) -> Path:
        """Where handles wait for their answers."""
        return self.path / "handles"

    @property
    def masks(self) -> Path:
        """Where masks lie that the server serves itself."""
        return self.path / "masks"

    def open(self) -> None:
        """Make the folder, which nobody else may read, and remove those of servers that were killed.

        The process that starts the others calls it, and its life is the folder's: it holds a lock that ends with it.

        Raises:
            InputError: the folder cannot be made.
        """
        # Locked before it has its name, by which others look for folders that nobody holds.
        unnamed = self.path.with_name(f".{self.path.name}")
        try:
            unnamed.mkdir(mode=0o700)
            self._lock = os.open(unnamed / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (unnamed / self.handles.name).mkdir()
            (unnamed / self.masks.name).mkdir()
            unnamed.rename(self.path)
        except OSError as error:
            shutil.rmtree(unnamed, ignore_errors=True)
            self._unlock()
            raise InputError(f"{self.path}, which this server's processes share, cannot be made: {error}") from error
        _opened.append(self)
        for other in self.path.parent.glob(f"{_PREFIX}*/{_LOCK}"):
            if other.parent != self.path:
                _remove_if_left(other)

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


_opened: list[ServerFolder] = []


def close_opened() -> None:
    """Remove the folders of all servers that this process started."""
    while _opened:
        _opened.pop().close()


def _remove_if_left(lock: Path) -> None:
    # Other servers may look at the same time, and other users' folders are not ours to open.
    with contextlib.suppress(OSError):
        opened = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(opened)


@cache
def _memory() -> Path:
    # Containers have 64 MiB of it unless they are told otherwise, and one answer's masks may be a quarter of that.
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).total >= _LEAST_MEMORY
    return shared if roomy else Path(tempfile.gettempdir())
