"""One soak: a server, its clients and operators, and the checker, until enough was seen."""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoConfig

from cpu_engines.sglang.server import HICACHE_FLAGS, STAND_IN_PLUGIN, TWO_RANKS, Server
from router_replay.masks import RoutingGeometry
from tests.small_model import serve
from tests.soak.answers import Answer
from tests.soak.checker import Checker
from tests.soak.checkpoints import Checkpoints, make_checkpoints
from tests.soak.oracle import Oracle
from tests.soak.tally import Tally
from tests.soak.weights import WeightHistory
from tests.soak.workload import Client, Conversations, Operator

_LONGEST = 420
_BATCH = 24


@dataclass(frozen=True)
class Target:
    """When a soak has seen enough: all of the counts, or the time is over."""

    rows: int = 0
    distinct: int = 0
    host: int = 0
    storage: int = 0
    retracted: int = 0
    seconds: float = float("inf")


@dataclass(frozen=True)
class Setup:
    """What the server of a soak is like.

    Attributes:
        stock: SGLang's own capture instead of ours.
        hicache: write policy of the hierarchical cache; None for a server without one.
        storage: whether the hierarchical cache has storage below it, in files.
        page_size: of the KV pool.
        pool: KV slots on the device, of each data-parallel rank.
        dp_size: data-parallel ranks: one or two.
        clients: that send at once.
        operator_pause_s: mean time between two acts of the operator.
        unnamed_updates: whether half of the weight updates have no name.
        flags: further flags of the server.
    """

    stock: bool = False
    hicache: str | None = "write_through"
    storage: bool = True
    page_size: int = 16
    pool: int = 2048
    dp_size: int = 1
    clients: int = 14
    operator_pause_s: float = 4.0
    unnamed_updates: bool = True
    flags: tuple[str, ...] = ()

    def server_flags(self) -> list[str]:
        """Of the command line."""
        flags = ["--dtype=float32", "--skip-tokenizer-init", "--chunked-prefill-size=64", "--random-seed=0"]
        flags += [f"--max-total-tokens={self.pool}", "--schedule-conservativeness=0.1", f"--page-size={self.page_size}"]
        flags += ["--enable-return-routed-experts"] if self.stock else ["--enable-router-capture"]
        if self.dp_size > 1:
            flags += [f"--dp-size={self.dp_size}"]
        if self.hicache is not None:
            flags += [*HICACHE_FLAGS, "--hicache-ratio=1.5", f"--hicache-write-policy={self.hicache}"]
            if self.storage:
                # Of a layout whose pages are one piece of memory each.
                flags += ["--hicache-mem-layout=page_first_direct", "--hicache-storage-backend=file"]
                flags.append("--hicache-storage-prefetch-policy=wait_complete")
                # Prefixes here are shorter than those that SGLang would look for.
                flags.append('--hicache-storage-backend-extra-config={"prefetch_threshold": 16}')
        return [*flags, *self.flags]


@dataclass
class Result:
    """What a soak saw.

    Attributes:
        memory: `(seconds, resident bytes of all scheduler processes)`, over time.
        status: what the server's own page says in the end; None of a stock server.
    """

    setup: Setup
    seconds: float
    bounds: list[float]
    tally: Tally
    memory: list[tuple[float, int]] = field(default_factory=list)
    status: list[dict[str, Any]] | None = None

    @property
    def unexplained(self) -> int:
        """Invalid rows without a cause that may be: only pages whose rows storage did not have are one."""
        invalid = self.tally.invalid.total()
        if self.status is None or not invalid:
            return invalid
        rows = [each["rows"] for each in self.status]
        if any(each["returned_without_routes"] for each in rows):
            return invalid
        return 0 if any(each.get("rows_not_in_storage") for each in rows) else invalid

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "setup": asdict(self.setup),
            "seconds": round(self.seconds, 1),
            "bounds of rounding, by MoE layer": self.bounds,
            **self.tally.report(),
            "status": self.status,
            "resident bytes of the schedulers": [[round(at, 1), size] for at, size in self.memory],
        }


def soak(
    model: Path,
    folder: Path,
    setup: Setup,
    target: Target,
    seed: int,
    *,
    num_checkpoints: int = 5,
    progress: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Run one.

    Args:
        model: the small model's Hugging Face folder.
        folder: for checkpoints and storage; emptied by the caller.
        target: when to stop; at least one answer is checked.
        seed: of everything that is random but the time at which things happen.
        progress: called every second or so.
    """
    checkpoints = make_checkpoints(model, folder, num_checkpoints, seed)
    oracle = Oracle(model, _LONGEST)
    tally, history = Tally(), WeightHistory()
    result = Result(setup, 0.0, oracle.bounds.tolist(), tally)
    environment = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(folder / "storage")}
    if setup.stock:
        environment["SGLANG_PLUGINS"] = STAND_IN_PLUGIN
    if setup.dp_size > 1:
        environment |= TWO_RANKS
    with serve(model, *setup.server_flags(), environment=environment, timeout_s=900) as server:
        checker = Checker(oracle, checkpoints, history, tally)
        _drive(server, model, checkpoints, checker, target, seed, result, progress)
    return result


def _drive(
    server: Server,
    model: Path,
    checkpoints: Checkpoints,
    checker: Checker,
    target: Target,
    seed: int,
    result: Result,
    progress: Callable[[Result], None],
) -> None:
    setup, tally = result.setup, result.tally
    geometry = RoutingGeometry.from_hf_config(AutoConfig.from_pretrained(model).to_dict())
    answers: queue.Queue[Answer] = queue.Queue()
    conversations = Conversations(_LONGEST - 130)
    stop = threading.Event()
    runs = [
        Client(server, conversations, geometry, tally, answers.put, f"{seed}-{number}").run
        for number in range(setup.clients)
    ]
    operator = Operator(
        server, checkpoints, checker.history, tally, str(seed), setup.operator_pause_s, setup.unnamed_updates
    )
    runs.append(operator.run)
    threads = [threading.Thread(target=run, args=[stop], daemon=True) for run in runs]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    sampled = -10.0
    try:
        while not _reached(target, result):
            result.seconds = time.monotonic() - began
            if result.seconds - sampled >= 5:
                result.memory.append((result.seconds, _resident(server)))
                sampled = result.seconds
            waiting = _taken(answers, _BATCH)
            if waiting:
                checker.check(waiting)
            elif not psutil.pid_exists(server.pid) or psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE:
                raise RuntimeError(f"the server is gone; the end of its log:\n{server.log()[-4000:]}")
            progress(result)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
    while waiting := _taken(answers, _BATCH):
        checker.check(waiting)
    if not setup.stock:
        result.status = _status(server)
    result.seconds = time.monotonic() - began


def _reached(target: Target, result: Result) -> bool:
    tally = result.tally
    if result.seconds > target.seconds:
        return True
    enough = tally.rows.total() >= target.rows and tally.distinct >= target.distinct
    return (
        enough
        and tally.rows["host"] >= target.host
        and tally.rows["storage"] >= target.storage
        and tally.rows["retracted"] >= target.retracted
        and target.rows > 0
    )


def _taken(answers: queue.Queue[Answer], most: int) -> list[Answer]:
    taken: list[Answer] = []
    with suppress(queue.Empty):
        taken.append(answers.get(timeout=1))
        while len(taken) < most:
            taken.append(answers.get_nowait())
    return taken


def _status(server: Server) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server.url}/router_capture/status", timeout=60) as answer:
        schedulers = json.load(answer)["schedulers"]
    # A long list, and the same for each.
    return [{key: value for key, value in each.items() if key != "hooks"} for each in schedulers]


def _resident(server: Server) -> int:
    total = 0
    for process in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "scheduler" in process.name() or "scheduler" in " ".join(process.cmdline()):
                total += process.memory_info().rss
    return total
