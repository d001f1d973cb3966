"""The process from which servers are forked: `python -m tests.forked_servers.keeper MODULE FD`.

MODULE is what `python -m` would start; FD is a socket to the tests.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Set
from pathlib import Path
from typing import NamedTuple

from cpu_engines.sglang.server import end_with_parent
from tests.forked_servers import children, environment

MOST_BYTES = 1 << 17


class Request(NamedTuple):
    """A server to be started; with it come the descriptors of its output and of a pipe for its id and its end.

    Attributes:
        arguments: of the command line.
        differences: what makes the environment with which the keeper was started the server's.
    """

    arguments: list[str]
    differences: dict[str, str | None]


def main() -> None:
    """Import, tell which variables were read, and keep until the tests close their end, in whatever way."""
    module, control_fd = sys.argv[1:]
    opened = os.listdir("/proc/self/fd")
    with environment.noting_what_is_read() as read:
        # Under this name the file does what it does in processes that are spawned: it imports.
        runpy.run_module(module, run_name="__mp_main__")
    _refuse_what_forks_would_share(opened)
    # Python's own generator does this by itself, and torch's always starts with the same seed.
    if generator := sys.modules.get("numpy.random"):
        os.register_at_fork(after_in_child=generator.seed)
    gc.collect()
    # A collection would write to what is shared, and copy it.
    gc.freeze()
    control = socket.socket(fileno=int(control_fd))
    control.send(pickle.dumps(read))
    run = _keep(module, control, read)
    # From here on this is a process of a server, which ends as an interpreter does.
    run()


def _refuse_what_forks_would_share(opened: list[str]) -> None:
    task = Path(f"/proc/self/task/{os.getpid()}")
    found = {
        "threads": len(os.listdir("/proc/self/task")) - 1,
        "child processes": len((task / "children").read_text().split()),
        "open files": len(os.listdir("/proc/self/fd")) - len(opened),
    }
    if any(found.values()):
        raise RuntimeError(f"nothing can be forked from a process whose imports left {found}")


def _keep(module: str, control: socket.socket, read: Set[str]) -> Callable[[], object]:
    """Fork a server for each request; returns in the processes of servers alone, with what they are to run."""
    # Nobody waits for a supervisor.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, descriptors, *_ = socket.recv_fds(control, MOST_BYTES, 2)
        if not data:
            sys.exit()
        if os.fork() == 0:
            control.close()
            return _supervise(module, pickle.loads(data), read, *descriptors)
        for each in descriptors:
            os.close(each)


def _supervise(module: str, request: Request, read: Set[str], output: int, told: int) -> Callable[[], object]:
    """Fork the server; tell its id, then its exit status. Returns in the server and in what that spawns."""
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server = os.fork()
    if server:
        os.close(output)
        # Of a server that is left alone nobody may be there to hear.
        with contextlib.suppress(BrokenPipeError):
            os.write(told, f"{server}\n".encode())
            os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])}\n".encode())
        os._exit(0)
    end_with_parent()
    os.setsid()
    for standard in (1, 2):
        os.dup2(output, standard)
    for each in (output, told):
        os.close(each)
    environment.apply(request.differences)
    spawned = children.fork_spares(read)
    if spawned is not None:
        return spawned
    sys.argv = [module, *request.arguments]
    return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
