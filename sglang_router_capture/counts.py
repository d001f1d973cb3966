"""What a recorder counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RowCounts:
    """Rows by what became of them, since the server's start.

    The scheduler's thread writes them; those of returned rows, whichever thread makes the masks.

    Attributes:
        written: rows of forward passes.
        written_without_routes: those of them that are not valid, since a layer reported no legal choice.
        kept: rows of sampled tokens that were kept when their request was retracted.
        returned: rows of answers. Masks that were dropped before they were made, since the store was behind, are not
            among them: the writer counts these requests.
        returned_without_routes: those of them that are not valid, since a layer reported no legal choice.
        returned_unrecorded: those of them that are not valid, since nobody here recorded the KV: pages of another
            server, or pages whose rows were evicted.
    """

    written: int = 0
    written_without_routes: int = 0
    kept: int = 0
    returned: int = 0
    returned_without_routes: int = 0
    returned_unrecorded: int = 0

    def count_written(self, valid: Tensor) -> None:
        """A pass wrote rows, `valid bool [n]`."""
        self.written += len(valid)
        self.written_without_routes += int((~valid).sum())

    def count_returned(self, valid: Tensor, versions: Tensor) -> None:
        """Rows are returned.

        Args:
            valid: `bool [n]`.
            versions: `int32 [n]`, as of `SlotTable.read`.
        """
        unrecorded = int((~valid & (versions < 0)).sum())
        self.returned += len(valid)
        self.returned_unrecorded += unrecorded
        self.returned_without_routes += int((~valid).sum()) - unrecorded
