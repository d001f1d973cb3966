"""A socket for SGLang's `sock_send` and `sock_recv` that counts bytes, or only them."""

from __future__ import annotations

import pickle
from typing import Any

import zmq


class CountedSocket:
    """Sends and receives as a ZMQ socket does, and knows how much.

    Args:
        socket: the real one; without it, what is sent goes nowhere.

    Attributes:
        num_bytes: that went through it.
    """

    def __init__(self, socket: zmq.Socket | None = None) -> None:
        self._socket = socket
        self.num_bytes = 0

    def send(self, data: bytes, flags: int = 0) -> None:
        """Send bytes."""
        self.num_bytes += len(data)
        if self._socket is not None:
            self._socket.send(data, flags)

    def recv(self, flags: int = 0) -> bytes:
        """Receive bytes."""
        if self._socket is None:
            raise RuntimeError("nothing is received from a socket that leads nowhere")
        data = self._socket.recv(flags)
        self.num_bytes += len(data)
        return data

    def send_pyobj(self, obj: Any, flags: int = 0, protocol: int = pickle.DEFAULT_PROTOCOL) -> None:
        """Send an object as `zmq.Socket.send_pyobj` does."""
        self.send(pickle.dumps(obj, protocol), flags)

    def recv_pyobj(self, flags: int = 0) -> Any:
        """Receive an object as `zmq.Socket.recv_pyobj` does."""
        return pickle.loads(self.recv(flags))
