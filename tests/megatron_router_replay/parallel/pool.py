"""Rank processes that live as long as a test session and serve one case after the other."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

RANK_MODULE = "tests.megatron_router_replay.parallel.rank"
ROOT = Path(__file__).parents[3]
START_TIMEOUT = 300.0
CASE_TIMEOUT = 120.0
# How long the other ranks have to report, once one has failed: most often they wait for it, and never do.
GRACE = 2.0


class RankError(Exception):
    """A rank raised, died or did not answer; the message has what each of them left."""


class RankPool:
    """`world_size` processes in one gloo world.

    They are forked from a server that has imported torch and Megatron, so that another start takes a second only. A
    failure kills all of them, since a rank that waits for a message cannot be told that it will not come; the next
    `run` starts them anew.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CASE_TIMEOUT) -> list[Any]:
        """Call a module's function with `args` on every rank at once; its results, by rank.

        Raises:
            RankError: a rank raised, died, or took longer than `timeout` seconds.
        """
        if not self._processes:
            self._start()
        return self._call(function, args, timeout)

    def close(self) -> None:
        """Kill the ranks; the next `run` starts others."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([RANK_MODULE])
        # The server is started with this process' environment, and does not look at its sys.path.
        found = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
        # Another release of Megatron-Core may stand on the path, in front of the environment's.
        path = os.pathsep.join(filter(None, (found["PYTHONPATH"], str(ROOT))))
        os.environ.update(PYTHONPATH=path, OMP_NUM_THREADS="1")
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            for name, value in found.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        from tests.megatron_router_replay.parallel import rank as rank_module

        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.world_size, Path(self._folder.name))
            process = context.Process(target=rank_module.serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._call(rank_module.ready, (), START_TIMEOUT)

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        message = pack((function.__module__, function.__qualname__, args, timeout))
        answers: dict[int, tuple[bool, Any]] = {}
        try:
            for connection in self._connections:
                connection.send_bytes(message)
            self._collect(answers, timeout)
            failed = len(answers) < self.world_size or not all(good for good, _ in answers.values())
            if failed:
                raise RankError(f"{function.__qualname__}{args}\n{self._report(answers, timeout)}")
        except BaseException:
            self.close()
            raise
        return [answers[rank][1] for rank in range(self.world_size)]

    def _collect(self, answers: dict[int, tuple[bool, Any]], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        ranks = {connection: rank for rank, connection in enumerate(self._connections)}
        while ranks and (left := deadline - time.monotonic()) > 0:
            for ready in multiprocessing.connection.wait(list(ranks), left):
                rank = ranks.pop(ready)  # type: ignore[call-overload]
                try:
                    answers[rank] = unpack(ready.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    self._processes[rank].join(1)
                    answers[rank] = (False, f"the process ended with {self._processes[rank].exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)

    def _report(self, answers: dict[int, tuple[bool, Any]], timeout: float) -> str:
        assert self._folder is not None
        lines = []
        for rank in range(self.world_size):
            good, answer = answers.get(rank, (False, f"no answer; killed (its limit was {timeout} s)"))
            lines.append(f"--- rank {rank} of {self.world_size}: {'answered' if good else answer}")
            log = Path(self._folder.name) / f"log{rank}"
            if not good and log.exists():
                lines.append(log.read_text(errors="replace")[-4000:])
        return "\n".join(lines)


def pack(value: Any) -> bytes:
    """A message between the test and a rank."""
    # torch's own pickling sends file descriptors of shared memory, which run out.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` was given."""
    return torch.load(io.BytesIO(data), weights_only=False)
