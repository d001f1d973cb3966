"""What a server's process finds in its environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_engines.sglang.server import MODEL_PACKAGE_VARIABLE, STAND_INS, base_environment, cpu_environment

REPOSITORY = str(Path(__file__).parents[3])


@pytest.mark.parametrize("environment", [base_environment, cpu_environment])
def test_models_from_outside_are_the_callers_choice(
    environment: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODEL_PACKAGE_VARIABLE, "left.by.somebody")
    assert MODEL_PACKAGE_VARIABLE not in environment()
    assert environment(model_package="my.models")[MODEL_PACKAGE_VARIABLE] == "my.models"
    # As every other variable that the caller adds.
    assert environment({MODEL_PACKAGE_VARIABLE: "added"}, model_package="my.models")[MODEL_PACKAGE_VARIABLE] == "added"


def test_paths_are_in_the_order_in_which_they_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/outer", "/outer2"]))
    base = base_environment({"PYTHONPATH": "/added"})["PYTHONPATH"].split(os.pathsep)
    assert base == ["/added", REPOSITORY, "/outer", "/outer2"]
    assert cpu_environment({"PYTHONPATH": "/added"})["PYTHONPATH"].split(os.pathsep) == [str(STAND_INS), *base]
    monkeypatch.delenv("PYTHONPATH")
    assert base_environment()["PYTHONPATH"] == REPOSITORY


def test_only_a_server_on_the_cpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    assert cpu_environment()["SGLANG_USE_CPU_ENGINE"] == "1"
    assert "SGLANG_USE_CPU_ENGINE" not in base_environment()
