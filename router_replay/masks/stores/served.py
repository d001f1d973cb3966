"""The server's side of the HTTP store: a directory store on its node, whose files it serves by their ids."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from router_replay.errors import InputError
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.handles import is_id, require_store
from router_replay.masks.stores.store import Handle, Stat, Store
from router_replay.masks.stores.urls import split_url

ROUTE = "/router_capture/masks/"
"""Path under a server's URL, in front of an id."""

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Response:
    """What a framework is to answer.

    Attributes:
        status: HTTP's status code.
        headers: those that say what the body is; a framework adds Content-Length where it is not there.
        body: empty for HEAD.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class ServedDirectory(Store):
    """A directory store whose handles name a server's URL, from which trainers get the masks by HTTP.

    Every process of the server makes one from the same two URLs: those that record call `put`, and the one that has the
    HTTP routes calls `respond`. Access is the server's to guard: the ids cannot be guessed, but whoever has a handle
    may get and delete what it names.

    Args:
        url: at which trainers reach the server, `http://host:port`.
        directory: where the containers lie, on the node of the server.

    Attributes:
        url: as it stands in handles.
        directory: as it was given.

    Raises:
        InputError: a URL of another scheme, without a host or with options.
    """

    def __init__(self, url: str, directory: DirectoryStore) -> None:
        self.url = server_url(url)
        self.directory = directory

    @property
    def num_dropped(self) -> int:
        """Sequences that this writer removed to make room."""
        return self.directory.num_dropped

    def prepare(self) -> None:
        """Prepare the directory."""
        self.directory.prepare()

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        """Write masks into the directory, and give a handle that names the server."""
        return {**self.directory.put(masks), "store": self.url}

    def get(self, handle: Handle) -> RoutingMasks:
        """The masks of a handle, from the directory."""
        return self.directory.get(self._inside(handle))

    def delete(self, handle: Handle) -> None:
        """Remove the handle's file, if it is there."""
        self.directory.delete(self._inside(handle))

    def stat(self, handle: Handle) -> Stat:
        """Whether the handle's file is there."""
        return self.directory.stat(self._inside(handle))

    def close(self) -> None:
        """Close the directory."""
        self.directory.close()

    def respond(self, method: str, entry_id: str, range_header: str | None = None) -> Response:
        """The answer to a request for `ROUTE` + `entry_id`. It reads a file, so no event loop should wait for it.

        GET gives the container (200), or the part that a single range asks for (206, or 416 where it lies outside of
        it); HEAD the same without the body; DELETE removes it (204, also where it was gone). An id of another form, or
        one behind which nothing is, is 404, and another method 405.

        Raises:
            StoreError: the directory cannot be read now, or is read-only.
        """
        if method not in ("GET", "HEAD", "DELETE"):
            return Response(405, {"Allow": "GET, HEAD, DELETE"})
        if not is_id(entry_id):
            return Response(404)
        if method == "DELETE":
            self.directory.remove(entry_id)
            return Response(204)
        size = self.directory.size(entry_id)
        if size is None:
            return Response(404)
        part = _part(range_header, size)
        if part is None:
            return Response(416, {"Content-Range": f"bytes */{size}"})
        start, end = part
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        headers["Content-Length"] = str(end - start)
        whole = (start, end) == (0, size)
        if not whole:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        body = b"" if method == "HEAD" else self.directory.read(entry_id, start, end)
        # Deleted since its size was asked.
        return Response(404) if body is None else Response(200 if whole else 206, headers, body)

    def _inside(self, handle: Handle) -> dict[str, Any]:
        require_store(handle, self.url)
        return {**handle, "store": self.directory.url}


def server_url(url: str) -> str:
    """The URL of a server as it stands in handles.

    Raises:
        InputError: another scheme, no host, or options.
    """
    place, _ = split_url(url, ())
    if not re.fullmatch(r"https?://[^/?#\s@]+(/[^?#\s]*)?", place):
        raise InputError(f"{place!r} is not the URL of a server: http://host:port, without a user's name and password")
    return place.rstrip("/")


def _part(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last that a Range header asks for; all where it asks for what we do not know."""
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or not any(found.groups()):
        return 0, size
    first, last = found.groups()
    start, end = (int(first), int(last) + 1 if last else size) if first else (size - int(last), size)
    start, end = max(start, 0), min(end, size)
    return (start, end) if start < end else None
