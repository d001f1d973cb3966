"""The rows of one page of a storage, as bytes of a size that is known before they are read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from router_replay.errors import DataError

FORMAT = "router-rows/1"
_CHECK_BYTES = 16
_NAMES_BYTES = 1024


@dataclass(frozen=True)
class PageRows:
    """Rows of a page's n tokens.

    Attributes:
        rows: `uint8 [n, row_bytes]`.
        valid: `bool [n]`.
        names: weight versions by their names: numbers are those of one process.
        named: `int16 [n]`: index into `names`.
    """

    rows: Tensor
    valid: Tensor
    names: tuple[str, ...]
    named: Tensor

    def to_bytes(self, key: str) -> Tensor | None:
        """These rows as `uint8 [packed_size(...)]`, to be stored under `key`; None where the names are too long."""
        names = json.dumps(self.names).encode()
        if len(names) > _NAMES_BYTES:
            return None
        parts = (self.named.to(torch.int16), self.valid, self.rows)
        body = names.ljust(_NAMES_BYTES) + b"".join(part.contiguous().numpy().tobytes() for part in parts)
        return torch.frombuffer(bytearray(_check(key, body) + body), dtype=torch.uint8)

    @classmethod
    def from_bytes(cls, key: str, packed: Tensor, num_tokens: int, row_bytes: int) -> PageRows:
        """Rows that `to_bytes` packed for the same key.

        Raises:
            DataError: the bytes are not those that were stored under this key.
        """
        data = packed.numpy().tobytes()
        body = data[_CHECK_BYTES:]
        if len(data) != packed_size(num_tokens, row_bytes) or data[:_CHECK_BYTES] != _check(key, body):
            raise DataError(f"the {len(data)} bytes stored as {key} are not the rows that were written there")
        rest = torch.frombuffer(bytearray(body[_NAMES_BYTES:]), dtype=torch.uint8)
        named, valid, rows = rest.split([2 * num_tokens, num_tokens, num_tokens * row_bytes])
        return cls(
            rows.view(num_tokens, row_bytes),
            valid.to(torch.bool),
            tuple(json.loads(body[:_NAMES_BYTES])),
            named.view(torch.int16),
        )


def packed_size(num_tokens: int, row_bytes: int) -> int:
    """Bytes that the rows of a page take."""
    return _CHECK_BYTES + _NAMES_BYTES + num_tokens * (3 + row_bytes)


def _check(key: str, body: bytes) -> bytes:
    # With the key: a file that was moved or renamed is not what its name says.
    return hashlib.sha256(key.encode() + b"\0" + body).digest()[:_CHECK_BYTES]
