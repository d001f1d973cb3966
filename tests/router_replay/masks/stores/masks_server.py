"""A real HTTP server on loopback that serves a directory of masks, as the engine's does, and can be made to fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from router_replay.masks.stores.directory import DirectoryStore
from router_replay.masks.stores.served import ROUTE, Response, ServedDirectory


class MasksServer(ThreadingHTTPServer):
    """Serves the directory behind `served`.

    Attributes:
        api_key: wanted of every request; none: everybody may.
        faults: what the next requests meet instead of an answer, the first one first: a status, "cut" or "hang".
        requests: method, path and headers of those that came.
    """

    daemon_threads = True

    def __init__(self, directory_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.served = ServedDirectory(self.url, DirectoryStore(directory_url))
        self.api_key: str | None = None
        self.faults: list[int | str] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MasksServer

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self._send(Response(fault, {"Location": f"{self.server.url}/elsewhere", "Content-Length": "0"}))
            return
        if fault == "hang":
            time.sleep(1.0)
            self.close_connection = True
            return
        if self.server.api_key and self.headers.get("Authorization") != f"Bearer {self.server.api_key}":
            self._send(Response(401))
            return
        if not self.path.startswith(ROUTE):
            self._send(Response(404))
            return
        answer = self.server.served.respond(self.command, self.path.removeprefix(ROUTE), self.headers.get("Range"))
        self._send(answer, cut=fault == "cut")

    do_HEAD = do_DELETE = do_POST = do_GET

    def _send(self, answer: Response, cut: bool = False) -> None:
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Nothing: the tests look at `requests`."""


@contextmanager
def serving(directory_url: str) -> Iterator[MasksServer]:
    """A server that answers until the end of the block."""
    with MasksServer(directory_url) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
