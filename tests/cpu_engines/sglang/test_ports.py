"""The port of a server to come."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpu_engines.sglang import ports


@contextlib.contextmanager
def _held(numbers: range) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for port in numbers:
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        yield


def test_no_outgoing_connection_is_given_it() -> None:
    kernels = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if kernels < 20_064:
        pytest.skip("this kernel hands out nearly every port by itself")
    assert all(20_000 <= ports.free_port() < kernels for _ in range(50))


def test_a_held_port_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "ip_local_port_range"
    kernels.write_text("20064\t60999\n")
    monkeypatch.setattr(ports, "_EPHEMERAL", kernels)
    with _held(range(20_000, 20_063)):
        assert ports.free_port() == 20_063
        with _held(range(20_063, 20_064)), pytest.raises(OSError, match=r"none of 64 .* 20000 to 20063 is free"):
            ports.free_port()


def test_a_kernel_that_leaves_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "ip_local_port_range"
    kernels.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "_EPHEMERAL", kernels)
    assert 20_000 <= ports.free_port() < 1 << 16
