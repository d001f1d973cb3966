"""Where a sequence's masks wait for the trainer: stores by URL, and handles that name their store."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from os import PathLike

from router_replay.errors import DataError, InputError
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores.store import Handle, Stat, Store

__all__ = ["STORES", "Handle", "Stat", "Store", "load", "open_store"]

STORES = {
    "inline": "router_replay.masks.stores.inline:InlineStore",
}
"""Scheme of a store's URL -> its class, imported when a URL or a handle first names it."""


def open_store(url: str) -> Store:
    """The store of a URL; "inline:" is the one that puts the masks into their handles.

    Raises:
        InputError: no URL, or one of a scheme that this version does not know.
    """
    if not _known(url):
        raise InputError(f"{str(url)[:80]!r} is not the URL of a known store: use one that begins with {_schemes()}")
    store_class: type[Store] = pkgutil.resolve_name(STORES[url.partition(":")[0]])
    return store_class(url)


def load(handle: Handle) -> RoutingMasks:
    """The masks behind a handle, one of those that a server put into `meta_info["routing_masks"]`.

    The handle names its store: nothing else need be known or configured where masks are read.

    Raises:
        DataError: not a handle, one of a store that this version does not know, or nothing whole is behind it.
    """
    url = handle.get("store") if isinstance(handle, Mapping) else None
    if not isinstance(url, str) or not _known(url):
        raise DataError(f"not a handle of a known store ({_schemes()}): {str(handle)[:80]!r}; {_way_out(handle)}")
    try:
        store = open_store(url)
    except InputError as error:
        raise DataError(f"a handle whose store cannot be opened: {error}") from error
    with store:
        return store.get(handle)


def _known(url: object) -> bool:
    return isinstance(url, str) and ":" in url and url.partition(":")[0] in STORES


def _schemes() -> str:
    return ", ".join(f"{scheme}:" for scheme in STORES)


def _way_out(handle: object) -> str:
    match handle:
        case RoutingMasks():
            return "these are masks already, use them as they are"
        case str() | PathLike():
            return "masks in a file are read by load_file(path)"
        case list() | tuple():
            return "pass one handle of the list at a time"
        case {"routing_masks": _} | {"meta_info": _}:
            return "of an answer take masks_from_meta_info(meta_info)"
        case {"store": str()}:
            return "the server is of another release: use the same at both ends"
    return 'pass meta_info["routing_masks"][0] of the answer as it is'
