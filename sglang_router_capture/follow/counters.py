"""What the followers count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HiCacheCounters:
    """Rows by where they went. Each field has one thread that writes it.

    Attributes:
        rows_to_host: tokens whose KV was copied to the host, rows that are not valid included.
        rows_from_host: tokens whose KV was copied back, likewise.
        rows_to_storage: valid rows that were stored beside their page, or are there already.
        rows_not_stored: valid rows whose page was stored without them.
        rows_from_storage: valid rows that came with their page.
        rows_not_in_storage: tokens that came from storage without a valid row.
    """

    rows_to_host: int = 0
    rows_from_host: int = 0
    rows_to_storage: int = 0
    rows_not_stored: int = 0
    rows_from_storage: int = 0
    rows_not_in_storage: int = 0
