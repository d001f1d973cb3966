"""A program that begins, spawns and ends as servers do: `python -m tests.forked_servers.spawning report|wait|fail`.

`report` prints, as JSON lines, what its processes are like.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy.random

# What imports read stays as it was then.
AT_IMPORT = os.environ.get("SGLANG_READ_AT_IMPORT")
# SGLang, too, looks at all that there are.
OLD_NAMES = [name for name, value in os.environ.items() if name.startswith("SGL_")]
STATE: list[str] = []


def _described(server: int) -> dict[str, Any]:
    return {
        "arguments": sys.argv,
        "main": sys.modules["__main__"].__name__,
        "path": sys.path,
        "folder": os.getcwd(),
        "child of the server": os.getppid() == server,
        "of its group and session": (os.getpgid(0), os.getsid(0)) == (server, server),
        "environment": dict(sorted(os.environ.items())),
        "at import": AT_IMPORT,
        "state": STATE,
        "limits": [resource.getrlimit(each) for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)],
        "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "threads": len(os.listdir("/proc/self/task")),
        "files": _files(),
        "random": [random.random(), numpy.random.random()],
        "forked": "tests.forked_servers.keeper" in sys.modules,
    }


def _files() -> list[str]:
    """What is open: `pipe`, `socket` or a path, without numbers."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        # One is the listing itself.
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}").partition(":[")[0])
    return sorted(found)


def _tell(server: int, connection: Connection) -> None:
    connection.send(_described(server))


def _fail() -> None:
    sys.exit(7)


def report() -> None:
    """Tell of this process, of a child, and of one whose imports read another value; and how children ended."""
    own = os.getpid()
    print(json.dumps(_described(own)))
    STATE.append("of the server")
    os.environ["SGLANG_OF_THE_SERVER"] = "1"
    os.environ.pop("SGLANG_DROPPED", None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    signal.signal(signal.SIGUSR1, lambda *_: None)
    spawn = multiprocessing.get_context("spawn")
    ours, its = spawn.Pipe()
    told = spawn.Process(target=_tell, args=(own, its))
    told.start()
    print(json.dumps(ours.recv()))
    os.environ["SGLANG_READ_AT_IMPORT"] = "of the server"
    differing = spawn.Process(target=_tell, args=(own, its))
    differing.start()
    print(json.dumps(ours.recv()))
    del os.environ["SGLANG_READ_AT_IMPORT"]
    failing, sleeping = spawn.Process(target=_fail), spawn.Process(target=time.sleep, args=(600,))
    for each in (failing, sleeping):
        each.start()
    for each in (told, differing, failing):
        each.join()
    alive = sleeping.is_alive()
    sleeping.terminate()
    sleeping.join()
    print(json.dumps({"codes": [each.exitcode for each in (told, differing, failing, sleeping)], "alive": alive}))


def _wait_for_the_parents_end() -> None:
    # As each of SGLang's processes does.
    from cpu_engines.sglang.server import end_with_parent

    end_with_parent()
    print("waiting", flush=True)
    time.sleep(600)


def wait() -> None:
    """Wait for a child that waits."""
    child = multiprocessing.get_context("spawn").Process(target=_wait_for_the_parents_end)
    child.start()
    child.join()


def fail() -> None:
    """End as a server does that cannot start."""
    sys.exit("no such model")


if __name__ == "__main__":
    {"report": report, "wait": wait, "fail": fail}[sys.argv[1]]()
