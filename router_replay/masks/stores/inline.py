"""The inline store: the container travels inside the handle, as base64 text."""

from __future__ import annotations

from typing import Any

import pybase64

from router_replay.errors import DataError, InputError
from router_replay.masks import container
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores.handles import place_of, require_store
from router_replay.masks.stores.store import Handle, Stat, Store

URL = "inline:"


class InlineStore(Store):
    """Keeps nothing itself: what `put` is given is in the handle, and goes when the handle does."""

    def __init__(self, url: str = URL) -> None:
        if url != URL:
            raise InputError(f"store URL {url!r}: the inline store is {URL!r}, it keeps nothing at any place")

    def put(self, masks: RoutingMasks) -> dict[str, Any]:
        """A handle that carries the masks."""
        data = pybase64.b64encode_as_string(container.to_bytes(masks))
        return {"store": URL, **place_of(masks), "data": data}

    def get(self, handle: Handle) -> RoutingMasks:
        """The masks in the handle.

        Raises:
            DataError: the text is not base64 of a whole container.
        """
        return container.from_bytes(_data(handle))

    def delete(self, handle: Handle) -> None:
        """Nothing: the masks are in the handle alone, whose text is not decoded for it."""
        _text(handle)

    def stat(self, handle: Handle) -> Stat:
        """Sizes of the masks in the handle, which are always there."""
        data = _data(handle)
        return Stat(there=True, num_bytes=len(data), num_tokens=len(container.from_bytes(data)))

    def close(self) -> None:
        """Nothing is open."""


def _data(handle: Handle) -> bytes:
    text = _text(handle)
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError as error:
        raise DataError(
            f"an inline handle whose data is not base64 text ({error}): pass it as the answer gave it"
        ) from error


def _text(handle: Handle) -> str:
    require_store(handle, URL)
    data = handle.get("data")
    if not isinstance(data, str):
        raise DataError(
            f"an inline handle whose data is not base64 text but a {type(data).__name__}: pass it as the answer gave it"
        )
    return data
