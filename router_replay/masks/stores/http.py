"""The HTTP store: masks that a server keeps beside itself, got and deleted by their ids."""

from __future__ import annotations

import http.client
import os
import time
from typing import Any
from urllib.parse import urlsplit

from router_replay.errors import DataError, InputError, StoreError
from router_replay.masks import container
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores import handles
from router_replay.masks.stores.handles import entry_of
from router_replay.masks.stores.served import ROUTE, server_url
from router_replay.masks.stores.store import Handle, Stat, Store

API_KEY_VARIABLE = "ROUTER_CAPTURE_API_KEY"
"""Environment variable with the key that the server was given as --api-key."""

# All requests are idempotent. A server that restarts or sheds load is back after a moment, or not soon.
_WAIT_SECONDS = (0.2, 1.0)
_BUSY = (502, 503, 504)


class HttpStore(Store):
    """Gets and deletes what a server keeps. Nothing is put by HTTP: the server writes by itself (`ServedDirectory`).

    It talks to the server directly, without a proxy, and follows no redirect, which would carry the key elsewhere.

    Args:
        url: the server's, `http://host:port`.
        api_key: the server's --api-key; by default what the environment's `ROUTER_CAPTURE_API_KEY` says, or none.
        timeout_s: seconds without a byte after which an attempt is given up; there are three.

    Raises:
        InputError: a URL of another scheme, without a host or with options.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        self.url = server_url(url)
        self._place = urlsplit(self.url)
        self._timeout_s = timeout_s
        key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        """Refuse: only the server itself writes into its store.

        Raises:
            InputError: always.
        """
        raise InputError(f"masks are not put into {self.url!r} by HTTP: the server there keeps what it records itself")

    def prepare(self) -> None:
        """Refuse, as `put` does.

        Raises:
            InputError: always.
        """
        raise InputError(f"the store {self.url!r} is written by the server there alone, in a directory of its own")

    def get(self, handle: Handle) -> RoutingMasks:
        """The masks that the server has for a handle.

        Raises:
            DataError: not a handle of this server, nothing there any more, or another's container.
            StoreError: the server cannot be reached, or wants an API key.
        """
        entry = entry_of(handle, self.url)
        status, _, data = self._request("GET", entry.id)
        if status == 404:
            raise handles.gone(entry, self.url)
        try:
            return container.from_bytes(data, entry.crc32)
        except DataError as error:
            raise DataError(f"{entry.id} from {self.url!r}: {error}") from error

    def delete(self, handle: Handle) -> None:
        """Have the server remove what it keeps for a handle."""
        self._request("DELETE", entry_of(handle, self.url).id)

    def stat(self, handle: Handle) -> Stat:
        """What the server says of a handle, without sending the masks."""
        entry = entry_of(handle, self.url)
        status, size, _ = self._request("HEAD", entry.id)
        return Stat(there=False) if status == 404 else entry.stat(size, self.url)

    def close(self) -> None:
        """Nothing is open: a connection lasts for one request."""

    def _request(self, method: str, entry_id: str) -> tuple[int, int, bytes]:
        """Status (2xx or 404), Content-Length and body."""
        failed: object = None
        for wait in (*_WAIT_SECONDS, None):
            try:
                status, size, body = self._once(method, entry_id)
            except (OSError, http.client.HTTPException) as error:
                failed = f"{type(error).__name__}: {error}"
            else:
                if status in (200, 204, 404):
                    return status, size, body
                if status in (401, 403):
                    raise StoreError(
                        f"the server {self.url!r} refuses {'this' if self._headers else 'a request without an'} API key"
                        f" (status {status}): set {API_KEY_VARIABLE} to its --api-key where masks are read"
                    )
                failed = f"status {status}"
                if status not in _BUSY:
                    break
            if wait is not None:
                time.sleep(wait)
        raise StoreError(f"the server {self.url!r} does not answer {method} {ROUTE}{entry_id}: {failed}")

    def _once(self, method: str, entry_id: str) -> tuple[int, int, bytes]:
        secure = self._place.scheme == "https"
        connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = connect(self._place.netloc, timeout=self._timeout_s)
        try:
            connection.request(method, self._place.path + ROUTE + entry_id, headers=self._headers)
            response = connection.getresponse()
            return response.status, int(response.headers.get("Content-Length", 0)), response.read()
        finally:
            connection.close()
