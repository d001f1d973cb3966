"""`r3 doctor --stack` and `--server`: what a stack has to be told, and what a server says of itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from router_replay.errors import SeamError
from router_replay.upstream import Ledger
from router_replay_adapters.slime import LEDGER
from router_replay_cli import doctor as doctor_file
from router_replay_cli import main as cli
from tests.stack_packages import importable

VARIABLES = {"SGLANG_ROUTER_CAPTURE": "1", "SGLANG_ROUTER_CAPTURE_FORMAT": "sglang"}
ARGUMENTS = ("--use-rollout-routing-replay", "--custom-megatron-init-path", "router_replay_adapters.slime.init")
STAND_INS = Path(__file__).parents[1] / "router_replay_adapters" / "stand_ins"


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are another test's; no variable is set."""
    monkeypatch.setattr(doctor_file, "_ledgers", list)
    monkeypatch.setattr(doctor_file, "_print_kernels", lambda console: True)
    for name in (*VARIABLES, "VERL_USE_EXTERNAL_MODULES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A slime whose names fit."""
    with importable("slime", STAND_INS):
        yield


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.build_app(["doctor"]), ["doctor", *arguments], terminal_width=400)


def test_a_stack_that_has_everything(slime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    result = _run("--stack", "slime", *ARGUMENTS)
    assert result.exit_code == 0, result.output
    for part in (
        "slime, of an unknown release",
        f"fits slime, the adapter for slime: {len(LEDGER.seams)} names of an unknown release",
        "set SGLANG_ROUTER_CAPTURE=1",
        "set SGLANG_ROUTER_CAPTURE_FORMAT=sglang",
        "given --use-rollout-routing-replay",
        "given --custom-megatron-init-path router_replay_adapters.slime.init",
    ):
        assert part in result.output
    assert "to set" not in result.output and "to give" not in result.output


def test_what_is_missing_is_told_and_the_status_is_1(slime: None) -> None:
    result = _run("--stack=slime", "--use-rollout-routing-replay")
    assert result.exit_code == 1
    assert "to set SGLANG_ROUTER_CAPTURE=1, in Ray's runtime_env" in result.output
    assert "to give --custom-megatron-init-path router_replay_adapters.slime.init" in result.output
    assert "given --use-rollout-routing-replay" in result.output


def test_without_a_command_line_its_arguments_are_no_fault(slime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    result = _run("--stack", "slime")
    assert result.exit_code == 0, result.output
    assert "to give: --use-rollout-routing-replay" in result.output


def test_an_argument_that_is_missing_is_enough_for_the_status(slime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert _run("--stack", "slime", *ARGUMENTS[:1]).exit_code == 1
    assert _run("--stack", "slime", *ARGUMENTS).exit_code == 0


def test_an_argument_with_which_the_adapter_is_never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("router_replay_cli.stack._print_package", lambda console, stack: True)
    monkeypatch.setattr("router_replay_cli.stack._print_names", lambda console, ledger: True)
    arguments = [each.replace("slime", "miles") for each in ARGUMENTS]
    result = _run("--stack", "miles", *arguments, "--train-backend", "fsdp")
    assert result.exit_code == 1
    assert "to take away --train-backend fsdp, with which miles never loads the adapter" in result.output
    assert _run("--stack", "miles", *arguments, "--train-backend", "megatron").exit_code == 0


def test_a_stack_with_another_name_is_told(slime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.utils import routing_replay

    monkeypatch.delattr(routing_replay, "set_routing_replay")
    result = _run("--stack", "slime")
    assert result.exit_code == 1
    assert f"does not fit slime, the adapter for slime: 1 of {len(LEDGER.seams)} names" in result.output
    assert "slime.utils.routing_replay.set_routing_replay: expected parameters (replay)" in result.output


def test_an_adapter_whose_import_refuses_the_stack(slime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object, ledger: Ledger, **how: object) -> bool:
        raise SeamError(f"{ledger.title} has names that differ")

    monkeypatch.setattr("router_replay_cli.stack.print_ledger", refused)
    result = _run("--stack", "slime")
    assert result.exit_code == 1
    assert "does not fit: slime has names that differ" in result.output


def test_a_stack_that_is_not_here() -> None:
    result = _run("--stack", "miles")
    assert result.exit_code == 1
    assert "not here: there is no package miles to import" in result.output
    assert "--custom-megatron-init-path router_replay_adapters.miles.init" in result.output


def test_a_stack_without_adapter_says_why() -> None:
    result = _run("--stack", "nemo-rl")
    assert result.exit_code == 1
    assert "no adapter: NeMo-RL takes routes from vLLM alone" in result.output


def test_a_format_that_does_not_exist(slime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE", "1")
    monkeypatch.setenv("SGLANG_ROUTER_CAPTURE_FORMAT", "sgl")
    result = _run("--stack", "slime")
    assert result.exit_code == 1 and "wrong: router capture format 'sgl' is unknown" in result.output


@pytest.mark.parametrize(
    ("stack", "environ", "told"),
    [
        ("slime-packed", VARIABLES, "to set SGLANG_ROUTER_CAPTURE_FORMAT=masks, in Ray's runtime_env"),
        ("slime-packed", {**VARIABLES, "SGLANG_ROUTER_CAPTURE_FORMAT": "masks"}, None),
        ("slime-packed", {"SGLANG_ROUTER_CAPTURE": "1"}, None),
        ("slime", {"SGLANG_ROUTER_CAPTURE": "1"}, "to set SGLANG_ROUTER_CAPTURE_FORMAT=sglang, in Ray's runtime_env"),
    ],
)
def test_a_format_of_another_stage_is_told(
    stack: str, environ: dict[str, str], told: str | None, slime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = _run("--stack", stack)
    assert result.exit_code == (told is not None), result.output
    assert ("SGLANG_ROUTER_CAPTURE_FORMAT" in result.output) == (told is not None)
    assert told is None or told in result.output
    assert "set SGLANG_ROUTER_CAPTURE=1\n" in result.output


def test_an_unknown_stack() -> None:
    result = _run("--stack", "smile")
    assert result.exit_code == 2
    assert "'smile' is none of miles, miles-packed, slime, slime-packed, verl, verl-packed, nemo-rl" in result.output


@contextmanager
def _server(status: int, body: Any) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/router_capture/status" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _scheduler(format_: str, unknown: int = 0) -> dict[str, Any]:
    rows = {"returned": 40, "returned_without_routes": 0, "returned_unrecorded": unknown}
    return {"capturer": "Recorder", "format": format_, "codec": "ordered", "rows": rows}


def test_a_server_of_ours() -> None:
    with _server(200, {"schedulers": [_scheduler("sglang"), _scheduler("sglang", unknown=3)]}) as url:
        result = _run("--server", url)
    assert result.exit_code == 0, result.output
    assert "captures scheduler 0: Recorder, format sglang, codec ordered, 40 rows returned\n" in result.output
    assert "captures scheduler 1: Recorder, format sglang, codec ordered, 40 rows returned, 3 of them" in result.output


def test_a_server_with_a_format_that_the_stack_does_not_read(slime: None) -> None:
    with _server(200, {"schedulers": [_scheduler("masks")]}) as url:
        result = _run("--stack", "slime", "--server", url)
        alone = _run("--server", url)
    assert result.exit_code == 1
    assert "another format scheduler 0: Recorder, format masks" in result.output
    assert "SGLANG_ROUTER_CAPTURE_FORMAT=sglang" in result.output
    assert alone.exit_code == 0 and "captures scheduler 0: Recorder, format masks" in alone.output


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, {"schedulers": [None]}, "captures nothing scheduler 0"),
        (200, {"schedulers": []}, "captures nothing: it names no scheduler"),
        (404, {}, "not ours: it has no /router_capture/status"),
        (401, {}, "no answer: HTTP status 401"),
        (200, "none", "no answer: TypeError"),
    ],
)
def test_a_server_that_does_not_capture(status: int, body: Any, told: str) -> None:
    with _server(status, body) as url:
        result = _run("--server", url)
    assert result.exit_code == 1
    assert told in result.output


def test_no_server() -> None:
    with _server(200, {}) as url:
        pass
    result = _run("--server", url)
    assert result.exit_code == 1 and "no answer: URLError" in result.output
