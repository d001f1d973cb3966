"""The directory store: a container a sequence, in a folder or under the prefix of an object store, by fsspec."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from router_replay.errors import InputError, RouterReplayError, StoreError
from router_replay.masks import container
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores import handles
from router_replay.masks.stores.bound import require_fits, tell_dropped
from router_replay.masks.stores.handles import Entry, entry_of
from router_replay.masks.stores.store import Handle, Stat, Store
from router_replay.masks.stores.urls import num_bytes, split_url

DEFAULT_MAX_BYTES = 64 * 2**30
"""Rows of 4,096 rollouts of 32k tokens of DeepSeek-V3 are 48 GB."""

# Where a file is there whole or not at all by itself, and a rename would be a second transfer.
_ATOMIC_PUT = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "obs", "memory"}
_FILE = re.compile(rf"({handles.ID})\.(safetensors|partial)")
# What a writer leaves that is killed in the middle of a file; no transfer takes so long.
_PARTIAL_SECONDS = 3600
# Full as soon as this share more was written since the last look at what is there, and emptied by as much.
_STEP = 16


class DirectoryStore(Store):
    """Keeps each sequence's container as a file of its own: `file:///dev/shm/r3`, `s3://bucket/prefix`, any of fsspec.

    **Whole**: a file is written under a temporary name and renamed; object stores put it whole by themselves. Its
    handle exists only afterwards, and holds the container's checksum.

    **Bounded**: `?max_bytes=64GiB` bounds the files of the place, whoever wrote them. What a trainer has read it
    deletes: `get` marks nothing, and what is there is taken for unread. A writer that finds the place full removes the
    oldest files, by the time in their ids, until a sixteenth of the bound is free: `num_dropped` counts them, and a
    line of the log says so. Files of writers that are gone are the oldest, and go first. A writer looks again at what
    is there after each sixteenth of the bound that it wrote, so that n writers to one place exceed its bound by at most
    n - 1 sixteenths. Without the option it is 64 GiB, on a local file system half of what is free, if that is less.

    **Local**: the rows of `get` are the file's pages, mapped privately; they stay when the file is deleted.

    Args:
        url: options are `max_bytes` and, of s3:, `endpoint_url`. Everything else is fsspec's to configure, in both
            processes: environment (`FSSPEC_S3_KEY`, `AWS_ACCESS_KEY_ID`) or the files of `FSSPEC_CONFIG_DIR`; no
            credentials stand in URLs, and none travel in handles.

    Attributes:
        url: as it stands in handles, without `max_bytes`.
        num_dropped: sequences that this writer removed to make room.

    Raises:
        InputError: a URL of no folder or with other options, or one whose package for fsspec is not installed.
    """

    def __init__(self, url: str) -> None:
        scheme = url.partition(":")[0]
        endpoint = {"endpoint_url"} if scheme in ("s3", "s3a") else set()
        place, options = split_url(url, {"max_bytes"} | endpoint)
        self._max_bytes = num_bytes(options.pop("max_bytes")) if "max_bytes" in options else None
        if "::" in place or "://" not in place:
            raise InputError(f"store URL {place!r}: the folder of a store is named as {scheme}://...")
        from fsspec.core import url_to_fs

        try:
            self._fs, root = url_to_fs(place, **options)
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise InputError(f"fsspec opens no file system for the store URL {place!r}: {error}") from error
        self._root = root.rstrip("/")
        if not self._root:
            raise InputError(f"store URL {place!r} names no folder")
        self._local = scheme in ("file", "local")
        if self._local:
            self._root = os.path.abspath(self._root)
        self._atomic = scheme in _ATOMIC_PUT
        self.url = f"file://{self._root}" if self._local else place.rstrip("/")
        if endpoint and "endpoint_url" in options:
            self.url += f"?endpoint_url={options['endpoint_url']}"
        self.num_dropped = 0
        self._lock = threading.Lock()
        # How much may be written before the next look at what is there.
        self._unlooked = 0

    def prepare(self) -> None:
        """Make the folder, write a file, read it and remove it, and see that there is room for `max_bytes`.

        Raises:
            StoreError: one of these fails.
        """
        probe, data = handles.new_id(), bytes(2**16)
        with self._reaching("is not to be written"):
            self._make_folder()
            self._write(probe, data)
            found = self._fs.cat_file(self._path(probe))
            self._fs.rm_file(self._path(probe))
            available = self._available()
        if found != data:
            raise StoreError(f"the store {self.url!r} gives back other bytes than were written")
        if self._max_bytes and available is not None and self._max_bytes > available:
            raise StoreError(
                f"the store {self.url!r} is to hold up to {self._max_bytes:,} bytes (max_bytes), but its file system"
                f" has room for {available:,}: free some, or give it a smaller max_bytes"
            )

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        """Write masks into a file of their own, and give its handle.

        Raises:
            InputError: no masks.
            StoreError: larger than the whole store, or the file cannot be written.
        """
        data = container.to_bytes(masks)
        entry = Entry.new(data, masks)
        with self._reaching("could not keep masks"):
            with self._lock:
                self._make_room(len(data))
            self._write(entry.id, data)
        return entry.handle(self.url)

    def get(self, handle: Handle) -> RoutingMasks:
        """The masks in the handle's file, mapped where it is local.

        Raises:
            DataError: not a handle of this store, no such file any more, or one that is not whole or another's.
            StoreError: the file cannot be read now.
        """
        entry = entry_of(handle, self.url)
        path = self._path(entry.id)
        with self._reaching("could not be read"):
            try:
                if self._local:
                    return container.map_file(Path(path), entry.crc32)
                return container.from_bytes(self._fs.cat_file(path), entry.crc32)
            except FileNotFoundError:
                if self._local and not os.path.isdir(self._root):
                    raise StoreError(
                        f"the store {self.url!r} is not on this machine: a handle of a local folder is for processes"
                        " beside the server that wrote there; others need a shared file system, or another store"
                    ) from None
                raise handles.gone(entry, self.url) from None

    def delete(self, handle: Handle) -> None:
        """Remove the handle's file, if it is there."""
        self.remove(entry_of(handle, self.url).id)

    def stat(self, handle: Handle) -> Stat:
        """Whether the handle's file is there, of the size that was written; what is in it is not read."""
        entry = entry_of(handle, self.url)
        size = self.size(entry.id)
        return Stat(there=False) if size is None else entry.stat(size, self.url)

    def close(self) -> None:
        """Nothing is open."""

    def size(self, entry_id: str) -> int | None:
        """Bytes of an entry's file; None where there is none."""
        with self._reaching("could not be read"):
            self._fs.invalidate_cache()
            try:
                return int(self._fs.info(self._path(entry_id))["size"])
            except FileNotFoundError:
                return None

    def read(self, entry_id: str, start: int, end: int) -> bytes | None:
        """Bytes [start, end) of an entry's file; None where there is none."""
        with self._reaching("could not be read"):
            try:
                return bytes(self._fs.cat_file(self._path(entry_id), start, end)) if start < end else b""
            except FileNotFoundError:
                return None

    def remove(self, entry_id: str) -> bool:
        """Remove an entry's file; whether it was there, as far as the file system says."""
        return self._remove(self._path(entry_id))

    def _path(self, entry_id: str, suffix: str = "safetensors") -> str:
        return f"{self._root}/{entry_id}.{suffix}"

    def _write(self, entry_id: str, data: bytes) -> None:
        path, partial = self._path(entry_id), self._path(entry_id, "partial")
        written = path if self._atomic else partial
        try:
            self._fs.pipe_file(written, data)
            if not self._atomic:
                self._fs.mv(partial, path)
        except BaseException:
            # What failed says why; that there is nothing to clean up, or no way to, says nothing.
            with suppress(Exception):
                self._fs.rm_file(written)
            raise

    def _remove(self, path: str) -> bool:
        with self._reaching("could not remove a file"):
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                return False
        return True

    def _files(self) -> list[tuple[str, str, int]]:
        """Id, path and size of every file of a store in the folder, the oldest first."""
        self._fs.invalidate_cache()
        try:
            listed = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            # A prefix under which nothing is.
            return []
        named = ((_FILE.fullmatch(each["name"].rpartition("/")[2]), each) for each in listed)
        return sorted((name[1], each["name"], int(each["size"])) for name, each in named if name)

    def _make_room(self, size: int) -> None:
        if size <= self._unlooked:
            self._unlooked -= size
            return
        self._make_folder()
        files = self._files()
        total, bound = sum(size for *_, size in files), self._bound()
        require_fits(self.url, size, bound)
        too_old, dropped = time.time_ns() - _PARTIAL_SECONDS * 10**9, 0
        full = total + size > bound
        for entry_id, path, file_size in files:
            stale = path.endswith(".partial") and int(entry_id[:16], 16) < too_old
            if stale or (full and total + size > bound - bound // _STEP):
                dropped += self._remove(path) and not stale
                total -= file_size
        if dropped:
            self.num_dropped += dropped
            tell_dropped(self.url, bound, dropped, self.num_dropped)
        self._unlooked = max(min(bound - total, bound // _STEP) - size, 0)

    def _make_folder(self) -> None:
        # Object stores have none; of a bucket that is not there one would be made.
        if not self._atomic:
            self._fs.makedirs(self._root, exist_ok=True)

    def _bound(self) -> int:
        if self._max_bytes is None:
            available = self._available()
            self._max_bytes = DEFAULT_MAX_BYTES if available is None else min(DEFAULT_MAX_BYTES, available // 2)
        return self._max_bytes

    def _available(self) -> int | None:
        """Bytes that the store has or could have on its file system, as far as one can tell."""
        if not self._local:
            return None
        return shutil.disk_usage(self._root).free + sum(size for *_, size in self._files())

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except RouterReplayError:
            raise
        except Exception as error:
            # Every file system of fsspec has exceptions of its own.
            raise StoreError(f"the store {self.url!r} {what}: {type(error).__name__}: {error}") from error
