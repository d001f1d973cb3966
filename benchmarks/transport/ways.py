"""The ways that routes take, and where the processes on them meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NOTHING, STOCK, INLINE, FILE, HTTP, RAY = "no routes", "SGLang's own", "inline:", "file:", "http:", "ray:"
WAYS = (NOTHING, STOCK, INLINE, FILE, HTTP, RAY)
STORED = (INLINE, FILE, HTTP, RAY)

TRIM = "trim"
"""Asked for in the place of a way: every process gives back the memory that it does not use."""

SCHEDULED, WRITTEN, HANDED, ANSWERED, KEPT = HOPS = (
    "scheduler to detokenizer",
    "detokenizer to server",
    "handle to server",
    "server to reader",
    "store to reader",
)


@dataclass(frozen=True)
class Places:
    """Where the processes meet.

    Attributes:
        folder: of this run, in memory.
        port: of the server.
        ray: address of the Ray cluster.
    """

    folder: Path
    port: int
    ray: str

    @property
    def handles(self) -> Path:
        """Where handles wait for their answers."""
        return self.folder / "handles"

    @property
    def served(self) -> Path:
        """Where masks lie that the server serves."""
        return self.folder / "served"

    @property
    def server(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def socket(self, name: str) -> str:
        """Address of a ZMQ socket between two processes."""
        return f"ipc://{self.folder}/{name}"

    def url(self, way: str) -> str:
        """URL of a way's store, as the scheduler is given it."""
        return {
            INLINE: "inline:",
            FILE: f"file://{self.folder}/masks",
            HTTP: self.server,
            RAY: f"ray:?address={self.ray}",
        }[way]
