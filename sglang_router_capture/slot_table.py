"""SlotTable: one packed row per slot of a KV pool, valid only for the slot's current occupant."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from router_replay.masks import NO_ROW

SlotRows = tuple[Tensor, Tensor, Tensor]
"""`(rows uint8 [n, row_bytes], valid bool [n], versions int32 [n])`."""


class SlotTable:
    """Rows in pageable host memory, keyed by slot of a KV pool on the device, or of one on the host.

    A slot's life: `release` when the allocator hands it out (whatever it held belongs to somebody else), `write` when
    a forward pass has computed its token, or `copy_from` when its KV came from elsewhere. The log calls these in the
    order in which the scheduler issued them, on the scheduler's thread, which may leave the copying of what it reads to
    another one (`read_later`).

    Attributes:
        rows: `uint8 [num_slots, row_bytes]`.
        valid: `bool [num_slots]`: the row is that of the token whose KV the slot holds.
        versions: `int32 [num_slots]`: number of the weight version that computed the row; -1 where no pass is known.
        read_by: `int64 [num_slots]`: number of the latest read that was left for later and needs the slot.
    """

    def __init__(self, num_slots: int, row_bytes: int) -> None:
        self.rows = torch.full((num_slots, row_bytes), NO_ROW, dtype=torch.uint8)
        self.valid = torch.zeros(num_slots, dtype=torch.bool)
        self.versions = torch.full((num_slots,), -1, dtype=torch.int32)
        # In numpy: torch takes three times as long to mark them.
        self.read_by = np.zeros(num_slots, dtype=np.int64)
        self._num_reads = 0
        # Weakly: rows that nobody waits for any more need not be gathered.
        self._later: list[weakref.ref[LaterRead]] = []

    def release(self, slots: Tensor) -> None:
        """Slots `int [n]` have a new occupant, whose tokens are not computed yet."""
        self._about_to_change(slots)
        self.valid[slots] = False
        self.versions[slots] = -1

    def write(self, slots: Tensor, rows: Tensor, valid: Tensor, versions: Tensor | int) -> None:
        """The tokens in slots `int [n]` have these rows.

        Args:
            rows: `uint8 [n, row_bytes]`.
            valid: `bool [n]`; False where a layer reported no route.
            versions: `int32 [n]`, or one for all: numbers of the weight versions that computed them.
        """
        self._about_to_change(slots)
        self.rows[slots] = rows
        self.versions[slots] = versions
        self.valid[slots] = valid

    def copy_from(self, source: SlotTable, source_slots: Tensor, slots: Tensor) -> None:
        """The KV of `source_slots int [n]` was copied to `slots int [n]`, one to one. The two tables may be one."""
        self.write(slots, *source.read(source_slots))

    def read(self, slots: Tensor) -> SlotRows:
        """Copies of `(rows, valid, versions)` at slots `int [n]`; rows that are not valid are filled with `NO_ROW`."""
        valid = self.valid[slots]
        rows = self.rows.index_select(0, slots)
        if not bool(valid.all()):
            rows[~valid] = NO_ROW
        return rows, valid, self.versions[slots]

    def read_later(self, slots: Tensor) -> LaterRead:
        """What `read` would give now, for another thread to gather while this one goes on.

        What is about to change one of the slots has it gathered first: it is the state of this moment, whenever it is.

        Args:
            slots: `int [n]`, which nobody changes.
        """
        self._num_reads += 1
        self.read_by[slots.numpy()] = self._num_reads
        read = LaterRead(self, slots, self._num_reads)
        self._later = [*(weakref.ref(each) for each in self._waiting()), weakref.ref(read)]
        return read

    def _about_to_change(self, slots: Tensor) -> None:
        if not self._later or not slots.numel():
            return
        waiting = self._waiting()
        if not waiting:
            self._later.clear()
            return
        # A slot names the latest of its reads; earlier ones may need it as well.
        latest = int(self.read_by[slots.numpy()].max())
        for read in waiting:
            if read.number <= latest:
                read.gather()

    def _waiting(self) -> list[LaterRead]:
        found = (reference() for reference in self._later)
        return [read for read in found if read is not None and not read.gathered]


class LaterRead:
    """Rows of slots as they were when `SlotTable.read_later` was called. Any thread may gather them.

    Attributes:
        number: of the read among those of its table.
        num_bytes: of the rows, gathered or not, and of the slots.
        gathered: the rows are no longer those of the table, but copies.
    """

    def __init__(self, table: SlotTable, slots: Tensor, number: int) -> None:
        self.number = number
        self.num_bytes = len(slots) * table.rows.shape[1] + slots.nbytes
        self.gathered = False
        self._table = table
        self._slots = slots
        self._found: SlotRows | None = None
        self._lock = threading.Lock()

    def gather(self) -> SlotRows:
        """The rows, copied out of the table the first time; other threads wait for the one that does it."""
        with self._lock:
            if self._found is None:
                self._found = self._table.read(self._slots)
                self.gathered = True
            return self._found
