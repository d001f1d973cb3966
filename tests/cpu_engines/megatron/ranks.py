"""Processes that wait for functions to run, one parallel layout after the other."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class Ranks:
    """One gloo world for many calls. A call that fails or hangs ends all processes; the next call starts others."""

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, layout: dict[str, Any], function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """What `function(*args)`, importable by its name, returns on each rank inside `model_parallel(**layout)`."""
        if not self._processes:
            self._start()
        call = pickle.dumps((layout, function, args))
        answers: dict[Connection, Any] = {}
        try:
            for pipe in self._pipes:
                pipe.send_bytes(call)
            deadline = time.monotonic() + timeout
            while missing := [pipe for pipe in self._pipes if pipe not in answers]:
                ready = wait(missing, max(0.0, deadline - time.monotonic()))
                assert ready, f"no answer from {len(missing)} rank(s) within {timeout} s"
                for pipe in ready:
                    error, answers[pipe] = pickle.loads(pipe.recv_bytes())
                    # Who failed leaves the other waiting for it.
                    assert not error, error
        except BaseException:
            self.stop()
            raise
        return [answers[pipe] for pipe in self._pipes]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self._folder.name) / "rendezvous"
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._size, rendezvous, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, rendezvous: Path, pipe: Connection) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    from cpu_engines.megatron import CpuDevice, model_parallel, world

    torch.set_num_threads(1)
    with CpuDevice(), world(rank, size, rendezvous):
        while True:
            error, answer = "", None
            try:
                layout, function, args = pickle.loads(pipe.recv_bytes())
                with model_parallel(**layout):
                    answer = function(*args)
            except EOFError:
                return
            except Exception:
                error = f"rank {rank}: {traceback.format_exc()}"
            pipe.send_bytes(pickle.dumps((error, answer)))
