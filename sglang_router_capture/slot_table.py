"""SlotTable: one packed row per KV slot, valid only for the slot's current occupant."""

from __future__ import annotations

import torch
from torch import Tensor


class SlotTable:
    """Rows on the host, keyed by KV slot.

    A slot's life: `release` when the allocator hands it out (whatever it held belongs to somebody else), `write` when
    a forward pass has computed its token. The recorder calls both in the order in which the scheduler issued them.

    Attributes:
        rows: `uint8 [num_slots, row_bytes]`, pinned where `pin` asks for it.
        valid: `bool [num_slots]`: the row is that of the token whose KV the slot holds.
        versions: `int32 [num_slots]`: number of the weight version that computed the row.
    """

    def __init__(self, num_slots: int, row_bytes: int, *, pin: bool) -> None:
        self.rows = torch.zeros((num_slots, row_bytes), dtype=torch.uint8, pin_memory=pin)
        self.valid = torch.zeros(num_slots, dtype=torch.bool)
        self.versions = torch.zeros(num_slots, dtype=torch.int32)

    def release(self, slots: Tensor) -> None:
        """Slots `int [n]` have a new occupant, whose tokens are not computed yet."""
        self.valid[slots] = False

    def write(self, slots: Tensor, rows: Tensor, valid: Tensor, version: int) -> None:
        """A forward pass computed the tokens in slots `int [n]`.

        Args:
            rows: `uint8 [n, row_bytes]`.
            valid: `bool [n]`; False where a layer reported no route.
            version: number of the weight version that computed them.
        """
        self.rows[slots] = rows
        self.versions[slots] = version
        self.valid[slots] = valid

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of `(rows, valid, versions)` at slots `int [n]`; rows that are not valid are all zero bytes."""
        valid = self.valid[slots]
        return torch.where(valid[:, None], self.rows[slots], 0), valid, self.versions[slots]
