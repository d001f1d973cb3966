"""`r3 doctor` without an engine: what it says of ledgers that fit, do not fit, and are of nothing that is installed."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner, Result

from router_replay.masks.codecs.ops import MISSING_KERNELS
from router_replay.upstream import Installed, Ledger, Seam
from router_replay_cli import doctor as doctor_file
from router_replay_cli import main as cli


def _ledger(distribution: str, path: str) -> Ledger:
    seam = Seam(path, None, "read by tests.nothing", "it is a test's", "never")
    return Ledger(distribution, distribution.title(), "packaging.", "a test", ("1",), (), "do nothing", (seam,))


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.build_app(["doctor"]), ["doctor", *arguments], terminal_width=400)


def test_what_is_not_installed_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    ledgers = [_ledger("packaging", "version.Version"), _ledger("no-such-engine", "version.Version")]
    monkeypatch.setattr(doctor_file, "_ledgers", lambda: ledgers)
    result = _run()
    assert result.exit_code == 0, result.output
    assert "fits Packaging, a test: 1 names" in result.output
    assert "no-such-engine is not installed" in result.output
    assert "torch 2." in result.output


def test_a_name_that_is_gone_is_named_and_the_status_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    ledgers = [_ledger("packaging", "version.Vision"), _ledger("packaging", "version.Version")]
    monkeypatch.setattr(doctor_file, "_ledgers", lambda: ledgers)
    result = _run()
    assert result.exit_code == 1
    assert "does not fit Packaging, a test: 1 of 1 names" in result.output
    assert "packaging.version.Vision: expected that name, found nothing" in result.output
    # The others are still told.
    assert "fits Packaging, a test: 1 names" in result.output


def test_kernels_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_file, "_ledgers", list)
    monkeypatch.setitem(MISSING_KERNELS, "cpu", "they were not built")
    result = _run()
    assert result.exit_code == 1
    assert "missing cpu, plain torch runs in their place: they were not built" in result.output


def test_flags_of_a_server_need_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_file, "_ledgers", list)
    there = doctor_file.importlib.util.find_spec
    monkeypatch.setattr(doctor_file.importlib.util, "find_spec", lambda name: None if name == "sglang" else there(name))
    result = _run("--model-path", "x", "--device=cpu")
    assert result.exit_code == 1
    assert "SGLang is not installed here" in result.output


def test_ends_whose_engine_is_not_there_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would refuse to be; importing anything of them is an error here."""
    for name in ("megatron_router_replay", "hf_router_replay"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(Installed, "release", None)
    distributions = {ledger.distribution for ledger in doctor_file._ledgers()}
    assert distributions == {"sglang", "torch"}
