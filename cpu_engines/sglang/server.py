"""Start SGLang's real HTTP server on the CPU, wait for it, use it, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from cpu_engines.sglang.ports import free_port

STAND_INS = Path(__file__).parent / "stand_ins"
STAND_IN_PLUGIN = "sglang_cpu_engine"
"""What a server whose SGLANG_PLUGINS names no other of this repository still needs on the CPU."""
_REPOSITORY = Path(__file__).parents[2]
MODEL_PACKAGE_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
"""SGLang's own seam for models from outside."""

# Flags of a hierarchical cache whose kernels `stand_ins` supplies.
HICACHE_FLAGS = (
    "--enable-hierarchical-cache",
    "--hicache-ratio=4",
    "--hicache-io-backend=direct",
    "--hicache-mem-layout=layer_first",
)

# Attention of a whole decode batch at a time, for servers that play for hours; `stand_ins` supplies it.
BATCHED_DECODE = {"SGLANG_CPU_ENGINE_BATCHED_DECODE": "1"}

# Two ranks share a machine without NUMA nodes of their own: each is bound to a core by hand.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}

CPU_FLAGS = (
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--disable-cuda-graph",
    # An idle scheduler polls without pause otherwise, and takes a core from whatever else runs.
    "--sleep-on-idle",
    "--mem-fraction-static=0.05",
    "--log-level=info",
)


class ServerDiedError(RuntimeError):
    """The server ended, or did not answer in time; `status` is its exit status, None if it still ran."""

    def __init__(self, message: str, status: int | None, log: str) -> None:
        super().__init__(message)
        self.status = status
        self.log = log


@dataclass(frozen=True)
class Server:
    """A running server: `url` without a trailing slash, `pid` of its main process, `log_file` of its output."""

    url: str
    pid: int
    log_file: Path

    def log(self) -> str:
        """What the server has printed so far."""
        return self.log_file.read_text(errors="replace")

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 120.0) -> Any:
        """POST a JSON body; the answer as JSON.

        Raises:
            urllib.error.HTTPError: the server refused the request.
        """
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)

    def generate(self, input_ids: Sequence[int], max_new_tokens: int, **fields: Any) -> dict[str, Any]:
        """One `/generate` request over token ids; `sampling_params` among the fields adds to `max_new_tokens`."""
        sampling = {"max_new_tokens": max_new_tokens, **fields.pop("sampling_params", {})}
        return self.post("/generate", {"input_ids": list(input_ids), "sampling_params": sampling, **fields})


class Process(Protocol):
    """The main process of a server, in a process group of its own: what is used of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def start_process(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> Process:
    """`command` in a process whose output goes to a file, and which ends when this one does."""
    return subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        preexec_fn=end_with_parent,
        # A process group of its own, by which the server's children are found even when it is gone itself.
        start_new_session=True,
    )


@contextlib.contextmanager
def serve(
    model_path: str | os.PathLike[str],
    *flags: str,
    model_package: str | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
    command: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
    cpu: bool = True,
    start: Callable[[Sequence[str], Mapping[str, str], IO[bytes]], Process] = start_process,
) -> Iterator[Server]:
    """A server for the length of a `with` block, in a process of its own, on a free loopback port.

    Args:
        flags: added to `CPU_FLAGS` on the CPU, alone otherwise.
        model_package: dotted name of a package of models that SGLang takes before its own ones, if any; a package of
            this repository is found from every working directory.
        environment: added to this process's environment.
        command: what starts the server; the flags follow it.
        cpu: False leaves the device and its kernels to SGLang, for a machine with a GPU.
        start: starts the whole command with the whole environment.

    Raises:
        ServerDiedError: the server ended before it could answer, or did not answer within `timeout_s` seconds; with the
            end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="sglang-cpu-") as folder:
        log_file = Path(folder) / "server.log"
        port = free_port()
        base_flags = CPU_FLAGS if cpu else ()
        with log_file.open("wb") as output:
            process = start(
                [*command, "--model-path", os.fspath(model_path), "--port", str(port), *base_flags, *flags],
                (cpu_environment if cpu else base_environment)(environment, model_package=model_package),
                output,
            )
        server = Server(f"http://127.0.0.1:{port}", process.pid, log_file)
        try:
            _wait_until_ready(server, process, timeout_s)
            yield server
        finally:
            _end(process)


def cpu_environment(added: Mapping[str, str] | None = None, *, model_package: str | None = None) -> dict[str, str]:
    """`base_environment` with what lets SGLang run on the CPU; its stand-ins come first on the `PYTHONPATH`."""
    base = base_environment(added, model_package=model_package)
    return {**base, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": _paths(str(STAND_INS), base["PYTHONPATH"])}


def base_environment(added: Mapping[str, str] | None = None, *, model_package: str | None = None) -> dict[str, str]:
    """This process's environment and `added`, with what a server here needs on every device.

    Args:
        added: wins over the rest, but a `PYTHONPATH` is put in front of this process's.
        model_package: as of `serve`; without one SGLang has its own models only, whatever this process's environment
            says.
    """
    added = dict(added or {})
    inherited = {name: value for name, value in os.environ.items() if name != MODEL_PACKAGE_VARIABLE}
    return {
        **inherited,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **({} if model_package is None else {MODEL_PACKAGE_VARIABLE: model_package}),
        **added,
        "PYTHONPATH": _paths(added.get("PYTHONPATH", ""), str(_REPOSITORY), os.environ.get("PYTHONPATH", "")),
    }


def _paths(*paths: str) -> str:
    return os.pathsep.join(filter(None, paths))


def end_with_parent() -> None:
    """Let the kernel end this process when its parent ends: a test run that is killed leaves no server."""
    # 1 is PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_until_ready(server: Server, process: Process, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise _died(f"SGLang ended with status {status} before it could answer", status, server)
        with contextlib.suppress(OSError), urllib.request.urlopen(server.url + "/health", timeout=10):
            return
        time.sleep(0.5)
    raise _died(f"SGLang did not answer within {timeout_s:.0f} s", None, server)


def _died(message: str, status: int | None, server: Server) -> ServerDiedError:
    log = server.log()
    return ServerDiedError(f"{message}. The end of its log:\n" + "\n".join(log.splitlines()[-30:]), status, log)


def _end(process: Process) -> None:
    for ending, wait_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ending)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and (process.poll() is None or _members(process.pid)):
            time.sleep(0.05)
    process.wait()


def _members(group: int) -> list[psutil.Process]:
    members = []
    for each in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(each.pid) == group and each.status() != psutil.STATUS_ZOMBIE:
                members.append(each)
    return members
