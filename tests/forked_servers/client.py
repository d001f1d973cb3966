"""The tests' side: servers that are forked from the keeper of this run."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import IO, Any

from cpu_engines.sglang import server
from tests import small_model
from tests.forked_servers.environment import changes, unseen
from tests.forked_servers.keeper import MOST_BYTES, Request


def serve(
    model_path: str | os.PathLike[str], *flags: str, **others: Any
) -> contextlib.AbstractContextManager[server.Server]:
    """`tests.small_model.serve`, forked where imports allow it."""
    return small_model.serve(model_path, *flags, start=_keeper().start, **others)


@functools.cache
def _keeper() -> Keeper:
    return Keeper(small_model.cpu_environment())


class Forked:
    """A forked server as `subprocess.Popen` shows one: `pid`, `poll` and `wait`."""

    def __init__(self, told: int) -> None:
        self._told = os.fdopen(told, "rb", buffering=0)
        self._status: int | None = None
        if not (pid := self._told.readline()):
            raise RuntimeError("the process from which servers are forked has ended; what it said is above")
        self.pid = int(pid)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self._status is None and select.select([self._told], [], [], 0)[0]:
            self.wait()
        return self._status

    def wait(self) -> int:
        """The exit status, once it has ended."""
        if self._status is None:
            # It is told of by a process that ends without a word where the keeper was killed, and the server with it.
            self._status = int(self._told.readline() or -signal.SIGTERM)
            self._told.close()
        return self._status


class Keeper:
    """The process that has imported, of some module that `python -m` starts, and in some environment."""

    def __init__(self, environment: Mapping[str, str], module: str = "sglang.launch_server") -> None:
        self._command = [sys.executable, "-m", module]
        # pytest's own differs by test, and SGLang looks at all variables that there are for those with an old name.
        self._environment = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
        self._folder = Path.cwd()
        self._lock = threading.Lock()
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            # It ends when this process's end of the socket closes, in whatever way that comes about.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_servers.keeper", module, str(its.fileno())],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> server.Process:
        """A server as `cpu_engines.sglang.server.serve` has it started; from nothing, where imports could differ."""
        is_servers = list(command[: len(self._command)]) == self._command and Path.cwd() == self._folder
        differences = changes(self._environment, environment)
        if not is_servers or not unseen(differences.keys(), self._read):
            return server.start_process(command, environment, output)
        read, write = os.pipe()
        try:
            request = Request(list(command[len(self._command) :]), differences)
            with self._lock:
                socket.send_fds(self._socket, [pickle.dumps(request)], [output.fileno(), write])
        finally:
            os.close(write)
        return Forked(read)

    @functools.cached_property
    def _read(self) -> Set[str]:
        """Variables that imports have read; waits until they have."""
        told = self._socket.recv(MOST_BYTES)
        if not told:
            raise RuntimeError("the process from which servers are to be forked has ended; what it said is above")
        return pickle.loads(told)

    def end(self) -> None:
        """End it, and with it what was forked from it."""
        self._socket.close()
        self._process.wait(60)
