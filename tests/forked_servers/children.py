"""The processes that a forked server spawns: forked, too, before the server ran anything, and told later what to do.

multiprocessing's spawn starts an interpreter that reads from a pipe what it is to run. Here that interpreter is one of
a few spare children of the server.
"""

from __future__ import annotations

import fcntl
import functools
import multiprocessing.util
import os
import pickle
import re
import resource
import socket
import sys
from collections.abc import Callable, Sequence, Set
from multiprocessing import spawn
from typing import NamedTuple

from tests.forked_servers import environment

_NUM_SPARES = 4
"""A scheduler, a detokenizer and two tokenizers; what else is spawned starts from nothing."""
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_MOST_BYTES = 1 << 17
_MOST_DESCRIPTORS = 250


class _Spawned(NamedTuple):
    """What an interpreter gets from the process that spawns it; with it come descriptors, in the order of `numbers`."""

    program: str
    numbers: list[int]
    variables: dict[str, str]
    limits: list[tuple[int, int]]


def fork_spares(read: Set[str]) -> Callable[[], object] | None:
    """Let this process spawn by forks of its present state, in which imports have read some variables.

    Returns:
        None in this process; in one that it spawns, later, what that is to run.
    """
    spares: list[tuple[int, socket.socket]] = []
    for _ in range(_NUM_SPARES):
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spare = os.fork()
        if spare == 0:
            for each in (ours, *(control for _, control in spares)):
                each.close()
            return _become_what_is_asked(its)
        its.close()
        spares.append((spare, ours))
    original = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = functools.partial(_spawn, spares, read, dict(os.environ), original)
    return None


def _spawn(
    spares: list[tuple[int, socket.socket]],
    read: Set[str],
    first: dict[str, str],
    original: Callable[..., int],
    path: bytes,
    arguments: Sequence[str],
    descriptors: Sequence[int],
) -> int:
    """In the place of `multiprocessing.util.spawnv_passfds`: the id of a child that does what was asked of it."""
    differences = environment.changes(first, os.environ)
    # Without this argument it is multiprocessing's own resource tracker.
    if "--multiprocessing-fork" not in arguments or not spares or not environment.unseen(differences.keys(), read):
        return original(path, arguments, descriptors)
    spare, control = spares.pop()
    numbers = sorted(set(map(int, descriptors)))
    program = arguments[arguments.index("-c") + 1]
    limits = [resource.getrlimit(each) for each in _LIMITS]
    with control:
        socket.send_fds(control, [pickle.dumps(_Spawned(program, numbers, dict(os.environ), limits))], numbers)
    return spare


def _become_what_is_asked(control: socket.socket) -> Callable[[], object]:
    with control:
        data, descriptors, *_ = socket.recv_fds(control, _MOST_BYTES, _MOST_DESCRIPTORS)
    if not data:
        # The server has ended, and did not need this one.
        os._exit(0)
    asked: _Spawned = pickle.loads(data)
    _renumber(descriptors, asked.numbers)
    for each, limits in zip(_LIMITS, asked.limits, strict=True):
        resource.setrlimit(each, limits)
    environment.apply(environment.changes(os.environ, asked.variables))
    sys.argv = ["-c", "--multiprocessing-fork"]
    handles = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", asked.program)}
    return functools.partial(spawn.spawn_main, **handles)


def _renumber(descriptors: list[int], numbers: list[int]) -> None:
    """Give descriptors the numbers that they have in the server, by which the pickled process names them."""
    above = max(numbers) + 1
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD, above) for each in descriptors]
    for each in descriptors:
        os.close(each)
    for source, number in zip(moved, numbers, strict=True):
        os.dup2(source, number)
        os.close(source)
