"""The harness's server, with commands in SGLang's place that end in other ways."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from cpu_engines.sglang.server import ServerDiedError, serve


def _script(folder: Path, text: str) -> tuple[str, str]:
    script = folder / "server.py"
    script.write_text(text)
    return sys.executable, str(script)


def _gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_dies_says_so_and_leaves_no_child(tmp_path: Path) -> None:
    command = _script(
        tmp_path,
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "sys.exit('no such model')\n",
    )
    with (
        pytest.raises(ServerDiedError, match="status 1 before it could answer") as caught,
        serve(tmp_path, command=command),
    ):
        pass
    assert "no such model" in str(caught.value)
    assert caught.value.status == 1
    assert _gone(int(caught.value.log.split()[1]))


def test_a_server_that_does_not_answer_is_ended_even_if_it_ignores_the_signal(tmp_path: Path) -> None:
    command = _script(
        tmp_path,
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('pid', os.getpid(), flush=True)\n"
        "time.sleep(600)\n",
    )
    begin = time.monotonic()
    with (
        pytest.raises(ServerDiedError, match="did not answer within 10 s") as caught,
        serve(tmp_path, command=command, timeout_s=10),
    ):
        pass
    assert caught.value.status is None
    assert _gone(int(caught.value.log.split()[1]))
    assert time.monotonic() - begin < 60
