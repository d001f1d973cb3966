"""SlotTable: one packed row per slot of a KV pool, valid only for the slot's current occupant."""

from __future__ import annotations

import torch
from torch import Tensor

from router_replay.masks import NO_ROW


class SlotTable:
    """Rows in pageable host memory, keyed by slot of a KV pool on the device, or of one on the host.

    A slot's life: `release` when the allocator hands it out (whatever it held belongs to somebody else), `write` when
    a forward pass has computed its token, or `copy_from` when its KV came from elsewhere. The log calls these in the
    order in which the scheduler issued them.

    Attributes:
        rows: `uint8 [num_slots, row_bytes]`.
        valid: `bool [num_slots]`: the row is that of the token whose KV the slot holds.
        versions: `int32 [num_slots]`: number of the weight version that computed the row; -1 where no pass is known.
    """

    def __init__(self, num_slots: int, row_bytes: int) -> None:
        self.rows = torch.full((num_slots, row_bytes), NO_ROW, dtype=torch.uint8)
        self.valid = torch.zeros(num_slots, dtype=torch.bool)
        self.versions = torch.full((num_slots,), -1, dtype=torch.int32)

    def release(self, slots: Tensor) -> None:
        """Slots `int [n]` have a new occupant, whose tokens are not computed yet."""
        self.valid[slots] = False
        self.versions[slots] = -1

    def write(self, slots: Tensor, rows: Tensor, valid: Tensor, versions: Tensor | int) -> None:
        """The tokens in slots `int [n]` have these rows.

        Args:
            rows: `uint8 [n, row_bytes]`.
            valid: `bool [n]`; False where a layer reported no route.
            versions: `int32 [n]`, or one for all: numbers of the weight versions that computed them.
        """
        self.rows[slots] = rows
        self.versions[slots] = versions
        self.valid[slots] = valid

    def copy_from(self, source: SlotTable, source_slots: Tensor, slots: Tensor) -> None:
        """The KV of `source_slots int [n]` was copied to `slots int [n]`, one to one. The two tables may be one."""
        self.write(slots, *source.read(source_slots))

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of `(rows, valid, versions)` at slots `int [n]`; rows that are not valid are filled with `NO_ROW`."""
        valid = self.valid[slots]
        rows = self.rows.index_select(0, slots)
        if not bool(valid.all()):
            rows[~valid] = NO_ROW
        return rows, valid, self.versions[slots]
