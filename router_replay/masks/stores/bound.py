"""What a store with a bound says when it has no room."""

from __future__ import annotations

import logging

from router_replay.errors import StoreError

logger = logging.getLogger(__name__)


def require_fits(url: str, num_bytes: int, bound: int) -> None:
    """Raise StoreError for masks that are larger than the whole store: nothing is dropped for them."""
    if num_bytes > bound:
        raise StoreError(f"these masks have {num_bytes:,} bytes, the whole store {url!r} at most {bound:,} (max_bytes)")


def tell_dropped(url: str, bound: int, now: int, in_all: int) -> None:
    """Warn that the masks of `now` sequences were dropped, of `in_all` by this writer."""
    logger.warning(
        "store %s is full (%d bytes): dropped the masks of %d sequences that nobody had deleted, the oldest; %d by this"
        " writer since it started",
        url,
        bound,
        now,
        in_all,
    )
