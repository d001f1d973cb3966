"""A TCP port for a server that binds it only later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20_000
_DRAWS = 64


def free_port() -> int:
    """A loopback port that nobody holds, below those that the kernel hands out by itself if it leaves room there.

    A server binds its port only when its model is loaded. Until then any outgoing connection may be given a port of
    the kernel's own range as its local end. SGLang then cannot bind, says so in one line, waits two minutes for itself,
    and ends with status -9.

    Raises:
        OSError: none of the ports drawn was free.
    """
    kernels = int(_EPHEMERAL.read_text().split()[0])
    above = kernels if kernels - _LOWEST >= _DRAWS else 1 << 16
    # The system's source: two processes whose tests seed `random` alike must not draw alike.
    for port in random.SystemRandom().sample(range(_LOWEST, above), _DRAWS):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of {_DRAWS} loopback ports drawn from {_LOWEST} to {above - 1} is free")
