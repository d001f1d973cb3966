"""Real servers, one per configuration, each shared by the tests of a file: they take most of a minute to start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_engines.sglang.server import STAND_IN_PLUGIN, Server
from cpu_engines.sglang.server import serve as serve_with_own_models
from tests.sglang_router_capture.probe import probing
from tests.small_model import serve

PAGED = ("--chunked-prefill-size=64", "--max-total-tokens=4096", "--page-size=16")


@pytest.fixture(
    scope="module",
    params=[
        # Without a tokenizer the scheduler's answers go past the detokenizer, which writes them otherwise.
        ("--enable-return-routed-experts", "--skip-tokenizer-init"),
        ("--enable-router-capture", "--router-capture-format=sglang"),
    ],
    ids=["upstream's flag", "our flags"],
)
def sglang_format_server(small_model: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """`sglang serve` with pages of 16, whose routes our recorder gives in upstream's format."""
    command = (str(Path(sys.executable).parent / "sglang"), "serve")
    with serve(small_model, *request.param, *PAGED, command=command) as server:
        assert "router capture is on: format sglang, codec ordered" in server.log()
        yield server


@pytest.fixture(scope="module")
def stock_server(small_model: Path) -> Iterator[Server]:
    """SGLang's own capture: the same flags, our plugin not among those that it may load."""
    environment = {"SGLANG_PLUGINS": STAND_IN_PLUGIN}
    with serve(
        small_model, "--enable-return-routed-experts", "--skip-tokenizer-init", *PAGED, environment=environment
    ) as server:
        assert "router capture is on" not in server.log()
        yield server


@pytest.fixture(scope="module")
def plain_server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server without any flag, and the folder of its probes' reports."""
    folder = tmp_path_factory.mktemp("plain_probe")
    flags = ("--skip-tokenizer-init", "--max-total-tokens=2048")
    # With SGLang's own models: the package that builds our small one right imports masks, and what it chooses is
    # nobody's business here.
    with serve_with_own_models(small_model, *flags, environment=probing(folder)) as server:
        yield server, folder
