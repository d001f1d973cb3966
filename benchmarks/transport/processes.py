"""The four processes on the way, and what each takes: CPU time, memory, bytes from one to the next."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.transport import detokenizer, reader, scheduler, server
from benchmarks.transport.reader import Ask
from benchmarks.transport.ways import HOPS, TRIM, Places
from cpu_engines.sglang.ports import free_port

SCHEDULER, DETOKENIZER, SERVER, READER, RAYS = PROCESSES = ("scheduler", "detokenizer", "server", "trainer", "Ray's")

# What is done behind an answer's back, such as removing a file, is done by then.
_SETTLED_S = 0.05
_OBJECT_STORE = 1 << 30


@dataclass(frozen=True)
class Cost:
    """What one request or conversation took.

    Attributes:
        wall: seconds until the routes were there.
        cpu: seconds of the CPU by process, and of Ray's own processes together.
    """

    wall: float
    cpu: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of the CPU in all processes."""
        return sum(self.cpu.values())


@dataclass(frozen=True)
class Look:
    """What was seen of one request or conversation, in a run of its own.

    Attributes:
        hops: bytes by hop.
        memory: bytes by process, of its peak above what it held before.
        digest: of the routes that came.
    """

    hops: dict[str, int]
    memory: dict[str, int]
    digest: str


class Chain:
    """The running processes, of which nothing else is asked meanwhile."""

    def __init__(self, processes: dict[str, Any], jobs: Any, hops: Any) -> None:
        self._processes = processes
        self._pids = {name: int(process.pid) for name, process in processes.items()}
        self._jobs = jobs
        self._hops = hops

    def run(self, ask: Ask) -> Cost:
        """Do it once."""
        before, began = self._cpu(), time.perf_counter()
        self._jobs.send(ask)
        self._done()
        wall = time.perf_counter() - began
        time.sleep(_SETTLED_S)
        after = self._cpu()
        self._jobs.send("")
        self._done()
        return Cost(wall, {name: after[name] - before[name] for name in after})

    def look(self, ask: Ask) -> Look:
        """Do it once, and see what it needs."""
        self._jobs.send(replace(ask, way=TRIM))
        self._done()
        time.sleep(_SETTLED_S)
        self._hops[:] = [0] * len(HOPS)
        held = {name: _resident(pid) for name, pid in self._pids.items()}
        for pid in self._pids.values():
            # Forgets the peak so far (proc(5), clear_refs).
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._jobs.send(replace(ask, look=True))
        self._done()
        memory = {name: _resident(pid, "VmHWM") - held[name] for name, pid in self._pids.items()}
        hops = dict(zip(HOPS, self._hops, strict=True))
        self._jobs.send("digest")
        return Look(hops, memory, self._done())

    def _done(self) -> str:
        # By the time a second is over, a process that has ended is noticed.
        while not self._jobs.poll(1.0):
            for name, process in self._processes.items():
                _require_alive(name, process)
        return str(self._jobs.recv())

    def _cpu(self) -> dict[str, float]:
        taken = {name: _cpu_seconds(pid) for name, pid in self._pids.items()}
        family = [child.pid for child in psutil.Process().children(recursive=True)]
        return {**taken, RAYS: sum(map(_cpu_seconds, set(family) - set(self._pids.values())))}


@contextlib.contextmanager
def chain(models: dict[str, int]) -> Iterator[Chain]:
    """Start the processes, with tables for requests of so many tokens by model, and Ray; stop them at the end."""
    import ray

    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=_OBJECT_STORE, log_to_driver=False)
    spawn = multiprocessing.get_context("spawn")
    hops = spawn.RawArray("Q", len(HOPS))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        places = Places(Path(folder), free_port(), ray.get_runtime_context().gcs_address)
        for each in (places.handles, places.served):
            each.mkdir()
        ends = {name: spawn.Pipe() for name in PROCESSES if name != RAYS}
        started = {
            SCHEDULER: (scheduler.run, (places, models)),
            DETOKENIZER: (detokenizer.run, (places, hops)),
            SERVER: (server.run, (places, hops)),
            READER: (reader.run, (places, hops)),
        }
        processes = {
            name: spawn.Process(target=run, args=(*args, ends[name][1]), name=name, daemon=True)
            for name, (run, args) in started.items()
        }
        try:
            for process in processes.values():
                process.start()
            for name, process in processes.items():
                _wait_for(name, process, ends[name][0])
            _wait_until_served(places.server)
            yield Chain(processes, ends[READER][0], hops)
        finally:
            for process in processes.values():
                process.kill()
                process.join()
            ray.shutdown()


def _cpu_seconds(pid: int) -> float:
    """Of all threads of a process, those that ended, too, in nanoseconds' steps; 0 for one that is gone."""
    try:
        # The clock of another process, as clock_getcpuclockid(3) gives it on Linux.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _resident(pid: int, field: str = "VmRSS") -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no {field}")


def _wait_for(name: str, process: Any, end: Any) -> None:
    while not end.poll(0.2):
        _require_alive(name, process)
    end.recv()


def _require_alive(name: str, process: Any) -> None:
    if not process.is_alive():
        raise RuntimeError(f"the {name}'s process ended with exit code {process.exitcode}")


def _wait_until_served(url: str) -> None:
    for _ in range(300):
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"nobody answers at {url}")
