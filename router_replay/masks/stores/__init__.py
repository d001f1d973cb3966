"""Where a sequence's masks wait for the trainer: stores by URL, and handles that name their store."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from os import PathLike

from router_replay.errors import DataError, InputError
from router_replay.masks.masks import RoutingMasks
from router_replay.masks.stores.store import Handle, Stat, Store

__all__ = ["STORES", "Handle", "Stat", "Store", "load", "open_store"]

_DIRECTORY = "router_replay.masks.stores.directory:DirectoryStore"

STORES = {
    "inline": "router_replay.masks.stores.inline:InlineStore",
    "file": _DIRECTORY,
    "s3": _DIRECTORY,
    "ray": "router_replay.masks.stores.ray:RayStore",
    "http": "router_replay.masks.stores.http:HttpStore",
    "https": "router_replay.masks.stores.http:HttpStore",
    "parts": "router_replay.masks.stores.parts:PartsStore",
}
"""Scheme of a store's URL -> its class, imported when a URL or a handle first names it. A scheme that is not here, and
that fsspec knows, is a directory store's."""


def open_store(url: str) -> Store:
    """The store of a URL; "inline:" is the one that puts the masks into their handles.

    Who is going to put masks into it calls its `prepare` first.

    Raises:
        InputError: no URL, one of a scheme that this version does not know, or one that its store does not take.
    """
    name = _class_of(url)
    if name is None:
        raise InputError(f"{str(url)[:80]!r} is not the URL of a known store: use one that begins with {_schemes()}")
    store_class: type[Store] = pkgutil.resolve_name(name)
    return store_class(url)


def load(handle: Handle) -> RoutingMasks:
    """The masks behind a handle, one of those that a server put into `meta_info["routing_masks"]`.

    The handle names its store: nothing else need be known or configured where masks are read.

    Raises:
        DataError: not a handle, one of a store that this version does not know, or nothing whole is behind it; or the
            server could not store the masks, and the handle says why.
        StoreError: its store cannot be reached or read now.
        PairingError: a handle of several parts that are not of one sequence.
    """
    if isinstance(handle, Mapping) and "error" in handle:
        raise DataError(f"the server has no masks for this answer: {handle['error']}")
    url = handle.get("store") if isinstance(handle, Mapping) else None
    if not isinstance(url, str) or _class_of(url) is None:
        raise DataError(f"not a handle of a known store ({_schemes()}): {str(handle)[:80]!r}; {_way_out(handle)}")
    try:
        store = open_store(url)
    except InputError as error:
        raise DataError(f"a handle whose store cannot be opened: {error}") from error
    with store:
        return store.get(handle)


def _class_of(url: object) -> str | None:
    if not isinstance(url, str) or ":" not in url:
        return None
    scheme = url.partition(":")[0]
    if scheme in STORES:
        return STORES[scheme]
    from fsspec import available_protocols

    return _DIRECTORY if scheme in available_protocols() else None


def _schemes() -> str:
    return ", ".join(f"{scheme}:" for scheme in STORES) + " or another scheme of fsspec"


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
