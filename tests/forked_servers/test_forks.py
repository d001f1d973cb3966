"""A small program that is forked as servers are, beside the same program started from nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from cpu_engines.sglang.server import Process, start_process
from tests.forked_servers.children import _renumber
from tests.forked_servers.client import Forked, Keeper
from tests.forked_servers.environment import noting_what_is_read, unseen
from tests.house.repository import ROOT

MODULE = "tests.forked_servers.spawning"

Start = Callable[..., Process]


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """With which the program is found from every folder."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def keeper(variables: dict[str, str]) -> Iterator[Keeper]:
    keeper = Keeper(variables, MODULE)
    yield keeper
    keeper.end()


def _run(start: Start, folder: Path, variables: Mapping[str, str], what: str = "report") -> tuple[int, str]:
    """The exit status and the output."""
    log = folder / "log"
    with log.open("wb") as output:
        process = start([sys.executable, "-m", MODULE, what], variables, output)
    return process.wait(), log.read_text()


def _reports(start: Start, folder: Path, variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """Of the program, its child and its child whose imports read another value; and of how children ended."""
    status, output = _run(start, folder, variables)
    assert status == 0, output
    return [json.loads(line) for line in output.splitlines()]


def test_a_forked_program_is_as_one_from_nothing(keeper: Keeper, variables: dict[str, str], tmp_path: Path) -> None:
    wanted = variables | {"SGLANG_ADDED": "1", "SGLANG_DROPPED": "1", "PYTEST_CURRENT_TEST": "another"}
    cold, forked = (_reports(start, tmp_path, wanted) for start in (start_process, keeper.start))
    assert [each.pop("forked") for each in cold[:3]] == [False, False, False]
    assert [each.pop("forked") for each in forked[:3]] == [True, True, False]
    numbers = [number for each in (*cold[:3], *forked[:3]) for number in each.pop("random")]
    assert len(set(numbers)) == 12
    # Those of its spare children.
    while "socket" in forked[0]["files"]:
        forked[0]["files"].remove("socket")
    assert forked == cold
    assert (forked[1]["environment"]["SGLANG_OF_THE_SERVER"], forked[1]["at import"]) == ("1", None)
    assert forked[2]["at import"] == "of the server"
    assert forked[3] == {"codes": [0, 0, 7, -signal.SIGTERM], "alive": True}


def test_no_two_forks_draw_the_same_numbers(keeper: Keeper, variables: dict[str, str], tmp_path: Path) -> None:
    reports = [each for _ in range(2) for each in _reports(keeper.start, tmp_path, variables)[:2]]
    assert all(each["forked"] for each in reports)
    assert len({number for each in reports for number in each["random"]}) == 8


@pytest.mark.parametrize("difference", [{"SGLANG_READ_AT_IMPORT": "1"}, {"OMP_NUM_THREADS": "7"}])
def test_a_program_whose_imports_could_differ_is_not_forked(
    keeper: Keeper, variables: dict[str, str], tmp_path: Path, difference: dict[str, str]
) -> None:
    first = _reports(keeper.start, tmp_path, variables | difference)[0]
    assert not first["forked"]
    assert first["at import"] == difference.get("SGLANG_READ_AT_IMPORT")


def test_nor_is_one_of_another_folder(
    keeper: Keeper, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = _reports(keeper.start, tmp_path, variables)[0]
    assert not first["forked"] and first["folder"] == str(tmp_path)


def test_a_program_that_fails_tells_its_status_and_reason(
    keeper: Keeper, variables: dict[str, str], tmp_path: Path
) -> None:
    assert _run(keeper.start, tmp_path, variables, "fail") == (1, "no such model\n")


def _waiting(start: Start, folder: Path, variables: Mapping[str, str]) -> Process:
    """A program that waits for a child that waits."""
    log = folder / "log"
    with log.open("wb") as output:
        process = start([sys.executable, "-m", MODULE, "wait"], variables, output)
    _wait_until(lambda: "waiting" in log.read_text())
    return process


def _wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _are_gone(processes: list[psutil.Process]) -> bool:
    _, left = psutil.wait_procs(processes, timeout=30)
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in left)


def test_a_program_that_is_killed_leaves_nothing(keeper: Keeper, variables: dict[str, str], tmp_path: Path) -> None:
    process = _waiting(keeper.start, tmp_path, variables)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 1
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert _are_gone(family)


def test_tests_that_are_killed_leave_nothing(variables: dict[str, str], tmp_path: Path) -> None:
    tests = subprocess.Popen([sys.executable, "-m", "tests.forked_servers.test_forks", str(tmp_path)], env=variables)
    try:
        _wait_until((tmp_path / "started").exists)
        # The keeper, the program, what stands between them, and the program's children.
        family = psutil.Process(tests.pid).children(recursive=True)
        assert len(family) > 4
    finally:
        tests.kill()
        tests.wait()
    assert _are_gone(family)


def test_every_way_of_reading_a_variable_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "1")
    # Removed again in the end.
    for name in ("BY_DEFAULT", "SET"):
        monkeypatch.setenv(name, "")
        del os.environ[name]
    with noting_what_is_read() as read:
        found = os.environ["THERE"], os.environ.get("BY_GET"), os.getenv("BY_GETENV"), "ASKED_FOR" in os.environ
        os.environ.setdefault("BY_DEFAULT", "1")
        os.environ["SET"] = "1"
    os.environ.get("AFTERWARDS")
    assert found == ("1", None, None, False)
    assert read == {"THERE", "BY_GET", "BY_GETENV", "ASKED_FOR", "BY_DEFAULT", "SET"}


@pytest.mark.parametrize(
    ("names", "same"),
    [(set(), True), ({"SGLANG_ANY"}, True), ({"SGLANG_READ"}, False), ({"OMP_NUM_THREADS"}, False), ({"HOME"}, False)],
)
def test_differences_that_imports_cannot_have_seen(names: set[str], same: bool) -> None:
    assert unseen(names, {"SGLANG_READ", "PATH"}) == same


def test_descriptors_get_their_numbers_whichever_they_have() -> None:
    read, write = os.pipe()
    first, second = (os.open(os.devnull, os.O_RDONLY) for _ in range(2))
    # Received in the numbers of each other.
    os.dup2(read, first), os.dup2(write, second)
    _renumber([first, second], [second, first])
    os.write(first, b"x")
    assert os.read(second, 1) == b"x"
    for each in (read, write, first, second):
        os.close(each)


def test_a_program_whose_keeper_was_killed_counts_as_ended() -> None:
    read, write = os.pipe()
    os.write(write, b"17\n")
    forked = Forked(read)
    assert (forked.pid, forked.poll()) == (17, None)
    os.close(write)
    assert [forked.poll(), forked.wait()] == [-signal.SIGTERM, -signal.SIGTERM]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "'threads': 1"),
        ("import subprocess; subprocess.Popen(['sleep', '9'])", "'child processes': 1"),
        ("import os; os.open(os.devnull, os.O_RDONLY)", "'open files': 1"),
    ],
    ids=["thread", "child process", "file"],
)
def test_what_forks_would_share_is_refused(
    tmp_path: Path, variables: dict[str, str], capfd: pytest.CaptureFixture, head: str, words: str
) -> None:
    (tmp_path / "head.py").write_text(head)
    paths = os.pathsep.join([str(tmp_path), variables["PYTHONPATH"]])
    wanted = variables | {"PYTHONPATH": paths}
    keeper = Keeper(wanted, "head")
    with pytest.raises(RuntimeError, match="has ended"), (tmp_path / "log").open("wb") as output:
        keeper.start([sys.executable, "-m", "head"], wanted, output)
    keeper.end()
    assert words in capfd.readouterr().err


if __name__ == "__main__":
    folder, keeper = Path(sys.argv[1]), Keeper(os.environ, MODULE)
    _waiting(keeper.start, folder, os.environ)
    (folder / "started").touch()
    time.sleep(600)
